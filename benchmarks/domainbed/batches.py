"""Transforms of pictures, which rows a step trains on, and which are evaluated."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
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


def plain(size: int) -> Transform:
    """Make the transform of test environments: both sides resized to ``size``, normalised."""
    return partial(_see, transforms.Compose([transforms.Resize((size, size)), *_NORMAL]), size)


def augmented(size: int) -> Transform:
    """Make the transform of training environments: a random crop, mirror, colour jitter.

    MNIST's digits stay as they are, as in DomainBed. Draws from torch's global generator.
    """
    crop, mirror = transforms.RandomResizedCrop(size, scale=(0.7, 1.0)), transforms.RandomHorizontalFlip()
    colours = [transforms.ColorJitter(0.3, 0.3, 0.3, 0.3), transforms.RandomGrayscale()]
    return partial(_see, transforms.Compose([crop, mirror, *colours, *_NORMAL]), size)


def _see(image: Callable[[Image.Image], Tensor], size: int, picture: Picture) -> Tensor:
    return _digit(picture, size) if isinstance(picture, Tensor) else image(picture)


def _digit(pixels: Tensor, size: int) -> Tensor:
    """Prepare a digit for a model of colour images: one channel three times, or two as red and green.

    DomainBed gives its digits to a small network of their own size and channels, so this step is ours.
    """
    channels = pixels.repeat(3, 1, 1) if len(pixels) == 1 else torch.cat([pixels, torch.zeros_like(pixels[:1])])
    return normalize(resize(channels, [size, size], antialias=True), list(MEAN), list(DEVIATION))


def load_pixels(environment: Environment, row: int, transform: Transform, seed: int) -> Tensor:
    """Read a row of an environment as a model sees it; a random transform depends on the seed alone."""
    picture, _ = environment.open(row)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return transform(picture)


def visible(pixels: Tensor) -> Tensor:
    """Turn the output of a transform into an image ``[3, height, width]`` of bytes."""
    mean, deviation = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(DEVIATION).view(3, 1, 1)
    return ((pixels * deviation + mean).clamp(0, 1) * 255).round().to(torch.uint8)


Draw = tuple[int, int, int]


class EnvironmentBatches(Sampler[Draw]):
    """Draw batches of every training environment, one after the other, ``batch_size`` rows of each in every step.

    Rows are drawn with replacement, as in DomainBed. The draws depend on the seed alone, so all methods see the
    same rows, and a resumed run sees the rows of an uninterrupted one.

    Args:
        rows: The number of rows of each environment.
        batch_size: The rows of each environment per step.
        steps: The number of steps.
        seed: The seed of the draws.
    """

    def __init__(self, rows: Sequence[int], batch_size: int, steps: int, seed: int) -> None:
        self._rows, self._batch_size, self._steps, self._seed = rows, batch_size, steps, seed

    def __len__(self) -> int:
        return self._steps * self._batch_size * len(self._rows)

    def __iter__(self) -> Iterator[Draw]:
        """Yield the number of the draw, of the environment, and of the row in it."""
        rows = torch.stack([self._drawn(env) for env in range(len(self._rows))], dim=1).flatten().tolist()
        for number, row in enumerate(rows):
            yield number, number // self._batch_size % len(self._rows), row

    def _drawn(self, env: int) -> torch.Tensor:
        """Draw ``[steps, batch_size]`` rows of an environment."""
        random = torch.Generator().manual_seed(derive_seed("order", self._seed, env))
        return torch.randint(self._rows[env], (self._steps, self._batch_size), generator=random)


class PrefixedImages:
    """Hold the outputs of a frozen prefix for some rows of an environment, whose images are then no longer opened.

    Args:
        prefix: The frozen prefix of the model.
        environment: The environment.
        rows: The rows, each once.
        size: The pixels along each side.
    """

    def __init__(self, prefix: Prefix, environment: Environment, rows: Sequence[int], size: int) -> None:
        transform = plain(size)

        def batch(indices: Sequence[int]) -> dict[str, Tensor]:
            return {"pixel_values": torch.stack([load_pixels(environment, rows[i], transform, 0) for i in indices])}

        tokens = prefix.output(batch([0])).shape[1]
        self._states = PrefixStates(prefix, _pictures_digest(environment, rows, size), [tokens] * len(rows), batch)
        self._indices = {row: index for index, row in enumerate(rows)}
        self._blank = torch.zeros(1).expand(3, size, size)  # the model ignores it

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {"pixel_values": self._blank, STATES: self._states[self._indices[row]]}


def _pictures_digest(environment: Environment, rows: Sequence[int], size: int) -> str:
    """Hash pictures: files by name, size and time, others by their content."""
    digest = hashlib.sha256(f"{size}\n".encode())
    for row in rows:
        file = Path(environment.places[row]) if environment.places else None
        if file and file.is_file():
            state = file.stat()
            digest.update(f"{file.resolve()}\t{state.st_size}\t{state.st_mtime_ns}\n".encode())
        else:
            digest.update(np.asarray(environment.open(row)[0]).tobytes())
    return digest.hexdigest()


Prefixed = Mapping[str, PrefixedImages]  # by the name of the environment; empty if no layer is frozen


def _example(
    environment: Environment, row: int, transform: Transform, prefixed: Prefixed, *seed: object
) -> dict[str, Any]:
    """Return a row for the training loop: its label, and pixels or the output of the frozen layers."""
    if environment.name in prefixed:
        inputs = prefixed[environment.name][row]
    else:
        inputs = {"pixel_values": load_pixels(environment, row, transform, derive_seed("augment", *seed))}
    return {**inputs, "labels": environment.labels[row]}


class TrainingRows(Dataset[dict[str, Any]]):
    """Hold the rows of the training environments' *in* splits, by draw.

    Augmentation depends on the seed and the draw, not on earlier draws or on the worker.

    Args:
        environments: The training environments.
        rows: The rows of each.
        transform: The transform of pictures.
        seed: The seed of the transform.
        prefixed: The outputs of a frozen prefix.
    """

    def __init__(
        self,
        environments: Sequence[Environment],
        rows: Sequence[Sequence[int]],
        transform: Transform,
        seed: int,
        prefixed: Prefixed,
    ) -> None:
        self._environments, self._rows, self._transform = environments, rows, transform
        self._seed, self._prefixed = seed, prefixed

    def __len__(self) -> int:
        return sum(map(len, self._rows))

    def __getitem__(self, draw: Draw) -> dict[str, Any]:
        number, env, index = draw
        row = self._rows[env][index]
        return _example(self._environments[env], row, self._transform, self._prefixed, self._seed, number)


class EvaluationRows(Dataset[dict[str, Any]]):
    """Hold the rows of one split in its order.

    Args:
        environment: The environment.
        rows: The rows of the split.
        transform: The transform of pictures.
        prefixed: The outputs of a frozen prefix.

    Attributes:
        step: The step after which they are evaluated; a random transform draws anew at every step, as in DomainBed.
        labels: The class numbers of the rows.
    """

    def __init__(self, environment: Environment, rows: Sequence[int], transform: Transform, prefixed: Prefixed) -> None:
        self._environment, self._rows, self._transform, self._prefixed = environment, rows, transform, prefixed
        self.step = 0
        self.labels = [environment.labels[row] for row in rows]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        environment, row = self._environment, self._rows[index]
        return _example(environment, row, self._transform, self._prefixed, environment.name, row, self.step)
