"""Names of classes that stand beside a set's files, as on the hub: in the front matter of README.md, or in dataset_info(s).json."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from benchmarks.harness.base.errors import DataError
from benchmarks.text.tabular import Column, Table, name_of, named

Said = tuple[Path, tuple[str, ...]]  # a file, and the names that it has
_FILES = ("README.md", "dataset_info.json", "dataset_infos.json")
_FRONT = re.compile(r"---[ \t]*\n(.*?\n)---[ \t]*(\n|$)", re.DOTALL)
_NUMBER = re.compile(r"0*(\d{1,9})(\.0*)?")  # more classes has no set
_DEFAULT = "default"


def with_names_beside(
    table: Table, file: Path, places: Collection[Path], config: str | None, labels: Collection[Column]
) -> Table:
    """A table whose labels are numbers, by the names that ``datasets`` finds for them beside it.

    Args:
        table: of one of the set's files.
        file: that file.
        places: the folders of the set.
        config: which part of the hub's set it is.
        labels: what the labels' column may be called.

    Raises:
        DataError: names beside it are not those in it, or not those of one another, or may be numbers themselves.
    """
    for name in (column for column in table.columns if column in labels):
        beside = list(_beside(places, config, name))
        numbers = [_number(value) for value in table.columns[name]] if beside else []
        if name in table.classes:
            _one_of([(file, tuple(table.classes[name])), *beside], name)
        elif any(number is not None for number in numbers):
            where, names = _one_of(beside, name)
            if _misleading(names) and any(isinstance(value, str) for value in table.columns[name]):
                raise DataError(
                    f"{where} calls the classes of '{name}' {', '.join(names)}: is a number in {file} one of these, or counted from 0? Remove them"
                )
            cells = zip(table.columns[name], numbers, strict=True)
            column = [value if number is None else name_of(number, names) for value, number in cells]
            table = replace(table, columns={**table.columns, name: column}, classes={**table.classes, name: names})
    return table


def _one_of(said: Sequence[Said], label: Column) -> Said:
    """The first of files that all say the same."""
    first, *others = said
    for where, names in others:
        if names != first[1]:
            theirs = f"{where} calls the classes of '{label}' {', '.join(names)}"
            raise DataError(f"{theirs}, and {first[0]} {', '.join(first[1])}; correct one of them")
    return first


def _number(value: object) -> int | float | None:
    if isinstance(value, str):
        found = _NUMBER.fullmatch(value.strip())
        return int(found[1]) if found else None
    return value if isinstance(value, int | float) else None


def _misleading(names: Sequence[str]) -> bool:
    """Whether names are numbers, and not those of their classes."""
    return any(_number(name) not in (None, number) for number, name in enumerate(names))


def _beside(places: Collection[Path], config: str | None, label: Column) -> Iterator[Said]:
    """Every file that names the classes of a column, with the names."""
    for file in (place / name for place in places for name in _FILES):
        if file.is_file():
            with named(file):
                found = [names for features in _features(file, config) if (names := _class_names(features.get(label)))]
            yield from ((file, names) for names in dict.fromkeys(found))


def _features(file: Path, config: str | None) -> list[dict[Any, Any]]:
    """The features of one part of the hub's set; of all parts in a file that has none of its name."""
    text = file.read_text(encoding="utf-8-sig")
    if file.suffix == ".md":
        front = _FRONT.match(text)
        said = yaml.safe_load(front[1]) if front else None
        notes = (said.get("dataset_info") if isinstance(said, dict) else None) or []  # lines may stand there for looks
        infos = {info.get("config_name", _DEFAULT): info for info in (notes if isinstance(notes, list) else [notes])}
    else:
        notes = json.loads(text)
        infos = notes if file.stem == "dataset_infos" else {notes.get("config_name") or _DEFAULT: notes}
    one = next((name for name in (config, _DEFAULT) if name in infos), None)
    found = [info.get("features") or {} for name, info in infos.items() if one in (None, name)]
    return [
        features if isinstance(features, dict) else {one["name"]: one.get("dtype") for one in features}
        for features in found
    ]


def _class_names(feature: object) -> tuple[str, ...]:
    """The names of a feature's classes, as JSON has them or as YAML has; none where it has no classes."""
    if not isinstance(feature, dict):
        return ()
    found = feature.get("names") if "names" in feature else feature.get("class_label", {}).get("names")
    if isinstance(found, dict):
        found = [found[number] for number in sorted(found, key=int)]
    return tuple(map(str, found or ()))
