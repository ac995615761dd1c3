"""Image sets of several environments: on disk in DomainBed's layout, or on the hub."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError
from torchvision.datasets.folder import IMG_EXTENSIONS

from benchmarks.domainbed.definition import RunSet
from benchmarks.harness.base import DataError
from benchmarks.harness.sources.hub import commit_of, hub_name
from benchmarks.harness.sources.local import local_folder, wanted_place
from emoe.errors import did_you_mean

if TYPE_CHECKING:
    from torch import Tensor


Picture = Union[Image.Image, "Tensor"]


@dataclass(frozen=True)
class Environment:
    """Describe one environment.

    Attributes:
        name: DomainBed's short name.
        labels: The class number of every row.
        open: A function that gives the picture of a row (an RGB image, or of MNIST a tensor ``[channels, 28, 28]`` in
            [0, 1]) and the mode that it was converted from.
        places: The names of the rows in messages; empty for rows that are made, not read.
        ignored: The number of files that are not read, by their ending.
    """

    name: str
    labels: list[int]
    open: Callable[[int], tuple[Picture, str]]
    places: list[str] = field(default_factory=list)
    ignored: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.labels)

    def summary(self, rows: Iterable[int], classes: list[str]) -> dict[str, Any]:
        """Count rows and their classes, as ``metrics.json`` keeps them."""
        counts = Counter(self.labels[row] for row in rows)
        return {"rows": counts.total(), "dropped": 0, "labels": {name: counts[i] for i, name in enumerate(classes)}}


@dataclass(frozen=True)
class ImageSet:
    """Hold all environments of a set, in DomainBed's order.

    Attributes:
        environments: The environments.
        classes: The names of the classes in the order of their numbers.
        source: The origin of the images.
    """

    environments: list[Environment]
    classes: list[str]
    source: str


REFUSE, LOAD = "refuse", "load"
_SIXTEEN_BITS = ("I;16", "I;16B", "I;16L", "I;16N")
_THIRTY_TWO_BITS = ("I", "F")


def open_image(file: Path | bytes, where: str, *, truncated: str = REFUSE) -> tuple[Image.Image, str]:
    """Open an image as RGB, and name the mode that it was converted from (empty for RGB).

    Greyscale becomes three equal channels; CMYK, YCbCr and palettes are converted by Pillow; transparency is dropped,
    as DomainBed
    drops it; 16 bits a channel become 8 by dropping the lower half (DomainBed would cut all above 255 to white).

    Args:
        file: The path, or the content of a file.
        where: The name of the image in messages.
        truncated: ``refuse`` to reject a file that ends early, ``load`` to fill the rest with grey, as DomainBed does.

    Raises:
        DataError: The file is no image, is damaged, or ends early.
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
    """Set Pillow's option, which holds for the whole process, and restore it."""
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = asked == LOAD
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


_COLUMNS = ("image", "domain", "label")


def load_folders(task: RunSet, *, truncated: str = REFUSE) -> ImageSet:
    """Load the environments of a set from its folder below the data root (variable ``EMOE_DATA_ROOT``), else from the
    hub.

    Args:
        task: The set.
        truncated: See :func:`open_image`.

    Raises:
        DataError: A folder is missing or empty, or classes differ between environments.
    """
    if folder := local_folder(task.name, task.source.model_dump()):
        return _from_disk(task, folder, truncated)
    if task.source.hub:
        return _from_hub(task, truncated)
    raise DataError(
        f"{wanted_place(task.source.model_dump())} does not exist; it must hold <environment>/<class>/<image>, as "
        "DomainBed's download makes it"
    )


def _from_disk(task: RunSet, root: Path, truncated: str) -> ImageSet:
    folders = _environment_order(_folders(root), task, str(root))
    environments: list[Environment] = []
    classes: list[str] = []
    first = root / folders[0]
    for (name, _), folder in zip(task.environments, folders, strict=True):
        here = root / folder
        names_here = _folders(here)
        if not names_here:
            raise DataError(f"{here} has no class folder")
        if classes and names_here != classes:
            odd, *others = sorted(set(names_here) ^ set(classes))
            has, lacks = (here, first) if odd in names_here else (first, here)
            raise DataError(
                f"classes differ between environments: {has} has '{odd}', {lacks} does not{did_you_mean(odd, others)}"
            )
        classes = names_here
        ignored = Counter(f"{_ending(path)} in no class" for path in _visible(here) if path.is_file())
        paths: list[str] = []
        labels: list[int] = []
        for label, class_name in enumerate(classes):
            images = _images(here / class_name, ignored)
            paths += images
            labels += [label] * len(images)
        environments.append(
            Environment(name, labels, partial(_open_file, paths, truncated), paths, dict(sorted(ignored.items())))
        )
    return ImageSet(environments, classes, str(root))


def _environment_order(present: list[str], task: RunSet, where: str) -> list[str]:
    """Return the names of the environments on disk or on the hub, in DomainBed's order.

    Quite other names are taken by their order, as DomainBed takes all folders; where some are known, the rest must be
    too.
    """
    wanted = {name: str(called) for name, called in task.environments}
    names = {plain_name(name): name for name in present}
    missing = [called for called in wanted.values() if plain_name(called) not in names]
    extra = [name for plain, name in names.items() if plain not in map(plain_name, wanted.values())]
    twice = sorted(set(present) - set(names.values()))
    if not (missing or extra or twice):
        return [names[plain_name(called)] for called in wanted.values()]
    if len(missing) == len(extra) == len(wanted) and not twice:
        return sorted(extra)
    expected = ", ".join(f"{called} ({name})" for name, called in wanted.items())
    wrong = [f"lacks the environment {missing[0]}{did_you_mean(missing[0], extra) if extra else ''}"] if missing else []
    wrong += [f"has {', '.join(extra)}, which is no environment"] if extra else []
    wrong += [f"has {twice[0]} beside {names[plain_name(twice[0])]}"] if twice else []
    raise DataError(f"{where} {' and '.join(wrong)}; it must have {expected}, and no other")


def plain_name(name: str) -> str:
    """Return a name without case, spaces and signs."""
    return re.sub(r"[\W_]", "", name).casefold()


def _visible(folder: Path) -> list[Path]:
    """Return what a folder holds in order, without hidden names such as ``.ipynb_checkpoints`` and macOS's
    ``._000.jpg``.
    """
    try:
        paths = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error.strerror}") from error
    for path in paths:
        if not path.exists():  # a class would be lost without a word
            raise DataError(f"{path} is a link to nothing")
    return paths


def _folders(here: Path) -> list[str]:
    return [path.name for path in _visible(here) if path.is_dir()]


def _images(folder: Path, ignored: Counter[str]) -> list[str]:
    """List the image files in and below a folder in torchvision's order, and count other files by their ending.

    Raises:
        DataError: No image is there, or a folder in it is a link.
    """
    images, folders = [], [folder]
    for current in folders:
        for path in _visible(current):
            if path.is_dir():
                if path.is_symlink():
                    raise DataError(f"{path} is a link to a folder; put a copy in its place")
                folders.append(path)
            elif path.name.lower().endswith(IMG_EXTENSIONS):
                images.append(path)
            else:
                ignored[_ending(path)] += 1
    if not images:
        raise DataError(f"{folder} has no image ({', '.join(IMG_EXTENSIONS)})")
    return [str(path) for path in sorted(images, key=lambda path: (str(path.parent), path.name))]


def _ending(path: Path) -> str:
    return path.suffix.lower() or path.name


def _open_file(paths: list[str], truncated: str, row: int) -> tuple[Image.Image, str]:
    return open_image(Path(paths[row]), paths[row], truncated=truncated)


def _from_hub(task: RunSet, truncated: str) -> ImageSet:
    """Load every row of the hub's set by environment and class; within a class in the hub's order, which is not that of
    file names.
    """
    import datasets

    where = str(task.source.hub)
    try:
        parts = datasets.load_dataset(where, revision=task.source.revision)
    except (OSError, ValueError, datasets.exceptions.DatasetNotFoundError) as error:
        raise DataError(
            f"could not load the set '{where}' from the hub: {error}\n"
            f"Without it, put {task.source.folder}/<environment>/<class>/<image> below data_root (see config/README.md)"
        ) from error
    rows = datasets.concatenate_datasets(list(parts.values()))
    read = hub_name(where, task.source.revision, commit_of(parts))
    for column in _COLUMNS:
        if column not in rows.column_names:
            raise DataError(f"{where} has no column '{column}'{did_you_mean(column, rows.column_names)}")
    labels, domains = (_names(rows, column, where) for column in ("label", "domain"))
    classes, present = sorted(set(labels)), _environment_order(sorted(set(domains)), task, where)
    images = rows.cast_column("image", datasets.Image(decode=False))
    environments = []
    for (name, _), domain in zip(task.environments, present, strict=True):
        chosen = sorted(
            (i for i, name_of_row in enumerate(domains) if name_of_row == domain), key=lambda i: (labels[i], i)
        )
        absent = sorted(set(classes) - {labels[i] for i in chosen})
        if absent:
            raise DataError(f"{where}: the domain '{domain}' has no image of the class '{absent[0]}'")
        numbers = [classes.index(labels[i]) for i in chosen]
        places = [f"{where}, row {i + 1}" for i in chosen]
        environments.append(Environment(name, numbers, partial(_open_row, images, chosen, places, truncated), places))
    return ImageSet(environments, classes, f"hub {read}")


def _names(rows: Any, column: str, where: str) -> list[str]:
    """Return a column of the hub's set, with the names of classes.

    Raises:
        DataError: A row has no value.
    """
    names = getattr(rows.features[column], "names", None)
    values = []
    for number, value in enumerate(rows[column], start=1):
        if value in (None, "", -1) or value != value or (names and value >= len(names)):
            raise DataError(f"{where}, row {number}: '{column}' is {value!r}, which names none")
        values.append(str(names[value] if names else value))
    return values


def _open_row(rows: Any, chosen: list[int], places: list[str], truncated: str, row: int) -> tuple[Image.Image, str]:
    content = rows[chosen[row]]["image"]
    if content is None:
        raise DataError(f"{places[row]} has no image")
    file = content["bytes"] if content["bytes"] is not None else Path(content["path"])
    return open_image(file, places[row], truncated=truncated)
