"""Transform pictures, and draw the rows of training steps and evaluations."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from torchvision import transforms
from torchvision.transforms.functional import normalize, resize

from benchmarks.domainbed.images import Environment, Picture
from benchmarks.harness.base import derive_seed
from benchmarks.harness.models.prefix import STATES, Prefix, PrefixStates

Transform = Callable[[Picture], Tensor]

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
_NORMAL = (transforms.ToTensor(), transforms.Normalize(MEAN, DEVIATION))


def evaluation_transform(size: int) -> Transform:
    """Return the evaluation transform: resize to ``size`` × ``size`` pixels and normalise."""
    return partial(
        _transform, transforms.Compose([transforms.Resize((size, size)), *_NORMAL]), size
    )


def training_transform(size: int) -> Transform:
    """Return the training transform: random crop, mirror and colour jitter, from torch's global generator.

    As in DomainBed, MNIST's digits are not augmented.
    """
    crop, mirror = (
        transforms.RandomResizedCrop(size, scale=(0.7, 1.0)),
        transforms.RandomHorizontalFlip(),
    )
    colours = [transforms.ColorJitter(0.3, 0.3, 0.3, 0.3), transforms.RandomGrayscale()]
    return partial(_transform, transforms.Compose([crop, mirror, *colours, *_NORMAL]), size)


def _transform(of_images: Callable[[Image.Image], Tensor], size: int, picture: Picture) -> Tensor:
    """Transform an image, or convert a digit to RGB: one channel is repeated, two channels become red and green.

    DomainBed does not convert digits, because its network for digits takes their size and channels.
    """
    if isinstance(picture, Image.Image):
        return of_images(picture)
    channels = (
        picture.repeat(3, 1, 1)
        if len(picture) == 1
        else torch.cat([picture, torch.zeros_like(picture[:1])])
    )
    return normalize(resize(channels, [size, size], antialias=True), list(MEAN), list(DEVIATION))


def load_pixels(environment: Environment, row: int, transform: Transform, seed: int) -> Tensor:
    """Return the transformed pixels of a row; a random transform depends only on the seed."""
    picture = environment.open(row)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return transform(picture)


Draw = tuple[int, int, int]  # numbers of the draw, the environment and the row in it


class EnvironmentBatches(Sampler[Draw]):
    """Draw ``batch_size`` rows of every training environment per step, environment by environment.

    As in DomainBed, rows are drawn with replacement. Draws depend only on the seed, so they are the same for all
    methods and for resumed runs. ``rows`` has the number of rows of each environment.
    """

    def __init__(self, rows: Sequence[int], batch_size: int, steps: int, seed: int) -> None:
        self._rows, self._batch_size, self._steps, self._seed = rows, batch_size, steps, seed

    def __len__(self) -> int:
        return self._steps * self._batch_size * len(self._rows)

    def __iter__(self) -> Iterator[Draw]:
        drawn = []
        for env, count in enumerate(self._rows):
            random = torch.Generator().manual_seed(derive_seed("order", self._seed, env))
            drawn.append(torch.randint(count, (self._steps, self._batch_size), generator=random))
        for number, row in enumerate(torch.stack(drawn, dim=1).flatten().tolist()):
            yield number, number // self._batch_size % len(self._rows), row


@dataclass(frozen=True, kw_only=True)
class PrefixedEnvironment(Environment):
    """Hold the outputs of a model's frozen layers for some rows of an environment.

    Attributes:
        states: The outputs.
        indices: The index in ``states`` of each row.
        blank: The placeholder pixels, which the model ignores.
    """

    states: PrefixStates
    indices: dict[int, int]
    blank: Tensor


def with_prefix(
    environment: Environment, prefix: Prefix, rows: Sequence[int], size: int
) -> PrefixedEnvironment:
    """Compute the outputs of a model's frozen layers for distinct rows, with images of ``size`` pixels."""
    transform, digest = evaluation_transform(size), hashlib.sha256(f"{size}\n".encode())
    for row in rows:
        digest.update(np.asarray(environment.open(row)).tobytes())

    def batch(indices: Sequence[int]) -> dict[str, Tensor]:
        return {
            "pixel_values": torch.stack(
                [load_pixels(environment, rows[i], transform, 0) for i in indices]
            )
        }

    tokens = prefix.output(batch([0])).shape[1]
    states = PrefixStates(prefix, digest.hexdigest(), [tokens] * len(rows), batch)
    indices, blank = (
        {row: index for index, row in enumerate(rows)},
        torch.zeros(1).expand(3, size, size),
    )
    return PrefixedEnvironment(**vars(environment), states=states, indices=indices, blank=blank)


def _example(
    environment: Environment, row: int, transform: Transform, *seed: object
) -> dict[str, Any]:
    """Return a row as model inputs: its label, and pixels or the output of the frozen layers."""
    labels = environment.labels[row]
    if isinstance(environment, PrefixedEnvironment):
        state = environment.states[environment.indices[row]]
        return {"pixel_values": environment.blank, STATES: state, "labels": labels}
    return {
        "pixel_values": load_pixels(environment, row, transform, derive_seed("augment", *seed)),
        "labels": labels,
    }


@dataclass(eq=False)
class TrainingRows(Dataset[dict[str, Any]]):
    """Map draws to rows of the training environments' *in* splits.

    Augmentation depends on the seed and the draw, not on earlier draws or on the worker.
    """

    environments: Sequence[Environment]
    rows: Sequence[Sequence[int]]
    transform: Transform
    seed: int

    def __len__(self) -> int:
        return sum(map(len, self.rows))

    def __getitem__(self, draw: Draw) -> dict[str, Any]:
        number, env, index = draw
        return _example(
            self.environments[env], self.rows[env][index], self.transform, self.seed, number
        )


@dataclass(eq=False)
class EvaluationRows(Dataset[dict[str, Any]]):
    """Hold the rows of one split in order.

    As in DomainBed, random transforms are redrawn for the evaluation after each ``step``.
    """

    environment: Environment
    rows: Sequence[int]
    transform: Transform
    step: int = 0

    @property
    def labels(self) -> list[int]:
        """Return the class numbers of the rows."""
        return [self.environment.labels[row] for row in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        return _example(
            self.environment, row, self.transform, self.environment.name, row, self.step
        )
