"""Convert GLUE and GLUE-X from their makers' layouts to the JSON lines that the benchmarks read.

Run ``python tools/convert_glue_x.py DATA_ROOT`` for all sets below a data root, or name some of
them. The layouts are the ``raw_formats`` in ``benchmarks/glue/tasks.yaml``. Each split becomes
``<split>.jsonl`` beside its raw file.
"""

from __future__ import annotations

import csv
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

TASKS = Path(__file__).resolve().parents[1] / "benchmarks/glue/tasks.yaml"
# a row of a file: cells by the names of their columns, or by their positions in a file without a
# header
Row = dict[Any, Any]
# a section of tasks.yaml: a task, or one of its layouts
Section = dict[str, Any]

# The header of files that lack it in some copies. It is not in tasks.yaml, because a change of the
# layouts there would change the ids of runs.
KNOWN_HEADERS = {
    "SICK_test_annotated.txt": [
        "pair_ID",
        "sentence_A",
        "sentence_B",
        "relatedness_score",
        "entailment_judgment",
    ]
}

csv.field_size_limit(sys.maxsize)  # a review may be long


class UnreadableError(Exception):
    """A file that does not have the layout of its data set. The message names the file."""


def main(root: Path, names: list[str]) -> None:
    """Convert the data sets below a data root to JSON lines.

    A file that cannot be read or written does not stop the conversion of the others.

    Args:
        root: The data root.
        names: The names of tasks in ``tasks.yaml``; all of them if empty. Other tasks of the same
            sets are converted, too.

    Raises:
        SystemExit: A name is wrong, or no file has a known layout. Or files could not be read or
            written; the message has a line for each.
    """
    tasks = yaml.safe_load(TASKS.read_text(encoding="utf-8"))["tasks"]
    for name in names:
        if name not in tasks:
            raise SystemExit(f"{TASKS} has no task '{name}'; choose from {', '.join(tasks)}")
    # without names, all tasks are converted
    asked_names = names or list(tasks)
    # SICK is the set of two tasks, each with its own label. If only one of them were converted, the
    # file would lose the label of the other.
    asked_folders = {folder_name(name, tasks[name]) for name in asked_names}

    rows_of_output: dict[Path, list[Row]] = {}
    problems: dict[Path, str] = {}  # the message for each output that cannot be made
    for name, task in tasks.items():
        if folder_name(name, task) not in asked_folders:
            continue
        for raw in find_raw_files(root, name, task):
            try:
                rows = read_file(raw.file, raw.split, raw.layout, task)
            except UnreadableError as error:
                problems[raw.output] = str(error)
                continue
            if raw.output in rows_of_output:
                rows_of_output[raw.output] = joined(rows_of_output[raw.output], rows)
            else:
                rows_of_output[raw.output] = rows

    for output, rows in rows_of_output.items():
        # without the label of one task, SICK's file would look complete
        if output in problems:
            continue
        try:
            write(output, rows)
        except OSError as error:
            problems[output] = f"{output} cannot be written: {error.strerror}"
    if problems:
        raise SystemExit("\n".join(problems.values()))
    if not rows_of_output:
        raise SystemExit(f"{root} holds no file in a layout of {TASKS}")


@dataclass(frozen=True)
class RawFile:
    """A file of a task in its makers' layout.

    Attributes:
        file: The path of the file, or of a folder with the files of all rows.
        split: The name of the split that is read from it.
        layout: One of the task's ``raw_formats``.
        output: The JSON lines to write.
    """

    file: Path
    split: str
    layout: Section
    output: Path


def folder_name(name: str, task: Section) -> str:
    """Return the name of a task's folder below the data root: by default that of the task."""
    return str(task["source"].get("folder", name))


def find_raw_files(root: Path, name: str, task: Section) -> Iterator[RawFile]:
    """Yield the raw file of each split of a task that is below a data root.

    Args:
        root: The data root.
        name: The name of the task.
        task: The entry of the task in ``tasks.yaml``.
    """
    folders = [root / folder_name(name, task)]
    if root / name not in folders:
        folders.append(root / name)
    for folder in folders:
        for split, layout in found_layouts(folder, task):
            file = folder / layout["files"][split]
            output = folder / f"{split}.jsonl"
            yield RawFile(file=file, split=split, layout=layout, output=output)


def joined(first_rows: list[Row], second_rows: list[Row]) -> list[Row]:
    """Join the columns of two lists of the same rows; the second list wins for equal columns."""
    rows = []
    for first, second in zip(first_rows, second_rows, strict=True):
        rows.append({**first, **second})
    return rows


def write(file: Path, rows: list[Row]) -> None:
    """Write rows as JSON lines, atomically, and print the number of rows."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    temporary = file.with_suffix(".tmp")
    temporary.write_text("".join(lines), encoding="utf-8")
    temporary.replace(file)
    sys.stdout.write(f"{file}: {len(rows):,} rows\n")


def found_layouts(folder: Path, task: Section) -> Iterator[tuple[str, Section]]:
    """Yield each split of a task that a folder has, and the first layout whose file exists.

    Args:
        folder: The folder of the data set.
        task: The entry of the task in ``tasks.yaml``.
    """
    splits: set[str] = set()
    for names in task["splits"].values():  # such as "train+validation"
        splits.update(names.split("+"))
    for split in sorted(splits):
        layout = find_layout(folder, split, task)
        if layout is not None:
            yield split, layout


def find_layout(folder: Path, split: str, task: Section) -> Section | None:
    """Return the first layout of a task whose file of the split exists; None if none does."""
    for layout in task.get("raw_formats", []):
        name = layout["files"].get(split)
        if name is not None and (folder / name).exists():
            return layout
    return None


def read_file(file: Path, split: str, layout: Section, task: Section) -> list[Row]:
    """Return the rows of a split, see :func:`yield_rows`.

    Raises:
        UnreadableError: The file is damaged, has another layout, or has no rows of the split.
    """
    try:
        rows = list(yield_rows(file, split, layout, task))
    # TypeError: a cell of JSON is a list or a dictionary
    except (OSError, TypeError, ValueError, csv.Error) as error:
        raise UnreadableError(f"{file} cannot be read: {error}") from error
    if not rows:
        raise UnreadableError(f"{file} has no rows of the split '{split}'")
    return rows


def yield_rows(file: Path, split: str, layout: Section, task: Section) -> Iterator[Row]:
    """Yield the rows of a split, with the names of columns and labels that the task uses.

    Args:
        file: The raw file.
        split: The name of the split.
        layout: One of the task's ``raw_formats``.
        task: The entry of the task in ``tasks.yaml``.
    """
    label = task.get("label", "label")
    # the column of the label has the label's name, unless the layout names another
    columns = {label: label, **layout["columns"]}
    label_names = layout.get("label_names", {})
    # labels of rows without a class stay as they are
    unlabelled = {None, ""}
    for value in task.get("unlabelled", []):
        unlabelled.add(str(value))

    where = layout.get("where")
    read_rows = READERS[layout.get("format", "tsv")]
    for number, cells in read_rows(file, layout, label):
        if number == 1:
            check_columns(file, layout, cells)
        # several splits may be in one file, with a column that names the split
        if where and cells[where["column"]] != where["values"][split]:
            continue

        row = {name: cells.get(column) for name, column in columns.items()}
        given_label = row[label]
        has_class = given_label not in unlabelled
        if label_names and has_class:
            if given_label not in label_names:
                choices = ", ".join(label_names)
                raise UnreadableError(
                    f"{file}, row {number}: '{given_label}' is no label; choose from {choices}"
                )
            row[label] = label_names[given_label]
        yield row


def check_columns(file: Path, layout: Section, cells: Row) -> None:
    """Check that a file's first row has the columns of its layout."""
    required = [*layout["columns"].values()]
    if layout.get("where"):
        required.append(layout["where"]["column"])
    for column in required:
        if column not in cells:
            found = ", ".join(str(name) for name in cells)
            raise UnreadableError(f"{file} has no column '{column}'; it has {found}")


def lacks_header(file: Path, first_line: list[str]) -> bool:
    """Return True if the first line of a file in :data:`KNOWN_HEADERS` is a row."""
    header = KNOWN_HEADERS.get(file.name)
    if header is None:
        return False
    has_name = any(cell in header for cell in first_line)
    return len(first_line) == len(header) and not has_name


# The readers below have the same arguments: the raw file, one of the task's `raw_formats`, and the
# name of the label. Each yields the number (from 1) and the cells of each row.


def _read_csv(file: Path, layout: Section, _label: str) -> Iterator[tuple[int, Row]]:
    """Read a file whose cells are separated by commas."""
    return _read_table(file, layout, _csv_lines)


def _read_tsv(file: Path, layout: Section, _label: str) -> Iterator[tuple[int, Row]]:
    """Read a file whose cells are separated by tabs."""
    return _read_table(file, layout, _tsv_lines)


def _read_table(
    file: Path, layout: Section, split_lines: Callable[[Iterable[str]], Iterator[list[str]]]
) -> Iterator[tuple[int, Row]]:
    """Yield the number (from 1) and the cells of each row of a file.

    Args:
        file: The raw file.
        layout: One of the task's ``raw_formats``.
        split_lines: The function that yields the cells of each line.
    """
    errors = layout.get("encoding_errors", "strict")
    with file.open(encoding="utf-8-sig", errors=errors, newline="\n") as text:
        header, rows = _take_header(file, layout, split_lines(text))
        for number, cells in enumerate(rows, start=1):
            cells_without_name = cells[len(header) :]
            if header and any(cells_without_name):
                raise UnreadableError(
                    f"{file}, row {number} has {len(cells)} cells, and the first line {len(header)}"
                )
            # without a header, columns are named by their positions
            columns: Sequence[Any] = header or range(len(cells))
            # a row that ends early has None in the last columns
            row: Row = dict.fromkeys(columns)
            row.update(zip(columns, cells, strict=False))
            yield number, row


def _take_header(
    file: Path, layout: Section, lines: Iterator[list[str]]
) -> tuple[list[str], Iterator[list[str]]]:
    """Split the lines of a file into its header and its rows.

    The header is empty if the layout has none.
    """
    if not layout.get("header", True):
        return [], lines
    first_line = next(lines, [])
    if lacks_header(file, first_line):
        return KNOWN_HEADERS[file.name], itertools.chain([first_line], lines)
    return first_line, lines


def _csv_lines(lines: Iterable[str]) -> Iterator[list[str]]:
    """Yield the cells of each line that is not empty. Quotation marks enclose cells."""
    for cells in csv.reader(lines, strict=True):
        if cells:
            yield cells


def _tsv_lines(lines: Iterable[str]) -> Iterator[list[str]]:
    """Yield the cells of each line that is not empty. Quotation marks are letters."""
    for line in lines:
        text = line.rstrip("\n").removesuffix("\r")
        if text:
            yield text.split("\t")


def _read_json_lines(file: Path, _layout: Section, _label: str) -> Iterator[tuple[int, Row]]:
    """Read a file with a JSON object in each line that is not blank."""
    numbers = itertools.count(1)
    with file.open(encoding="utf-8-sig", newline="\n") as lines:
        for line in lines:
            if not line.strip():
                continue
            number = next(numbers)
            cells = json.loads(line)
            if not isinstance(cells, dict):
                raise UnreadableError(f"{file}, row {number} is not a JSON object")
            yield number, cells


def _read_folders(folder: Path, layout: Section, label: str) -> Iterator[tuple[int, Row]]:
    """Read a folder with a subfolder for each label, which has a text file for each row.

    Column 0 of the row is the text. The label is the name of the subfolder.
    """
    numbers = itertools.count(1)
    for label_name in layout["label_names"]:
        files = sorted((folder / label_name).glob("*.txt"))
        text_files = [file for file in files if not file.name.startswith(".")]
        if not text_files:
            raise UnreadableError(f"{folder / label_name} holds no .txt file")
        for file in text_files:
            yield next(numbers), {0: file.read_text(encoding="utf-8-sig"), label: label_name}


# by the key `format` of a layout
READERS = {
    "tsv": _read_tsv,
    "csv": _read_csv,
    "jsonl": _read_json_lines,
    "folders": _read_folders,
}

if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]), sys.argv[2:])
