"""Image sets of several environments: on disk in DomainBed's layout, or on the hub."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
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
    """The images of one environment.

    Attributes:
        name: DomainBed's short name.
        labels: The class number of every row.
        open: The function that returns the image of a row: an RGB image, or for MNIST a tensor
            ``[channels, 28, 28]`` in [0, 1].
        files: The path of every row's image; empty if the images are not from a folder.
    """

    name: str
    labels: list[int]
    open: Callable[[int], Picture]
    files: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def summary(self, classes: list[str], rows: Iterable[int] | None = None) -> dict[str, Any]:
        """Count the images of some rows, for ``metrics.json``.

        Args:
            classes: The names of the classes.
            rows: The rows; None for all.

        Returns:
            - ``rows``: the number of images.
            - ``dropped``: always 0, because no image is left out.
            - ``labels``: the number of images of each class, by its name.
        """
        labels = self.labels
        if rows is not None:
            labels = [self.labels[row] for row in rows]
        counts = Counter(labels)
        counts_by_name = {name: counts[label] for label, name in enumerate(classes)}
        return {"rows": len(labels), "dropped": 0, "labels": counts_by_name}


@dataclass(frozen=True)
class ImageSet:
    """All images of a set.

    Attributes:
        environments: The environments, in DomainBed's order.
        classes: The names of the classes, in the order of their numbers.
        source: The origin of the images.
    """

    environments: list[Environment]
    classes: list[str]
    source: str

    @property
    def num_images(self) -> int:
        """Return the number of images of all environments."""
        return sum(len(environment) for environment in self.environments)


def open_image(file: Path | bytes, where: str, truncated: str) -> Image.Image:
    """Open an image as RGB without transparency, as in DomainBed.

    Args:
        file: The path, or the content of a file.
        where: The name of the image in messages.
        truncated: ``refuse`` to reject a file that ends early, ``load`` to fill the rest with grey,
            as DomainBed does.

    Raises:
        DataError: The file is not an image, is damaged, ends early, or has more than 8 bits per
            channel.
    """
    # this setting of Pillow is global, so it is set again before every image
    ImageFile.LOAD_TRUNCATED_IMAGES = truncated == "load"
    path_or_stream = io.BytesIO(file) if isinstance(file, bytes) else file
    try:
        with Image.open(path_or_stream) as image:
            # Pillow's modes of integers and floats, such as "I;16" and "F"
            if image.mode.startswith(("I", "F")):
                raise ValueError("it has 16 or 32 bits per channel; convert it to 8")
            return image.convert("RGB")
    except Exception as error:  # Pillow's readers raise many types
        hint = ""
        if "truncated" in str(error).lower():
            hint = "; to fill what is missing, as DomainBed does, set training.truncated: load"
        raise DataError(f"{where} cannot be used: {error}{hint}") from error


def load_folders(task: RunImageSet, truncated: str) -> ImageSet:
    """Load a set from its folder below the data root (``EMOE_DATA_ROOT``).

    Without the folder, the set is loaded from the hub if it is there.

    Args:
        task: The set.
        truncated: ``refuse`` to reject a file that ends early, ``load`` to fill the rest with grey.
            Files are opened later.

    Raises:
        DataError: The set is missing or cannot be downloaded, a folder is empty, or classes differ
            between environments.
    """
    source = task.source.model_dump()
    folder = local_path(task.name, source)
    if folder:
        return _from_disk(task, folder, truncated)
    if task.source.hub:
        return _from_hub(task, truncated)
    raise DataError(
        f"{expected_path(source)} does not exist; it must hold <environment>/<class>/<image>, as "
        "DomainBed's download makes it"
    )


def _from_disk(task: RunImageSet, root: Path, truncated: str) -> ImageSet:
    """List the images of a set in ``<environment>/<class>/<image>`` below the folder ``root``.

    The other arguments are those of :func:`load_folders`.
    """
    names_on_disk = _folders(root)
    ordered_names = _in_domainbeds_order(names_on_disk, task, str(root))
    folders = [root / name for name in ordered_names]
    # all environments must have the classes of the first
    classes = _folders(folders[0])
    environments = []
    for (name, _), folder in zip(task.environments, folders, strict=True):
        # the classes that only this environment has, or only the first one
        unshared = set(_folders(folder)).symmetric_difference(classes)
        if unshared:
            raise DataError(
                f"classes differ between environments: '{min(unshared)}' is only in one of "
                f"{folders[0]}, {folder}"
            )
        environments.append(_environment_from_disk(name, folder, classes, truncated))
    return ImageSet(environments, classes, str(root))


def _environment_from_disk(
    name: str, folder: Path, classes: list[str], truncated: str
) -> Environment:
    """List the images of one environment in ``<class>/<image>`` below ``folder``.

    Args:
        name: DomainBed's name of the environment.
        folder: The folder of the environment.
        classes: The names of the classes, in the order of their numbers.
        truncated: ``refuse`` to reject a file that ends early, ``load`` to fill the rest with grey.
            Files are opened later.

    Raises:
        DataError: A class has no image.
    """
    class_numbers = {class_name: number for number, class_name in enumerate(classes)}
    try:
        # torchvision's order of images, which is DomainBed's
        images = ImageFolder.make_dataset(str(folder), class_numbers, is_valid_file=_is_image)
    except FileNotFoundError as error:  # a class without images
        raise DataError(f"{folder}: {error}; images are {', '.join(IMG_EXTENSIONS)}") from error
    paths = [path for path, _ in images]
    labels = [label for _, label in images]
    return Environment(name, labels, open=partial(_open_file, paths, truncated), files=paths)


def _in_domainbeds_order(present: list[str], task: RunImageSet, where: str) -> list[str]:
    """Sort the names of environments in DomainBed's order.

    Case and punctuation may differ from the names in ``sets.yaml`` (:func:`normalize_name`).

    Args:
        present: The names of the environments on disk or on the hub.
        task: The set, whose environments are in DomainBed's order.
        where: The folder or the set on the hub, for messages.

    Raises:
        DataError: An environment is missing, or there is an environment that the set does not have.
    """
    # the names without case and punctuation are compared
    present_by_key = {normalize_name(name): name for name in present}
    needed_keys = [normalize_name(str(disk_name)) for _, disk_name in task.environments]
    has_needed_keys = set(present_by_key) == set(needed_keys)
    # two present names may have the same key; then there are more names than keys
    has_needed_number = len(present) == len(needed_keys)
    if not has_needed_keys or not has_needed_number:
        needed = ", ".join(f"{disk_name} ({name})" for name, disk_name in task.environments)
        raise DataError(
            f"{where} has the environments {', '.join(present)}; it must have {needed}, and no "
            "other"
        )
    return [present_by_key[key] for key in needed_keys]


def normalize_name(name: str) -> str:
    """Return the letters and digits of a name, in lower case."""
    return re.sub(r"[\W_]", "", name).casefold()


def _is_image(path: str) -> bool:
    """Return True for the path of an image file, unless the file or its folder is hidden."""
    # hidden files are, for example, .ipynb_checkpoints/1.jpg, and macOS's ._1.jpg
    file = Path(path)
    is_hidden = file.name.startswith(".") or file.parent.name.startswith(".")
    return path.lower().endswith(IMG_EXTENSIONS) and not is_hidden


def _folders(folder: Path) -> list[str]:
    """Return the sorted names of the folders in a folder, without hidden ones."""
    names = []
    for path in folder.iterdir():
        if path.is_dir() and not path.name.startswith("."):
            names.append(path.name)
    return sorted(names)


def _open_file(paths: list[str], truncated: str, row: int) -> Image.Image:
    """Open the image of an environment's row with :func:`open_image`.

    ``paths`` lists the file of every row.
    """
    return open_image(Path(paths[row]), paths[row], truncated)


def _from_hub(task: RunImageSet, truncated: str) -> ImageSet:
    """Load a set from the hub. The arguments are those of :func:`load_folders`.

    The column ``domain`` has the environment of each row. The rows of an environment are sorted by
    class. Rows of the same class keep the order of the hub.
    """
    import datasets

    where = str(task.source.hub)
    splits = _load_hub_splits(task)
    rows = datasets.concatenate_datasets(list(splits.values()))
    missing = {"domain", "image", "label"}.difference(rows.column_names)
    if missing:
        raise DataError(f"{where} has no column '{min(missing)}'")

    # without decoding, the column has the bytes of the files; each image is decoded when it is read
    images = rows.cast_column("image", datasets.Image(decode=False))
    class_of_row = _column_texts(rows, "label")
    domain_of_row = _column_texts(rows, "domain")
    classes = sorted(set(class_of_row))
    label_of_row = [classes.index(class_name) for class_name in class_of_row]
    domains = sorted(set(domain_of_row))
    ordered_domains = _in_domainbeds_order(domains, task, where)
    environments = []
    for (name, _), domain in zip(task.environments, ordered_domains, strict=True):
        in_domain = [index for index in range(len(rows)) if domain_of_row[index] == domain]
        # a stable sort: within a class, rows stay in the order of the hub
        indices = sorted(in_domain, key=lambda index: label_of_row[index])
        labels = [label_of_row[index] for index in indices]
        _check_all_classes(labels, classes, f"{where}: the domain '{domain}'")
        # takes a row of the environment, and opens the image when it is needed
        open_row = partial(_open_row, images, indices, where, truncated)
        environments.append(Environment(name, labels, open_row))
    source = hub_name(where, task.source.revision, commit_of(splits))
    return ImageSet(environments, classes, f"hub {source}")


def _check_all_classes(labels: Sequence[int], classes: Sequence[str], where: str) -> None:
    """Check that an environment has images of every class.

    Args:
        labels: The class number of each image.
        classes: The names of the classes, in the order of their numbers.
        where: The environment, for the message.

    Raises:
        DataError: A class has no image.
    """
    present = set(labels)
    for number, class_name in enumerate(classes):
        if number not in present:
            raise DataError(f"{where} has no image of the class '{class_name}'")


def _load_hub_splits(task: RunImageSet) -> Any:
    """Load all splits of a set from the hub, by name.

    Raises:
        DataError: The set cannot be loaded.
    """
    import datasets

    where = str(task.source.hub)
    try:
        return datasets.load_dataset(where, revision=task.source.revision)
    except (OSError, ValueError, datasets.exceptions.DatasetNotFoundError) as error:
        raise DataError(
            f"could not load the set '{where}' from the hub: {error}\n"
            f"Without it, put {task.source.folder}/<environment>/<class>/<image> below data_root "
            "(see config/README.md)"
        ) from error


def _column_texts(rows: Any, column: str) -> list[str]:
    """Return the values of a column as texts. Class numbers are replaced by their names."""
    # a column of class numbers on the hub also has the names of the classes
    names = getattr(rows.features[column], "names", None)
    if names:
        return [str(names[number]) for number in rows[column]]
    return [str(value) for value in rows[column]]


def _open_row(rows: Any, indices: list[int], where: str, truncated: str, row: int) -> Image.Image:
    """Open the image of an environment's row with :func:`open_image`.

    ``rows`` is the whole set from the hub. ``indices`` has the index in ``rows`` of every row of
    the environment.
    """
    index = indices[row]
    content = rows[index]["image"]
    # the hub stores the content of a file, or its path
    file = content["bytes"]
    if file is None:
        file = Path(content["path"])
    return open_image(file, f"{where}, row {index + 1}", truncated)
