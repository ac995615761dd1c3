"""Read a text set's rows: from the hub, or from a local folder in any common format or the set's own."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness.base.errors import DataError
from benchmarks.harness.sources.hub import commit_of, hub_name
from benchmarks.harness.sources.local import local_folder, wanted_place
from benchmarks.text.class_names import with_names_beside
from benchmarks.text.definition import FileLayout, RunTask
from benchmarks.text.tabular import (
    READERS,
    Column,
    Table,
    column_names,
    from_arrow,
    named,
    read_delimited,
    read_folders,
    read_json_lines,
    visible,
)
from emoe.errors import did_you_mean

_WHOLE = re.compile(r"(-?\d+)\.0*")
_PIECE = re.compile(r".*-(\d+)-of-(\d+)\.\w+")  # as the hub and `datasets` number the files of a split


@dataclass(frozen=True)
class FileRows:
    """Rows under the task's column names.

    Attributes:
        columns: the values of the task's fields and of its label, as the file has them.
        where: file, or hub id and split.
        numbers: the number of each row in the file.
        lines: the line on which each begins, where the file has lines.
        label_names: what this file calls the labels, to the class names, where it has names of its own; nothing else is then one.
    """

    columns: Mapping[str, Sequence[Any]]
    where: str
    numbers: Sequence[int]
    lines: Sequence[int] | None
    label_names: Mapping[str, str] | None

    def place(self, row: int) -> str:
        """Where a row stands, as the file counts rows, and lines where these differ."""
        number, line = self.numbers[row], self.lines[row] if self.lines else None
        return f"{self.where}, " + (f"line {line}, " if line not in (None, number) else "") + f"row {number}"


Rows = list[FileRows]


def read_rows(task: RunTask, split: str) -> Rows:
    """The rows of a split, from the user's folder where there is one, else from the hub.

    Args:
        task: a task's spec.
        split: its name; ``a+b`` is both.

    Raises:
        DataError: the set, a file or a split is missing, or a file is damaged.
    """
    folder, parts = local_folder(task.name, task.source.model_dump()), split.split("+")
    if folder is None:
        return [_read_hub(task, part) for part in parts]
    if (folder / "state.json").exists():  # one saved set without splits is the whole
        if task.splits.train is not None:
            raise DataError(
                f"{folder} is one saved set without splits, but '{task.name}' is trained on one split and scored on another: "
                "save a DatasetDict with its splits"
            )
        return [_as_on_hub(_saved(folder, task), str(folder), task)]
    return [found for part in parts for found in _read_split(folder, task, part)]


def _read_hub(task: RunTask, split: str) -> FileRows:
    import datasets

    source = task.source
    place = wanted_place(source.model_dump())
    if source.hub is None:
        raise DataError(
            f"the set '{task.name}' is not on the hub and not in {place}; `python -m benchmarks data --check` says how to get it"
        )
    try:
        loaded = datasets.load_dataset(source.hub, source.config, split=split, revision=source.revision)
    except Exception as error:  # the hub raises many kinds; all mean the same to the user
        raise DataError(
            f"could not load '{source.hub}' ({source.config}) from the hub: {type(error).__name__}: {error}\n"
            f"Without the hub, put the set's own files into {place}"
        ) from error
    place = hub_name(source.hub, source.revision, commit_of(loaded))
    return _as_on_hub(_table_of(loaded, task), f"{place} ({source.config}), split {split}", task)


def _saved(folder: Path, task: RunTask, split: str | None = None) -> Table:
    """A set written by ``datasets``' ``save_to_disk``, or one split of it."""
    import datasets

    with named(folder):
        loaded = datasets.load_from_disk(str(folder))
        if split is not None and split not in loaded:
            raise DataError(f"{folder} has no split '{split}'{did_you_mean(split, loaded)}")
        return _table_of(loaded if split is None else loaded[split], task)


def _table_of(loaded: Any, task: RunTask) -> Table:
    return from_arrow(loaded.with_format("arrow")[:], _wanted(task))


def _read_split(folder: Path, task: RunTask, split: str) -> Rows:
    """Read one split: saved ``datasets``, Parquet, Arrow, JSON lines or CSV under the hub's names, or the set's own files."""
    if (folder / "dataset_dict.json").exists():
        return [_as_on_hub(_saved(folder, task, split), f"{folder} [{split}]", task)]
    layouts = [layout for layout in task.raw_formats or () if split in layout.files]
    config = task.source.config
    for place in [folder, *([folder / config, folder / "data"] if config else [])]:
        for suffix, read in READERS.items():
            files = _files(place, split, suffix)
            # a set's own CSV may have such a name too, but has no header
            own = suffix == "csv" and any(folder / layout.files[split] in files for layout in layouts)
            if files and not (own and not _has_columns(files[0], task)):
                places = dict.fromkeys((folder, place, files[0].parent))
                labels = {task.label, *(also for also, meant in task.column_aliases.items() if meant == task.label)}
                tables = (
                    (file, with_names_beside(read(file, _wanted(task)), file, places, config, labels)) for file in files
                )
                return [_as_on_hub(table, str(file), task) for file, table in tables]
    for layout in layouts:
        file = folder / layout.files[split]
        if file.exists():
            return [_read_own(file, layout, task, split)]
    wanted = [*(f"{split}.{suffix}" for suffix in READERS), *(layout.files[split] for layout in layouts)]
    present = sorted(path.name for path in folder.iterdir())
    raise DataError(
        f"{folder} has no file for the split '{split}': wanted one of {', '.join(wanted)}; it holds {', '.join(present) or 'nothing'}"
    )


def _files(place: Path, split: str, suffix: str) -> list[Path]:
    """The files of a split in one form: one, or numbered pieces, or whatever is in a folder of its name.

    Raises:
        DataError: it is there in two of these, or a piece is missing.
    """
    forms = (f"{split}.{suffix}", f"{split}-*.{suffix}", f"{split}/*.{suffix}")
    found = [files for form in forms if (files := visible(place.glob(form)))]
    if len(found) > 1:
        one, other = (files[0].relative_to(place) for files in found[:2])
        raise DataError(f"{place} has the split '{split}' twice: {one} and {other}; leave one of them")
    files = found[0] if found else []
    pieces = [(int(piece[1]), int(piece[2])) for file in files if (piece := _PIECE.fullmatch(file.name))]
    if pieces and pieces != [(number, len(files)) for number in range(len(files))]:
        raise DataError(
            f"{files[0].parent}: the split '{split}' must be {max(count for _, count in pieces)} files, and is "
            + ", ".join(file.name for file in files)
        )
    return files


def _wanted(task: RunTask) -> set[Column]:
    """The task's columns, under all names that copies of the set have for them."""
    return {*task.fields, task.label, *task.column_aliases}


def _has_columns(file: Path, task: RunTask) -> bool:
    return {*task.fields, task.label} <= {task.column_aliases.get(str(name), name) for name in column_names(file)}


def _as_on_hub(table: Table, where: str, task: RunTask) -> FileRows:
    """Rows of a table under the hub's column names."""
    columns = {name: name for name in (*task.fields, task.label)}
    return _file_rows(table, where, task, columns, _spelled(table, task))


def _file_rows(
    table: Table,
    where: str,
    task: RunTask,
    columns: Mapping[str, Column],
    label_names: Mapping[str, str] | None,
    chosen: Collection[int] | None = None,
) -> FileRows:
    """Rows of a table under the task's column names.

    Args:
        table: the file.
        where: its name.
        task: the task.
        columns: what the file calls the task's columns.
        label_names: what it calls the labels.
        chosen: places of the rows to take; None for all.

    Raises:
        DataError: a column is missing, or is there under two names.
    """
    found = {}
    for name, column in columns.items():
        other = [also for also, meant in task.column_aliases.items() if meant == name]
        names = [known for known in table.names if known in (column, name, *other)]
        if len(names) > 1:
            raise DataError(f"{where} has two columns for '{name}': '{names[0]}' and '{names[1]}'; leave one of them")
        if not names:
            called = "" if column == name else f" for '{name}'"
            raise DataError(f"{where} has no column '{column}'{called}{did_you_mean(column, table.names)}")
        found[name] = table.columns[names[0]]
    rows = range(len(found[task.label])) if chosen is None else chosen
    return FileRows(
        {name: [values[i] for i in rows] for name, values in found.items()},
        where,
        [i + 1 for i in rows],
        None if table.lines is None else [table.lines[i] for i in rows],
        label_names,
    )


def _read_own(file: Path, layout: FileLayout, task: RunTask, split: str) -> FileRows:
    """A set's own file."""
    columns, label_names, where = layout.columns, layout.label_names, layout.where
    if layout.format == "folders":
        (text,) = columns
        table = read_folders(file, label_names, text, task.label)
        return _file_rows(table, str(file), task, {text: text, task.label: task.label}, label_names)
    wanted = {*columns.values(), *_wanted(task), *([where.column] if where else [])}
    if layout.format == "jsonl":
        table = read_json_lines(file, wanted)
    else:
        separator = "," if layout.format == "csv" else "\t"
        table = read_delimited(file, wanted, separator=separator, header=layout.header, errors=layout.encoding_errors)
    chosen = None
    if where:
        splits = table.columns.get(where.column)
        if splits is None:
            raise DataError(f"{file} has no column '{where.column}'{did_you_mean(where.column, table.names)}")
        chosen = [i for i, found in enumerate(splits) if found == where.values[split]]
    return _file_rows(table, str(file), task, columns, label_names or None, chosen)


def has_numbers(task: RunTask) -> bool:
    """Whether the number of a class may stand for it; not where classes are called by numbers, of which 1 may be the first."""
    return not any(label_text(name).lstrip("-").isdecimal() for name in (*task.labels, *task.label_names))


def label_text(value: object) -> str:
    """A label as text, without blanks around it and the zeros behind a whole number."""
    text = "" if value is None else str(value).strip()
    whole = _WHOLE.fullmatch(text)
    return whole[1] if whole else text


def _spelled(table: Table, task: RunTask) -> Mapping[str, str] | None:
    """The classes by the names that a file stores for its numbers; None where it stores no names.

    Names are the task's or its makers' spellings. Where all are numbers from 0 they are the task's numbers, if these mean a class. A name that is none of these
    has no class, so that a row with it is refused.
    """
    label = task.label
    names = next(
        (found for name, found in table.classes.items() if task.column_aliases.get(str(name), name) == label), None
    )
    if names is None or not task.labels:
        return None
    if has_numbers(task) and sorted(names) == sorted(map(str, range(len(names)))):
        return {str(number): name for number, name in enumerate(task.labels)}
    makers = [layout.label_names for layout in task.raw_formats or ()]
    spellings = (*makers, task.label_names, {name: name for name in task.labels})
    known = {label_text(called): name for spelling in spellings for called, name in spelling.items()}
    return {called: known[label_text(called)] for called in names if label_text(called) in known}
