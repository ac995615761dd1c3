"""EmojiStyles: the same emoji in three drawing styles, from npm packages; a set like PACS that can be fetched without asking anybody.

Google's Noto (Apache-2.0), Twitter's Twemoji (CC-BY-4.0) and Microsoft's Fluent 3D (MIT). The class is the emoji's category in Unicode, the environment
its style.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

from PIL import Image

from benchmarks.domainbed.environments import Environment, ImageSet
from benchmarks.harness.sources.packages import EMOJI, PackageFile

# where each package keeps the picture of an emoji, by its code points
_PATHS = {
    "google": "package/img/google/64/{}.png",
    "twitter": "package/img/twitter/64/{}.png",
    "fluent": "package/assets/{}.webp",
}
_INDEX = "package/emoji.json"
_NO_CLASS = "Component"  # skin tones and hair, drawn by themselves


def load_emoji(task: Mapping[str, Any]) -> ImageSet:
    """The three environments, each with the same emoji in the same order: those that all styles draw.

    Args:
        task: of a spec.

    Raises:
        DataError: a package file is missing or damaged.
    """
    index = json.loads(_read(EMOJI["google"], lambda name: name == _INDEX)[_INDEX])
    listed = sorted((entry["category"], entry["unified"].lower()) for entry in index if entry["category"] != _NO_CLASS)
    pictures = {style: _pictures(style) for _, style in task["environments"]}
    emoji = [(group, code) for group, code in listed if all(code in found for found in pictures.values())]
    classes = sorted({group for group, _ in emoji})
    labels = [classes.index(group) for group, _ in emoji]
    environments = [
        Environment(
            name,
            labels,
            partial(_open, [pictures[style][code] for _, code in emoji]),
            [f"{EMOJI[style].name}: {_PATHS[style].format(code)}" for _, code in emoji],
        )
        for name, style in task["environments"]
    ]
    return ImageSet(
        environments, classes, ", ".join(f"{file.package} {file.version}" for file in EMOJI.values()), paired=True
    )


@cache
def _pictures(style: str) -> dict[str, bytes]:
    """Files by code points."""
    before, after = _PATHS[style].split("{}")
    found = _read(EMOJI[style], lambda name: name.startswith(before) and name.endswith(after))
    return {name.removeprefix(before).removesuffix(after): content for name, content in found.items()}


def _read(package: PackageFile, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    found = {}
    with tarfile.open(package.check()) as archive:
        for member in archive:
            if member.isfile() and wanted(member.name):
                file = archive.extractfile(member)
                found[member.name] = b"" if file is None else file.read()
    return found


def _open(files: list[bytes], row: int) -> tuple[Image.Image, str]:
    """The picture as RGB on white: all of them have a transparent ground."""
    with Image.open(io.BytesIO(files[row])) as image:
        drawn = image.convert("RGBA")
    ground = Image.new("RGBA", drawn.size, "white")
    return Image.alpha_composite(ground, drawn).convert("RGB"), ""
