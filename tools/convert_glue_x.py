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
from collections.abc import Iterable, Iterator, Sequence
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

    A file that cannot be read does not stop the conversion of the others.

    Args:
        root: The data root.
        names: The names of tasks in ``tasks.yaml``; all of them if empty.

    Raises:
        SystemExit: A name is wrong, or no file has a known layout. Or files could not be read; the
            message has a line for each.
    """
    tasks = yaml.safe_load(TASKS.read_text(encoding="utf-8"))["tasks"]
    unknown = set(names) - set(tasks)
    if unknown:
        raise SystemExit(f"{TASKS} has no task '{unknown.pop()}'; choose from {', '.join(tasks)}")
    outputs: dict[Path, list[Row]] = {}
    problems: dict[Path, str] = {}  # by output file
    for name in names or tasks:
        task = tasks[name]
        # the two folders are often the same one
        for folder in {root / task["source"].get("folder", name), root / name}:
            for split, layout in found_layouts(folder, task):
                output = folder / f"{split}.jsonl"
                try:
                    rows = read_file(folder / layout["files"][split], split, layout, task)
                except UnreadableError as error:
                    problems[output] = str(error)
                    continue
                # SICK is the set of two tasks, each with its own label
                if output in outputs:
                    outputs[output] = joined(outputs[output], rows)
                else:
                    outputs[output] = rows
    for output, rows in outputs.items():
        # without the label of one task, SICK's file would look complete
        if output not in problems:
            write(output, rows)
    if problems:
        raise SystemExit("\n".join(problems.values()))
    if not outputs:
        raise SystemExit(f"{root} holds no file in a layout of {TASKS}")


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
        UnreadableError: The file is damaged or has another layout.
    """
    try:
        return list(yield_rows(file, split, layout, task))
    except (OSError, ValueError, csv.Error) as error:
        raise UnreadableError(f"{file} cannot be read: {error}") from error


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
    where = layout.get("where")
    names = layout.get("label_names", {})
    unlabelled = {None, ""}
    for value in task.get("unlabelled", []):
        unlabelled.add(str(value))
    read_rows = READERS[layout.get("format", "tsv")]
    for number, cells in read_rows(file, layout, label):
        if number == 1:
            check_columns(file, layout, cells)
        # several splits may be in one file, with a column that names the split
        if where and cells[where["column"]] != where["values"][split]:
            continue
        row = {name: cells.get(column) for name, column in columns.items()}
        given = row[label]
        if names and given not in unlabelled:
            if given not in names:
                choices = ", ".join(names)
                raise UnreadableError(
                    f"{file}, row {number}: '{given}' is no label; choose from {choices}"
                )
            row[label] = names[given]
        yield row


def check_columns(file: Path, layout: Row, cells: Row) -> None:
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


def _separated(file: Path, layout: Row, _label: str) -> Iterator[tuple[int, Row]]:
    """Yield the number (from 1) and the cells of each row of a csv or tab-separated file."""
    errors = layout.get("encoding_errors", "strict")
    with file.open(encoding="utf-8-sig", errors=errors, newline="\n") as lines:
        rows = _csv_rows(lines) if layout.get("format") == "csv" else _tsv_rows(lines)
        header: list[str] = []
        if layout.get("header", True):
            first_line = next(rows, [])
            header = first_line
            if lacks_header(file, first_line):
                header = KNOWN_HEADERS[file.name]
                rows = itertools.chain([first_line], rows)
        for number, cells in enumerate(rows, start=1):
            if header and any(cells[len(header) :]):
                raise UnreadableError(
                    f"{file}, row {number} has {len(cells)} cells, and the first line {len(header)}"
                )
            names: Sequence[Any] = header or range(len(cells))
            # None for the last cells of a row that ends early
            row: Row = dict.fromkeys(names)
            row.update(zip(names, cells, strict=False))
            yield number, row


def _csv_rows(lines: Iterable[str]) -> Iterator[list[str]]:
    """Yield the cells of each line that is not empty. Quotation marks enclose cells."""
    for cells in csv.reader(lines, strict=True):
        if cells:
            yield cells


def _tsv_rows(lines: Iterable[str]) -> Iterator[list[str]]:
    """Yield the cells of each line that is not empty. Quotation marks are letters."""
    for line in lines:
        text = line.rstrip("\n").removesuffix("\r")
        if text:
            yield text.split("\t")


def _json_lines(file: Path, _layout: Row, _label: str) -> Iterator[tuple[int, Row]]:
    """Yield the number (from 1) and the object of each line that is not blank."""
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


def _folders(file: Path, layout: Row, label: str) -> Iterator[tuple[int, Row]]:
    """Yield a number (from 1) and a row for each text file in the folders of the labels.

    Column 0 of the row is the text. The label is the name of the file's folder.
    """
    numbers = itertools.count(1)
    for name in layout["label_names"]:
        paths = sorted((file / name).glob("*.txt"))
        texts = [path for path in paths if not path.name.startswith(".")]
        if not texts:
            raise UnreadableError(f"{file / name} holds no .txt file")
        for path in texts:
            yield next(numbers), {0: path.read_text(encoding="utf-8-sig"), label: name}


READERS = {"tsv": _separated, "csv": _separated, "jsonl": _json_lines, "folders": _folders}

if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]), sys.argv[2:])
