"""How the rows of sets are routed while a classifier is evaluated on them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

import emoe
from benchmarks.harness.base.seeds import derive_seed
from benchmarks.harness.training.trainer import routing_summary
from benchmarks.text.usage import Loads, SetLoads, describe_usage
from emoe.layer import routed_layers

_ROWS = 200  # of every set, whose loads are kept row by row


class RowRouting:
    """Collects which experts the rows of each set use, in the evaluations that are watched; nothing of a dense model.

    Of the last converted layer the loads of some rows are kept row by row, drawn once and for all.

    Args:
        model: that is evaluated.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._sets: dict[str, SetLoads] = {}
        self._summaries: dict[str, dict[str, Any]] = {}

    @contextmanager
    def watching(self, name: str, classes: Loads) -> Iterator[None]:
        """Watch the model while it is called once with every row of a set, batch by batch.

        Args:
            name: of the set.
            classes: of its rows ``[rows]``, in the order in which they come; -1 where there are none.
        """
        if not routed_layers(self._model):
            yield
            return
        draw = np.random.default_rng(derive_seed("rows by their routing", name))
        chosen = np.sort(draw.permutation(len(classes))[:_ROWS])
        labels = torch.full((len(classes),), -1)
        labels[torch.from_numpy(chosen)] = torch.arange(len(chosen))
        seen = 0

        def name_rows(_module: nn.Module, _args: tuple[Any, ...], given: dict[str, Any]) -> None:
            nonlocal seen
            count = len(given["input_ids"])
            record.set_labels(labels[seen : seen + count])
            seen += count

        with emoe.record_routing(self._model) as record:
            hook = self._model.register_forward_pre_hook(name_rows, with_kwargs=True)
            try:
                yield
            finally:
                hook.remove()
        by_row = record.layers[max(record.layers)].by_label
        loads = np.stack([by_row[row].numpy() for row in range(len(chosen))])
        self._sets[name] = SetLoads(loads, classes[chosen])
        self._summaries[name] = routing_summary(record)

    def described(self, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """What was collected.

        Args:
            name: of the set whose tokens are summed up.

        Returns:
            How its tokens were routed (:func:`~benchmarks.harness.training.trainer.routing_summary`), and where there are several sets what experts tell of sets and
            classes; and shares of experts by set and class (:func:`~benchmarks.text.usage.describe_usage`), which one set alone has none of.
        """
        if len(self._sets) < 2:
            return self._summaries.get(name, {}), {}
        told, usage = describe_usage(self._sets)
        return self._summaries[name] | told, usage
