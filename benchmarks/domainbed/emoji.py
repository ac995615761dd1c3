"""EmojiStyles: the same emoji in three drawing styles; a set like PACS that can be fetched without asking anybody.

Google's Noto (Apache-2.0), Twitter's Twemoji (CC-BY-4.0), Microsoft's Fluent 3D (MIT). The class is the emoji's category in Unicode.
"""

from __future__ import annotations

import io
import json
import tarfile
from functools import partial
from typing import IO, cast

from PIL import Image

from benchmarks.domainbed.definition import RunSet
from benchmarks.domainbed.environments import Environment, ImageSet
from benchmarks.harness.sources.packages import packaged

# the package of each drawing style
EMOJI_PACKAGES = {
    "google": "emoji-datasource-google",
    "twitter": "emoji-datasource-twitter",
    "fluent": "@lobehub/fluent-emoji-3d",
}
# of the pictures in each package, by their code points
_PATHS = {"google": "img/google/64/{}.png", "twitter": "img/twitter/64/{}.png", "fluent": "assets/{}.webp"}
_NO_CLASS = "Component"  # skin tones and hair, drawn by themselves


def load_emoji(task: RunSet) -> ImageSet:
    """Load all styles, each with the same emoji in the same order; DataError where a package file is missing or damaged."""
    index = json.loads(_read("google", "{}.json")["emoji"])
    named = [(name, str(style)) for name, style in task.environments]
    styles = {style: _read(style, _PATHS[style]) for _, style in named}
    listed = sorted((entry["category"], entry["unified"].lower()) for entry in index if entry["category"] != _NO_CLASS)
    emoji = [(group, code) for group, code in listed if all(code in pictures for pictures in styles.values())]
    classes = sorted({group for group, _ in emoji})
    labels = [classes.index(group) for group, _ in emoji]
    environments = []
    for name, style in named:
        pictures = [styles[style][code] for _, code in emoji]
        places = [f"{packaged(EMOJI_PACKAGES[style]).name}: package/{_PATHS[style].format(code)}" for _, code in emoji]
        environments.append(Environment(name, labels, partial(_open, pictures), places))
    source = ", ".join(f"{name} {packaged(name).version}" for name in EMOJI_PACKAGES.values())
    return ImageSet(environments, classes, source, paired=True)


def _read(style: str, path: str) -> dict[str, bytes]:
    """Read a package's files, by what stands in their path for the braces."""
    before, after = f"package/{path}".split("{}")
    with tarfile.open(packaged(EMOJI_PACKAGES[style]).check()) as archive:
        files = [file for file in archive if file.name.startswith(before) and file.name.endswith(after)]
        return {f.name[len(before) : -len(after)]: cast(IO[bytes], archive.extractfile(f)).read() for f in files}


def _open(pictures: list[bytes], row: int) -> tuple[Image.Image, str]:
    """Open one as RGB on white: all of them have a transparent ground."""
    drawn = Image.open(io.BytesIO(pictures[row])).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", drawn.size, "white"), drawn).convert("RGB"), ""
