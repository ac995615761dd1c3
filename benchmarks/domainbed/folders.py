"""Image sets on disk in DomainBed's layout, or on the hub."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from benchmarks.domainbed.environments import Environment, ImageSet
from benchmarks.domainbed.images import REFUSE, open_image
from benchmarks.harness.hub import commit_of, named
from benchmarks.harness.packages import DataError
from benchmarks.harness.text_files import local_folder, wanted_place
from emoe.errors import did_you_mean

_COLUMNS = ("image", "domain", "label")


def load_folders(task: Mapping[str, Any], *, truncated: str = REFUSE) -> ImageSet:
    """The environments of a set: of its folder below the data root (variable ``EMOE_DATA_ROOT``), else of the hub.

    Args:
        task: of a spec.
        truncated: see :func:`~benchmarks.domainbed.images.open_image`.

    Raises:
        DataError: a folder is missing or empty, or classes differ between environments.
    """
    if folder := local_folder(task):
        return _from_disk(task, folder, truncated)
    if "hub" in task["source"]:
        return _from_hub(task, truncated)
    raise DataError(
        f"{wanted_place(task['source'])} does not exist; it must hold <environment>/<class>/<image>, as DomainBed's download makes it"
    )


def _from_disk(task: Mapping[str, Any], root: Path, truncated: str) -> ImageSet:
    folders = _environment_folders(root, dict(task["environments"]))
    environments: list[Environment] = []
    classes: list[str] = []
    first = root / folders[0]
    for (name, _), folder in zip(task["environments"], folders, strict=True):
        here = root / folder
        found = sorted(path.name for path in here.iterdir() if path.is_dir())
        if not found:
            raise DataError(f"{here} has no class folder")
        if classes and found != classes:
            odd = sorted(set(found) ^ set(classes))[0]
            has, lacks = (here, first) if odd in found else (first, here)
            raise DataError(
                f"classes differ between environments: {has} has '{odd}', {lacks} does not{did_you_mean(odd, _others(found, classes))}"
            )
        classes = found
        files = _files(here, classes)
        paths = [path for path, _ in files]
        environments.append(
            Environment(name, [label for _, label in files], partial(_open_file, paths, truncated), paths)
        )
    return ImageSet(environments, classes, str(root))


def _environment_folders(root: Path, wanted: Mapping[str, str]) -> list[str]:
    """The environments' folders in order.

    Folders of quite other names are taken by their order, as DomainBed takes all; where some are known, the rest must be too.
    """
    folders = {_plain(path.name): path.name for path in sorted(root.iterdir()) if path.is_dir()}
    missing = [folder for folder in wanted.values() if _plain(folder) not in folders]
    extra = [name for plain, name in folders.items() if plain not in map(_plain, wanted.values())]
    if not missing and not extra:
        return [folders[_plain(folder)] for folder in wanted.values()]
    if len(missing) == len(extra) == len(wanted):
        return sorted(extra)
    expected = ", ".join(f"{folder} ({name})" for name, folder in wanted.items())
    wrong = [f"lacks the environment {missing[0]}{did_you_mean(missing[0], extra) if extra else ''}"] if missing else []
    wrong += [f"has {', '.join(extra)}, which is no environment"] if extra else []
    raise DataError(f"{root} {' and '.join(wrong)}; it must have {expected}, and no other folder")


def _plain(name: str) -> str:
    """A name without case, spaces and signs."""
    return re.sub(r"[\W_]", "", name).casefold()


def _others(found: list[str], classes: list[str]) -> list[str]:
    return sorted(set(found) ^ set(classes))[1:]


def _files(folder: Path, classes: list[str]) -> list[tuple[str, int]]:
    """Image files and their classes, in torchvision's order.

    Raises:
        DataError: a class without an image.
    """
    numbers = {name: number for number, name in enumerate(classes)}
    found = make_dataset(str(folder), numbers, extensions=IMG_EXTENSIONS, allow_empty=True)
    empty = sorted(set(classes) - {classes[label] for _, label in found})
    if empty:
        raise DataError(f"{folder / empty[0]} has no image ({', '.join(IMG_EXTENSIONS)})")
    return found


def _open_file(paths: list[str], truncated: str, row: int) -> tuple[Image.Image, str]:
    return open_image(Path(paths[row]), paths[row], truncated=truncated)


def _from_hub(task: Mapping[str, Any], truncated: str) -> ImageSet:
    """Every row of the hub's set, by environment and class; within a class in the hub's order, which is not that of file names."""
    import datasets

    source = task["source"]
    where = source["hub"]
    try:
        parts = datasets.load_dataset(where, revision=source.get("revision"))
    except (OSError, ValueError, datasets.exceptions.DatasetNotFoundError) as error:
        raise DataError(
            f"could not load the set '{where}' from the hub: {error}\n"
            f"Without it, put {source['folder']}/<environment>/<class>/<image> below data_root (see config/README.md)"
        ) from error
    rows = datasets.concatenate_datasets(list(parts.values()))
    read = named(where, source.get("revision"), commit_of(parts))
    for column in _COLUMNS:
        if column not in rows.column_names:
            raise DataError(f"{where} has no column '{column}'{did_you_mean(column, rows.column_names)}")
    names = rows.features["label"].names if isinstance(rows.features["label"], datasets.ClassLabel) else None
    labels = [names[value] if names else str(value) for value in rows["label"]]
    domains = [_domain(rows.features["domain"], value) for value in rows["domain"]]
    classes, present = sorted(set(labels)), sorted(set(domains))
    if len(present) != len(task["environments"]):
        raise DataError(f"{where} has the domains {', '.join(present)}, but must have {len(task['environments'])}")
    images = rows.cast_column("image", datasets.Image(decode=False))
    environments = []
    for (name, _), domain in zip(task["environments"], present, strict=True):
        chosen = sorted((i for i, found in enumerate(domains) if found == domain), key=lambda i: (labels[i], i))
        absent = sorted(set(classes) - {labels[i] for i in chosen})
        if absent:
            raise DataError(f"{where}: the domain '{domain}' has no image of the class '{absent[0]}'")
        numbers = [classes.index(labels[i]) for i in chosen]
        places = [f"{where}, row {i + 1}" for i in chosen]
        environments.append(Environment(name, numbers, partial(_open_row, images, chosen, places, truncated), places))
    return ImageSet(environments, classes, f"hub {read}")


def _domain(feature: Any, value: Any) -> str:
    return str(feature.names[value]) if hasattr(feature, "names") else str(value)


def _open_row(rows: Any, chosen: list[int], places: list[str], truncated: str, row: int) -> tuple[Image.Image, str]:
    content = rows[chosen[row]]["image"]
    file = content["bytes"] if content["bytes"] is not None else Path(content["path"])
    return open_image(file, places[row], truncated=truncated)
