"""Image sets of several environments: on disk in DomainBed's layout, or on the hub."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image, ImageFile
from torch import Tensor
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from benchmarks.domainbed.definition import RunImageSet
from benchmarks.harness.base import DataError
from benchmarks.harness.sources.hub import commit_of, hub_name
from benchmarks.harness.sources.local import expected_path, local_path

Picture = Image.Image | Tensor


@dataclass(frozen=True)
class Environment:
    """Describe one environment.

    Attributes:
        name: DomainBed's short name.
        labels: The class number of every row.
        open: The function that returns the picture of a row: an RGB image, or for MNIST a tensor
            ``[channels, 28, 28]`` in [0, 1].
    """

    name: str
    labels: list[int]
    open: Callable[[int], Picture]

    def __len__(self) -> int:
        return len(self.labels)

    def summary(self, classes: list[str], rows: Iterable[int] | None = None) -> dict[str, Any]:
        """Return the counts of rows (None for all) and of their classes, for ``metrics.json``."""
        counts = Counter(self.labels if rows is None else (self.labels[row] for row in rows))
        return {
            "rows": counts.total(),
            "dropped": 0,
            "labels": {name: counts[i] for i, name in enumerate(classes)},
        }


@dataclass(frozen=True)
class ImageSet:
    """Hold all environments of a set in DomainBed's order, the names of its classes, and the origin of the images."""

    environments: list[Environment]
    classes: list[str]
    source: str


def open_image(file: Path | bytes, where: str, truncated: str) -> Image.Image:
    """Open an image as RGB without transparency, as in DomainBed.

    Args:
        file: The path, or the content of a file.
        where: The name of the image in messages.
        truncated: ``refuse`` to reject a file that ends early, ``load`` to fill the rest with grey, as DomainBed does.

    Raises:
        DataError: The file is not an image, is damaged, ends early, or has more than 8 bits per channel.
    """
    ImageFile.LOAD_TRUNCATED_IMAGES = truncated == "load"  # a global setting of Pillow
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError("it has 16 or 32 bits per channel; convert it to 8")
            return image.convert("RGB")
    except Exception as error:  # Pillow's readers raise many types
        is_short = "truncated" in str(error).lower()
        hint = (
            "; to fill what is missing, as DomainBed does, set training.truncated: load"
            if is_short
            else ""
        )
        raise DataError(f"{where} cannot be used: {error}{hint}") from error


def load_folders(task: RunImageSet, truncated: str) -> ImageSet:
    """Load the environments of a set from its folder below the data root (``EMOE_DATA_ROOT``), else from the hub.

    Raises:
        DataError: A folder is missing or empty, or classes differ between environments.
    """
    if folder := local_path(task.name, task.source.model_dump()):
        return _from_disk(task, folder, truncated)
    if task.source.hub:
        return _from_hub(task, truncated)
    raise DataError(
        f"{expected_path(task.source.model_dump())} does not exist; it must hold <environment>/<class>/<image>, as "
        "DomainBed's download makes it"
    )


def _from_disk(task: RunImageSet, root: Path, truncated: str) -> ImageSet:
    folders = [root / name for name in _environment_order(_folders(root), task, str(root))]
    classes = _folders(folders[0])
    numbers = {class_name: number for number, class_name in enumerate(classes)}
    environments = []
    for (name, _), folder in zip(task.environments, folders, strict=True):
        if odd := sorted(set(_folders(folder)) ^ set(classes)):
            raise DataError(
                f"classes differ between environments: '{odd[0]}' is only in one of {folders[0]}, {folder}"
            )
        try:
            rows = ImageFolder.make_dataset(str(folder), numbers, is_valid_file=_is_image)
        except FileNotFoundError as error:  # a class without images
            raise DataError(f"{folder}: {error}; images are {', '.join(IMG_EXTENSIONS)}") from error
        paths = [path for path, _ in rows]
        labels = [label for _, label in rows]
        environments.append(Environment(name, labels, partial(_open_file, paths, truncated)))
    return ImageSet(environments, classes, str(root))


def _environment_order(present: list[str], task: RunImageSet, where: str) -> list[str]:
    """Sort the names of environments on disk or on the hub in DomainBed's order, see :func:`normalize_name`."""
    names = {normalize_name(name): name for name in present}
    wanted = [normalize_name(str(title)) for _, title in task.environments]
    if len(present) != len(wanted) or set(names) != set(wanted):
        expected = ", ".join(f"{title} ({name})" for name, title in task.environments)
        raise DataError(
            f"{where} has the environments {', '.join(present)}; it must have {expected}, and no other"
        )
    return [names[name] for name in wanted]


def normalize_name(name: str) -> str:
    """Keep a name's letters and digits; fold case."""
    return re.sub(r"[\W_]", "", name).casefold()


def _is_image(path: str) -> bool:
    """Return True for an image file that is not hidden, like ``.ipynb_checkpoints/…`` or macOS's ``._000.jpg``."""
    is_hidden = any(name.startswith(".") for name in Path(path).parts[-2:])
    return path.lower().endswith(IMG_EXTENSIONS) and not is_hidden


def _folders(here: Path) -> list[str]:
    return sorted(
        path.name for path in here.iterdir() if path.is_dir() and not path.name.startswith(".")
    )


def _open_file(paths: list[str], truncated: str, row: int) -> Image.Image:
    return open_image(Path(paths[row]), paths[row], truncated)


def _from_hub(task: RunImageSet, truncated: str) -> ImageSet:
    """Load the hub's set, sorted by environment and class, and within a class in the hub's order."""
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
    if missing := {"domain", "image", "label"} - set(rows.column_names):
        raise DataError(f"{where} has no column '{min(missing)}'")
    labels, domains = (_column_names(rows, column) for column in ("label", "domain"))
    classes, present = sorted(set(labels)), _environment_order(sorted(set(domains)), task, where)
    images = rows.cast_column("image", datasets.Image(decode=False))
    environments = []
    for (name, _), domain in zip(task.environments, present, strict=True):
        chosen = sorted(
            (i for i in range(len(rows)) if domains[i] == domain), key=lambda i: (labels[i], i)
        )
        if absent := sorted(set(classes) - {labels[i] for i in chosen}):
            raise DataError(
                f"{where}: the domain '{domain}' has no image of the class '{absent[0]}'"
            )
        numbers = [classes.index(labels[i]) for i in chosen]
        environments.append(
            Environment(name, numbers, partial(_open_row, images, chosen, where, truncated))
        )
    return ImageSet(
        environments, classes, f"hub {hub_name(where, task.source.revision, commit_of(parts))}"
    )


def _column_names(rows: Any, column: str) -> list[str]:
    """Return a column of the hub's set as names, not class numbers."""
    names = getattr(rows.features[column], "names", None)
    return [str(names[value] if names else value) for value in rows[column]]


def _open_row(rows: Any, chosen: list[int], where: str, truncated: str, row: int) -> Image.Image:
    """Open the image of a chosen row of the hub's set."""
    content = rows[chosen[row]]["image"]
    file = content["bytes"] if content["bytes"] is not None else Path(content["path"])
    return open_image(file, f"{where}, row {chosen[row] + 1}", truncated)
