"""Which rows a step trains on, and what becomes of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler

from benchmarks.domainbed.environments import Environment
from benchmarks.domainbed.protocol import class_weights
from benchmarks.domainbed.transforms import Transform, load_pixels
from benchmarks.harness.base.seeds import derive_seed

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


class TrainingRows(Dataset[dict[str, Any]]):
    """Rows of the training environments' *in* splits, by draw.

    What augmentation does to a picture hangs on the seed and the draw, not on what was drawn before or by which worker.
    """

    def __init__(
        self, environments: Sequence[Environment], rows: Sequence[Sequence[int]], transform: Transform, seed: int
    ) -> None:
        self._environments, self._rows, self._transform, self._seed = environments, rows, transform, seed

    def __len__(self) -> int:
        return sum(map(len, self._rows))

    def __getitem__(self, draw: Draw) -> dict[str, Any]:
        number, env, place = draw
        environment, row = self._environments[env], self._rows[env][place]
        pixels = load_pixels(environment, row, self._transform, derive_seed("augment", self._seed, number))
        return {"pixel_values": pixels, "labels": environment.labels[row]}


class EvaluationRows(Dataset[dict[str, Any]]):
    """Rows of one split in its order.

    Attributes:
        step: after which they are looked at; a random transform draws anew for a row at every step, as in DomainBed.
    """

    def __init__(self, environment: Environment, rows: Sequence[int], transform: Transform) -> None:
        self._environment, self._rows, self._transform = environment, rows, transform
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
        pixels = load_pixels(
            environment, row, self._transform, derive_seed("augment", environment.name, row, self.step)
        )
        return {"pixel_values": pixels, "labels": environment.labels[row]}
