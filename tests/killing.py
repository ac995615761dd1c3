"""Runs that are killed on the way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from benchmarks.harness.progress import Progress


@contextmanager
def killed_at(step: int) -> Iterator[None]:
    """What is executed inside is killed when a step ends, and has to come that far."""

    def die(
        self: Progress, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if state.global_step == step:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Progress, "on_step_end", die)
        with pytest.raises(KeyboardInterrupt):
            yield
