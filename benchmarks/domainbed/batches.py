"""Transform images, and choose the rows of training steps and evaluations."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

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

# the mean and the standard deviation of ImageNet's red, green and blue channel
MEAN = (0.485, 0.456, 0.406)
DEVIATION = (0.229, 0.224, 0.225)


def evaluation_transform(size: int) -> Transform:
    """Return the evaluation transform: resize to ``size`` × ``size`` pixels and normalise."""
    transform_image = transforms.Compose(
        [
            transforms.Resize((size, size)),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, DEVIATION),
        ]
    )
    return partial(_transform, transform_image, size)


def training_transform(size: int) -> Transform:
    """Return the training transform: random crop, mirror, colour jitter and greyscale.

    The randomness comes from torch's global generator. As in DomainBed, MNIST's digits are not
    augmented.
    """
    transform_image = transforms.Compose(
        [
            transforms.RandomResizedCrop(size, scale=(0.7, 1.0)),
            transforms.RandomHorizontalFlip(),
            # brightness, contrast, saturation and hue
            transforms.ColorJitter(0.3, 0.3, 0.3, 0.3),
            transforms.RandomGrayscale(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, DEVIATION),
        ]
    )
    return partial(_transform, transform_image, size)


def _transform(
    transform_image: Callable[[Image.Image], Tensor], size: int, picture: Picture
) -> Tensor:
    """Return the normalised pixels ``[3, size, size]`` of an image or of an MNIST digit."""
    if isinstance(picture, Image.Image):
        return transform_image(picture)
    # DomainBed has a network for digits, so it keeps their size and channels; a ViT needs RGB
    resized = resize(_to_rgb(picture), [size, size], antialias=True)
    return normalize(resized, list(MEAN), list(DEVIATION))


def _to_rgb(digit: Tensor) -> Tensor:
    """Convert a digit to RGB: repeat a single channel, or use two channels as red and green."""
    if len(digit) == 1:
        return digit.repeat(3, 1, 1)
    blue = torch.zeros_like(digit[:1])
    return torch.cat([digit, blue])


def load_pixels(environment: Environment, row: int, transform: Transform, seed: int) -> Tensor:
    """Return the transformed pixels of a row. A random transform depends only on ``seed``."""
    picture = environment.open(row)
    # the transforms draw from torch's global generator; leave its state as it was
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return transform(picture)


class Draw(NamedTuple):
    """The place of one image of a training step."""

    number: int
    """The number of the image, counted from 0 over all steps."""
    env: int
    """The number of the environment, among the training environments."""
    row: int
    """The index of the image among the training rows of that environment."""


class EnvironmentBatches(Sampler[Draw]):
    """Draw ``batch_size`` rows of every training environment per step, environment by environment.

    As in DomainBed, rows are drawn with replacement. They depend only on the arguments below, so
    all methods and all resumed runs read the same rows.

    Args:
        row_counts: The number of rows of each training environment.
        batch_size: The number of rows of each environment per step.
        steps: The number of training steps.
        seed: The seed of the draws.
    """

    def __init__(self, row_counts: Sequence[int], batch_size: int, steps: int, seed: int) -> None:
        self._row_counts = row_counts
        self._batch_size = batch_size
        self._steps = steps
        self._seed = seed

    def __len__(self) -> int:
        return self._steps * self._batch_size * len(self._row_counts)

    def __iter__(self) -> Iterator[Draw]:
        # each environment has its own generator, so its rows do not depend on the others
        drawn_by_env = []
        for env, count in enumerate(self._row_counts):
            random = torch.Generator().manual_seed(derive_seed("order", self._seed, env))
            shape = (self._steps, self._batch_size)
            drawn_by_env.append(torch.randint(count, shape, generator=random))
        # [steps, environments, batch size]
        drawn = torch.stack(drawn_by_env, dim=1)
        number = 0
        for step_rows in drawn.tolist():
            for env, env_rows in enumerate(step_rows):
                for row in env_rows:
                    yield Draw(number, env, row)
                    number += 1


@dataclass(frozen=True, kw_only=True)
class PrefixedEnvironment(Environment):
    """An environment that also has the output of a model's frozen layers for some rows.

    A model that gets this output needs no pixels.

    Attributes:
        states: The output ``[tokens, width]`` for each of these rows.
        indices: The index in ``states`` of each of these rows.
        blank: Placeholder pixels ``[3, size, size]``, which the model ignores.
    """

    states: PrefixStates
    indices: dict[int, int]
    blank: Tensor

    def state(self, row: int) -> Tensor:
        """Return the output of the frozen layers for a row."""
        return self.states[self.indices[row]]


def with_prefix(
    environment: Environment, prefix: Prefix, rows: Sequence[int], size: int
) -> PrefixedEnvironment:
    """Run the frozen layers of a model on some images, and add their output to the environment.

    The images are not augmented. If their output was computed before, it is read from a file.

    Args:
        environment: The environment with the images.
        prefix: The frozen layers.
        rows: The indices of the images, each once.
        size: The height and the width of the resized images.

    Returns:
        A new environment with the same images and labels.
    """
    model_inputs = partial(_model_inputs, environment, rows, evaluation_transform(size))
    # all images have the same number of tokens, so count those of the first
    first_output = prefix.output(model_inputs([0]))
    tokens = first_output.shape[1]
    states = PrefixStates(
        prefix,
        rows_digest=_digest_images(environment, rows, size),
        lengths=[tokens] * len(rows),
        make_inputs=model_inputs,
    )
    # expand repeats a single zero without copies, so the placeholder takes no memory
    blank = torch.zeros(1).expand(3, size, size)
    return PrefixedEnvironment(
        name=environment.name,
        labels=environment.labels,
        open=environment.open,
        states=states,
        indices={row: index for index, row in enumerate(rows)},
        blank=blank,
    )


def _model_inputs(
    environment: Environment, rows: Sequence[int], transform: Transform, indices: Sequence[int]
) -> dict[str, Tensor]:
    """Return the pixels of several images as the inputs of a model.

    Args:
        environment: The environment of the images.
        rows: Rows of the environment.
        transform: A transform that is not random.
        indices: The indices in ``rows`` of the images to load.
    """
    # without randomness, the seed has no effect
    pixels = [load_pixels(environment, rows[index], transform, seed=0) for index in indices]
    return {"pixel_values": torch.stack(pixels)}


def _digest_images(environment: Environment, rows: Sequence[int], size: int) -> str:
    """Return the sha256 of ``size`` and of all pixels before they are transformed."""
    digest = hashlib.sha256(f"{size}\n".encode())
    for row in rows:
        pixels = np.asarray(environment.open(row))
        digest.update(pixels.tobytes())
    return digest.hexdigest()


def _example(
    environment: Environment, row: int, transform: Transform, *, seed: int
) -> dict[str, Any]:
    """Return what a model needs for one image: ``pixel_values`` and the class in ``labels``.

    If the model has frozen layers, their output replaces the pixels. ``seed`` determines the result
    of a random transform.
    """
    label = environment.labels[row]
    if isinstance(environment, PrefixedEnvironment):
        # the model takes the output of its frozen layers, and ignores the blank pixels
        frozen_output = environment.state(row)
        return {"pixel_values": environment.blank, STATES: frozen_output, "labels": label}
    pixels = load_pixels(environment, row, transform, seed)
    return {"pixel_values": pixels, "labels": label}


@dataclass(eq=False)
class TrainingRows(Dataset[dict[str, Any]]):
    """The images that train a model. The index of an image is a :class:`Draw`.

    The augmentation of an image depends only on ``seed`` and on :attr:`Draw.number`. Neither
    earlier images nor the number of the data loader's workers has an effect.

    Attributes:
        environments: The training environments.
        rows: The rows of each environment that may be drawn: the *in* split.
        transform: The transform of images.
        seed: The seed of the augmentation.
    """

    environments: Sequence[Environment]
    rows: Sequence[Sequence[int]]
    transform: Transform
    seed: int

    def __len__(self) -> int:
        return sum(len(rows) for rows in self.rows)

    def __getitem__(self, draw: Draw) -> dict[str, Any]:
        environment = self.environments[draw.env]
        drawable_rows = self.rows[draw.env]
        seed = derive_seed("augment", self.seed, draw.number)
        return _example(environment, drawable_rows[draw.row], self.transform, seed=seed)


@dataclass(eq=False)
class EvaluationRows(Dataset[dict[str, Any]]):
    """The rows of one split, in order.

    As in DomainBed, every evaluation draws new random transforms.

    Attributes:
        environment: The environment of the rows.
        rows: The rows of the split.
        transform: The transform of images.
        step: The number of training steps before the evaluation. It seeds random transforms.
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
        environment = self.environment
        row = self.rows[index]
        seed = derive_seed("augment", environment.name, row, self.step)
        return _example(environment, row, self.transform, seed=seed)
