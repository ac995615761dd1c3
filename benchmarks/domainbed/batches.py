"""Which rows a step trains on, and what becomes of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from benchmarks.domainbed.environments import Environment
from benchmarks.domainbed.protocol import class_weights
from benchmarks.domainbed.transforms import Transform, load_pixels, plain
from benchmarks.harness.base.seeds import derive_seed
from benchmarks.harness.models.prefix import STATES, Prefix, PrefixStates

Draw = tuple[int, int, int]


class EnvironmentBatches(Sampler[Draw]):
    """Batches of every training environment, one after the other, ``batch_size`` rows of each in every step.

    Rows are drawn with replacement, as in DomainBed. The draws hang on the seed and nothing else, so that all methods see the
    same rows and a run that goes on sees those that it would have seen.

    Args:
        labels: class numbers of the rows of each environment.
        batch_size: rows of each environment per step.
        steps: how many steps.
        seed: of the draws.
        class_balanced: draw every class of an environment equally often.
    """

    def __init__(
        self, labels: Sequence[Sequence[int]], batch_size: int, steps: int, seed: int, *, class_balanced: bool
    ) -> None:
        self._labels, self._batch_size, self._steps = labels, batch_size, steps
        self._seed, self._class_balanced = seed, class_balanced

    def __len__(self) -> int:
        return self._steps * self._batch_size * len(self._labels)

    def __iter__(self) -> Iterator[Draw]:
        """Number of the draw, of the environment, and of the row in it."""
        rows = torch.stack([self._drawn(env) for env in range(len(self._labels))], dim=1).flatten().tolist()
        for number, row in enumerate(rows):
            yield number, number // self._batch_size % len(self._labels), row

    def _drawn(self, env: int) -> torch.Tensor:
        """``[steps, batch_size]`` rows."""
        random = torch.Generator().manual_seed(derive_seed("order", self._seed, env))
        labels, shape = self._labels[env], (self._steps, self._batch_size)
        if not self._class_balanced:
            return torch.randint(len(labels), shape, generator=random)
        weights = torch.tensor(class_weights(labels), dtype=torch.float64)
        return torch.multinomial(weights, self._steps * self._batch_size, replacement=True, generator=random).view(
            shape
        )


class PrefixedImages:
    """What a frozen prefix makes of some rows of an environment, which are then no longer opened.

    Args:
        prefix: of the model.
        environment: the environment.
        rows: of it, each once.
        size: pixels along each side.
    """

    def __init__(self, prefix: Prefix, environment: Environment, rows: Sequence[int], size: int) -> None:
        transform = plain(size)

        def batch(places: Sequence[int]) -> dict[str, Tensor]:
            return {"pixel_values": torch.stack([load_pixels(environment, rows[i], transform, 0) for i in places])}

        tokens = prefix.output(batch([0])).shape[1]
        self._states = PrefixStates(prefix, _pictures_digest(environment, rows, size), [tokens] * len(rows), batch)
        self._places = {row: place for place, row in enumerate(rows)}
        self._blank = torch.zeros(1).expand(3, size, size)  # of which the model makes nothing

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {"pixel_values": self._blank, STATES: self._states[self._places[row]]}


def _pictures_digest(environment: Environment, rows: Sequence[int], size: int) -> str:
    """Digest of pictures: of files by name, size and time, of others by their content."""
    digest = hashlib.sha256(f"{size}\n".encode())
    for row in rows:
        file = Path(environment.places[row]) if environment.places else None
        if file and file.is_file():
            state = file.stat()
            digest.update(f"{file.resolve()}\t{state.st_size}\t{state.st_mtime_ns}\n".encode())
        else:
            digest.update(np.asarray(environment.open(row)[0]).tobytes())
    return digest.hexdigest()


class TrainingRows(Dataset[dict[str, Any]]):
    """Rows of the training environments' *in* splits, by draw.

    What augmentation does to a picture hangs on the seed and the draw, not on what was drawn before or by which worker.

    Args:
        environments: those that are trained on.
        rows: of each.
        transform: what becomes of a picture.
        seed: of the transform.
        prefixed: what a frozen prefix makes of them, by the name of the environment; empty where none is frozen.
    """

    def __init__(
        self,
        environments: Sequence[Environment],
        rows: Sequence[Sequence[int]],
        transform: Transform,
        seed: int,
        prefixed: Mapping[str, PrefixedImages] | None = None,
    ) -> None:
        self._environments, self._rows, self._transform, self._seed = environments, rows, transform, seed
        self._prefixed = prefixed or {}

    def __len__(self) -> int:
        return sum(map(len, self._rows))

    def __getitem__(self, draw: Draw) -> dict[str, Any]:
        number, env, place = draw
        environment, row = self._environments[env], self._rows[env][place]
        if environment.name in self._prefixed:
            return {**self._prefixed[environment.name][row], "labels": environment.labels[row]}
        pixels = load_pixels(environment, row, self._transform, derive_seed("augment", self._seed, number))
        return {"pixel_values": pixels, "labels": environment.labels[row]}


class EvaluationRows(Dataset[dict[str, Any]]):
    """Rows of one split in its order.

    Args:
        environment: whose they are.
        rows: of it.
        transform: what becomes of a picture.
        prefixed: what a frozen prefix makes of them, by the name of the environment; empty where none is frozen.

    Attributes:
        step: after which they are looked at; a random transform draws anew for a row at every step, as in DomainBed.
    """

    def __init__(
        self,
        environment: Environment,
        rows: Sequence[int],
        transform: Transform,
        prefixed: Mapping[str, PrefixedImages] | None = None,
    ) -> None:
        self._environment, self._rows, self._transform = environment, rows, transform
        self._prefixed = (prefixed or {}).get(environment.name)
        self.step = 0

    @property
    def labels(self) -> list[int]:
        """Class numbers of the rows."""
        return [self._environment.labels[row] for row in self._rows]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, place: int) -> dict[str, Any]:
        row = self._rows[place]
        environment = self._environment
        if self._prefixed is not None:
            return {**self._prefixed[row], "labels": environment.labels[row]}
        pixels = load_pixels(
            environment, row, self._transform, derive_seed("augment", environment.name, row, self.step)
        )
        return {"pixel_values": pixels, "labels": environment.labels[row]}
