"""From a picture to what a model sees, by DomainBed's transforms."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms
from torchvision.transforms.functional import normalize, resize

from benchmarks.domainbed.environments import Environment, Picture

Transform = Callable[[Picture], Tensor]

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's


def plain(size: int) -> Transform:
    """Both sides resized to ``size``, normalised; what test environments always get."""
    image = transforms.Compose(
        [transforms.Resize((size, size)), transforms.ToTensor(), transforms.Normalize(MEAN, DEVIATION)]
    )
    return partial(_see, image, size)


def augmented(size: int) -> Transform:
    """A random crop, perhaps mirrored, with jittered colours or none; MNIST's digits stay as they are, as in DomainBed.

    Draws from torch's global generator.
    """
    image = transforms.Compose(
        [
            transforms.RandomResizedCrop(size, scale=(0.7, 1.0)),
            transforms.RandomHorizontalFlip(),
            transforms.ColorJitter(0.3, 0.3, 0.3, 0.3),
            transforms.RandomGrayscale(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, DEVIATION),
        ]
    )
    return partial(_see, image, size)


def _see(image: Callable[[Image.Image], Tensor], size: int, picture: Picture) -> Tensor:
    return _digit(picture, size) if isinstance(picture, Tensor) else image(picture)


def _digit(pixels: Tensor, size: int) -> Tensor:
    """A digit for a model of colour images: one channel three times, or two channels as red and green; resized, normalised.

    DomainBed gives its digits to a small network of their own size and channels, so this step is ours.
    """
    channels = pixels.repeat(3, 1, 1) if len(pixels) == 1 else torch.cat([pixels, torch.zeros_like(pixels[:1])])
    return normalize(resize(channels, [size, size], antialias=True), list(MEAN), list(DEVIATION))


def load_pixels(environment: Environment, row: int, transform: Transform, seed: int) -> Tensor:
    """A row of an environment as a model sees it; what a random transform draws hangs on the seed alone."""
    picture, _ = environment.open(row)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return transform(picture)


def visible(pixels: Tensor) -> Tensor:
    """What a transform made, back as an image ``[3, height, width]`` of bytes."""
    mean, deviation = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(DEVIATION).view(3, 1, 1)
    return ((pixels * deviation + mean).clamp(0, 1) * 255).round().to(torch.uint8)
