"""Read image files as RGB; damaged ones are errors that name the file."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from benchmarks.harness.base.errors import DataError

REFUSE, LOAD = "refuse", "load"
_SIXTEEN_BITS = ("I;16", "I;16B", "I;16L", "I;16N")
_THIRTY_TWO_BITS = ("I", "F")


def open_image(file: Path | bytes, where: str, *, truncated: str = REFUSE) -> tuple[Image.Image, str]:
    """An image as RGB, and what it was made RGB from (empty for one that is).

    Greyscale becomes three equal channels; CMYK, YCbCr and palettes are converted by Pillow; transparency is dropped, as DomainBed
    drops it; 16 bits a channel become 8 by dropping the lower half (DomainBed would cut all above 255 to white).

    Args:
        file: a path, or a file's content.
        where: what to call it in messages.
        truncated: ``refuse`` a file that ends early, or ``load`` what there is of it, the rest grey, as DomainBed does.

    Raises:
        DataError: no image, a damaged one, or one that ends early.
    """
    try:
        with _truncation(truncated), Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
            image.load()
            if image.mode in _THIRTY_TWO_BITS:
                raise ValueError("32 bits a channel, whose black and white nobody knows; make it 8 or 16")
            if image.mode in _SIXTEEN_BITS:
                eight = (np.asarray(image) >> 8).astype(np.uint8)
                return Image.fromarray(eight).convert("RGB"), image.mode
            return image.convert("RGB"), "" if image.mode == "RGB" else image.mode
    except FileNotFoundError as error:
        raise DataError(f"{where} does not exist") from error
    except UnidentifiedImageError as error:
        raise DataError(f"{where} is no image that can be read") from error
    except Exception as error:  # Pillow's readers raise what their formats' code happens to
        hint = (
            "; to fill what is missing, as DomainBed does, set training.truncated: load"
            if truncated == REFUSE and _is_short(error)
            else ""
        )
        raise DataError(f"{where} cannot be used: {error}{hint}") from error


def _is_short(error: Exception) -> bool:
    return "truncated" in str(error).lower()


@contextmanager
def _truncation(asked: str) -> Iterator[None]:
    """Pillow's setting is one for the whole process."""
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = asked == LOAD
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before
