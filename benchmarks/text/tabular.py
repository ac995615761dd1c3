"""One file of a text set as a table: tab- or comma-separated, JSON lines, Arrow, Parquet, or a folder of texts."""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from benchmarks.harness.base.errors import DataError, first_line
from benchmarks.harness.sources.json_rows import Damaged, json_lines
from benchmarks.harness.sources.links import Links

Column = str | int  # by name, or by place in a file without names
Wanted = Collection[Column]

_SEPARATORS = (",", "\t", ";", "|")
_BEHIND_QUOTE = re.compile(r'"\s*([;|\t])\s*"')

csv.field_size_limit(sys.maxsize)  # a text may be long


@dataclass(frozen=True)
class Table:
    """Rows as a file has them.

    Attributes:
        names: all columns, in the file's order.
        columns: the values of those that were asked for.
        lines: the line on which each row begins, where the file has lines.
        classes: names of the classes of a column, where the file stores them beside numbers; the column then has names for values.
    """

    names: Sequence[Column]
    columns: Mapping[Column, Sequence[Any]]
    lines: Sequence[int] | None = None
    classes: Mapping[Column, Sequence[str]] = field(default_factory=dict)


@contextmanager
def named(file: Path) -> Iterator[None]:
    """Turn what libraries raise on a damaged file into an error with its name."""
    try:
        yield
    except DataError:
        raise
    except RecursionError as error:
        raise DataError(f"{file} cannot be read: its notes are nested too deeply") from error
    except (ValueError, OSError, KeyError, AttributeError, TypeError, yaml.YAMLError, pa.ArrowException) as error:
        raise DataError(f"{file} cannot be read: {first_line(error)}") from error


def read_delimited(
    file: Path, wanted: Wanted, *, separator: str = ",", header: bool = True, errors: str = "strict"
) -> Table:
    """A file of separated cells, every one of them text; of rows that end early the rest is None.

    Commas separate cells that may stand in quotation marks; between tabs a quotation mark is a letter.

    Args:
        file: UTF-8.
        wanted: the columns to keep.
        separator: a comma or a tab.
        header: whether the first line names the columns; else they are called by their places.
        errors: what to do with bytes that are no UTF-8, as of ``open``.

    Raises:
        DataError: the file or one of its lines is not like that; names the line.
    """
    with named(file):
        rows = _cells(file, separator, errors)
        first = next(rows)
        names: list[Column] = list(first[1]) if header else list(range(len(first[1])))
        places = [(name, names.index(name)) for name in wanted if name in names]
        columns: dict[Column, list[str | None]] = {name: [] for name, _ in places}
        lines = []
        for line, row in rows if header else chain([first], rows):
            if any(row[len(names) :]):
                raise DataError(f"{file}, line {line} has {len(row)} cells, and the first line {len(names)}")
            lines.append(line)
            for name, place in places:
                columns[name].append(row[place] if place < len(row) else None)
    return Table(names, columns, lines)


def column_names(file: Path) -> Sequence[Column]:
    """The cells of the first line of a comma-separated file."""
    with named(file):
        return next(_cells(file, ",", "replace"))[1]


def _cells(file: Path, separator: str, errors: str) -> Iterator[tuple[int, list[str]]]:
    """The rows of a file, one at least, each with the line on which it begins; blank lines are none."""
    width = 0
    for line, row in _quoted(file, errors) if separator == "," else _split(file, separator, errors):
        width = width or _check_width(file, line, row, separator)
        yield line, row
    if not width:
        raise DataError(f"{file} is empty")


def _split(file: Path, separator: str, errors: str) -> Iterator[tuple[int, list[str]]]:
    """Rows that are lines, in which every other sign is one of a text, a lone carriage return too."""
    for number, line in enumerate(_lines(file, errors), start=1):
        if text := line.removesuffix("\n").removesuffix("\r"):
            yield number, text.split(separator)


def _quoted(file: Path, errors: str) -> Iterator[tuple[int, list[str]]]:
    """Rows of cells between commas, which may stand in quotation marks."""
    reader, begin = csv.reader(_lines(file, errors), csv.excel, strict=True), 1
    try:
        for row in reader:
            if row:
                yield begin, row
            begin = reader.line_num + 1
    except csv.Error as error:
        problem = "a carriage return in a cell must stand in quotation marks" if "new-line" in str(error) else error
        other = _BEHIND_QUOTE.search(next(_lines(file, errors)))
        hint = f"; its cells are separated by {other[1]!r}; they must be separated by ','" if other else ""
        raise DataError(f"{file}, line {begin}: {problem}{hint}") from error


def _check_width(file: Path, line: int, row: list[str], separator: str) -> int:
    """Refuse a first row of one cell: text and label are two."""
    if len(row) == 1:
        other = next((sign for sign in _SEPARATORS if sign in row[0]), None)
        found = f"its cells are separated by {other!r}" if other else "it has one cell"
        raise DataError(f"{file}, line {line}: {found}; they must be separated by {separator!r}")
    return len(row)


def _lines(file: Path, errors: str) -> Iterator[str]:
    """The lines of a UTF-8 file, as they end; a carriage return alone ends none.

    Raises:
        DataError: a line with other bytes, where ``errors`` is strict.
    """
    strict = errors == "strict"
    with file.open(encoding="utf-8-sig", errors="surrogateescape" if strict else errors, newline="\n") as text:
        for number, line in enumerate(text, start=1):
            if number == 1 and not line.endswith("\n") and "\r" in line.rstrip("\r"):
                raise DataError(f"{file} ends its lines with carriage returns alone; write line feeds in their place")
            if strict and not line.isascii():
                try:
                    line.encode()
                except UnicodeEncodeError as error:
                    raise DataError(f"{file}, line {number} is not UTF-8") from error
            yield line


def read_json_lines(file: Path, wanted: Wanted) -> Table:
    """A file with one JSON object a line; what one of them lacks is None.

    Raises:
        DataError: a line is damaged, is not UTF-8, or holds something else; names it.
    """
    names: dict[Column, None] = {}
    columns: dict[Column, list[Any]] = {name: [] for name in wanted}
    lines = []
    with named(file):
        for line, value in json_lines(_lines(file, "strict")):
            if isinstance(value, Damaged):
                raise DataError(f"{file}, line {line} {value.reason}")
            if not isinstance(value, dict):
                raise DataError(f"{file}, line {line} is {type(value).__name__}, not an object")
            names |= dict.fromkeys(value)
            lines.append(line)
            for name, cells in columns.items():
                cells.append(value.get(name))
    return Table(list(names), {name: columns[name] for name in names if name in columns}, lines)


def read_parquet(file: Path, wanted: Wanted) -> Table:
    """A Parquet file."""
    with named(file):
        return from_arrow(pq.ParquetFile(file).read(), wanted)


def read_arrow(file: Path, wanted: Wanted) -> Table:
    """An Arrow file, or the stream that ``datasets`` writes into one."""
    with named(file), pa.memory_map(str(file)) as source:
        try:
            opened = pa.ipc.open_stream(source)
        except pa.ArrowInvalid:
            opened = pa.ipc.open_file(source)
        return from_arrow(opened.read_all(), wanted)


def from_arrow(table: pa.Table, wanted: Wanted) -> Table:
    """A table of Arrow's; columns whose classes ``datasets`` stored the names of hold these instead of numbers."""
    notes = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}"))
    features = notes.get("info", {}).get("features") or {}
    columns: dict[Column, Sequence[Any]] = {}
    classes: dict[Column, Sequence[str]] = {}
    for place, name in enumerate(table.column_names):
        if name not in wanted:
            continue
        columns[name] = table.column(place).to_pylist()
        feature = features.get(name)
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel":
            classes[name] = feature["names"]
            columns[name] = [name_of(value, classes[name]) for value in columns[name]]
    return Table(table.column_names, columns, None, classes)


def name_of(value: Any, names: Sequence[str]) -> Any:
    """The name of a class; what is no number of one (-1, for want of a label) as it is."""
    return names[int(value)] if isinstance(value, int | float) and value in range(len(names)) else value


def visible(files: Iterable[Path]) -> list[Path]:
    """Those that are not hidden, as notes of file managers are (``._name``), in order."""
    return sorted(file for file in files if not file.name.startswith("."))


def read_folders(folder: Path, labels: Collection[str], text: str, label: str) -> Table:
    """One text file a row, below a folder of its label's name.

    Args:
        folder: with those folders.
        labels: their names.
        text: what to call the column of the texts.
        label: what to call the column of the labels.

    Raises:
        DataError: a folder has no text, is a link, or holds one to another of its files; or a file is not UTF-8.
    """
    texts, found, links = [], [], Links(folder.parent)
    links.check(folder)
    for name in labels:
        links.check(folder / name)
        files = visible((folder / name).glob("*.txt"))
        if not files:
            raise DataError(f"{folder / name} holds no .txt file")
        for file in files:
            links.check(file)
            with named(file):
                texts.append(file.read_text(encoding="utf-8-sig"))
            found.append(name)
    return Table([text, label], {text: texts, label: found})


READERS: Mapping[str, Callable[[Path, Wanted], Table]] = {
    "parquet": read_parquet,
    "arrow": read_arrow,
    "jsonl": read_json_lines,
    "csv": read_delimited,
}
