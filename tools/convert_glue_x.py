"""Convert files of GLUE and GLUE-X in their makers' layouts to JSON lines, which the benchmarks read.

Run ``python tools/convert_glue_x.py DATA_ROOT`` for all sets below a data root, or name some of them. The layouts are
the ``raw_formats`` in ``benchmarks/glue/tasks.yaml``; each split becomes ``<split>.jsonl`` beside its raw file.
"""

from __future__ import annotations

import csv
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

TASKS = Path(__file__).resolve().parents[1] / "benchmarks/glue/tasks.yaml"
Row = dict[Any, Any]  # by the names of columns, or their places in a file without a header

csv.field_size_limit(sys.maxsize)  # a review may be long


def main(root: Path, names: list[str]) -> None:
    """Convert the sets below a data root.

    Args:
        root: The data root.
        names: The names of tasks; all of them if empty.
    """
    tasks = yaml.safe_load(TASKS.read_text(encoding="utf-8"))["tasks"]
    if unknown := set(names) - set(tasks):
        raise SystemExit(f"{TASKS} has no task '{unknown.pop()}'; choose from {', '.join(tasks)}")
    outputs: dict[Path, list[Row]] = {}
    for name in names or tasks:
        task = tasks[name]
        for folder in {root / task["source"].get("folder", name), root / name}:
            for file, rows in converted(folder, task):
                if file in outputs:  # two tasks of one set: SICK has two labels
                    rows = [
                        {**first, **second}
                        for first, second in zip(outputs[file], rows, strict=True)
                    ]
                outputs[file] = rows
    for file, rows in outputs.items():
        temporary = file.with_suffix(".tmp")
        temporary.write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
        )
        temporary.replace(file)
        sys.stdout.write(f"{file}: {len(rows):,} rows\n")
    if not outputs:
        raise SystemExit(f"{root} holds no file in a layout of {TASKS}")


def converted(folder: Path, task: Row) -> Iterator[tuple[Path, list[Row]]]:
    """Yield the output file and rows of each split, by the first layout whose file exists."""
    splits = {split for part in task["splits"].values() for split in part.split("+")}
    for split in sorted(splits):
        for layout in task.get("raw_formats", []):
            file = folder / layout["files"].get(split, "")
            if split in layout["files"] and file.exists():
                try:
                    yield folder / f"{split}.jsonl", list(read(file, split, layout, task))
                except (OSError, ValueError, csv.Error) as error:
                    raise SystemExit(f"{file} cannot be read: {error}") from error
                break


def read(file: Path, split: str, layout: Row, task: Row) -> Iterator[Row]:
    """Yield the rows of a split under the task's column names, labels by the task's names."""
    label, columns, where = task.get("label", "label"), layout["columns"], layout.get("where")
    unlabelled = {None, "", *map(str, task.get("unlabelled", []))}
    names = layout.get("label_names")
    required = [*columns.values(), *([where["column"]] if where else [])]
    for number, cells in READERS[layout.get("format", "tsv")](file, layout, label):
        if number == 1 and (missing := [column for column in required if column not in cells]):
            raise SystemExit(
                f"{file} has no column '{missing[0]}'; it has {', '.join(map(str, cells))}"
            )
        if where and cells[where["column"]] != where["values"][split]:
            continue
        row = {name: cells.get(column) for name, column in ({label: label} | columns).items()}
        if names and row[label] not in unlabelled:
            if row[label] not in names:
                raise SystemExit(
                    f"{file}, row {number}: '{row[label]}' is no label; choose from {', '.join(names)}"
                )
            row[label] = names[row[label]]
        yield row


def _separated(file: Path, layout: Row, _label: str) -> Iterator[tuple[int, Row]]:
    """Yield rows of cells. Quotation marks are letters in tab-separated files, and enclose cells in csv."""
    errors = layout.get("encoding_errors", "strict")
    with file.open(encoding="utf-8-sig", errors=errors, newline="\n") as lines:
        rows: Iterator[list[str]]
        if layout.get("format") == "csv":
            rows = filter(None, csv.reader(lines, strict=True))
        else:
            rows = (
                text.split("\t") for line in lines if (text := line.rstrip("\n").removesuffix("\r"))
            )
        header = next(rows, []) if layout.get("header", True) else None
        for number, cells in enumerate(rows, start=1):
            names: Sequence[Any] = header or range(len(cells))
            if header and any(cells[len(header) :]):
                raise SystemExit(
                    f"{file}, row {number} has {len(cells)} cells, and the first line {len(header)}"
                )
            # a row that ends early lacks its last cells
            yield number, {**dict.fromkeys(names), **dict(zip(names, cells, strict=False))}


def _json_lines(file: Path, _layout: Row, _label: str) -> Iterator[tuple[int, Row]]:
    with file.open(encoding="utf-8-sig", newline="\n") as lines:
        yield from enumerate((json.loads(line) for line in lines if line.strip()), start=1)


def _folders(file: Path, layout: Row, label: str) -> Iterator[tuple[int, Row]]:
    """Yield one row per text file; its folder's name is the label."""
    numbers = itertools.count(1)
    for name in layout["label_names"]:
        texts = [
            path for path in sorted((file / name).glob("*.txt")) if not path.name.startswith(".")
        ]
        if not texts:
            raise SystemExit(f"{file / name} holds no .txt file")
        for path in texts:
            yield next(numbers), {0: path.read_text(encoding="utf-8-sig"), label: name}


READERS = {"tsv": _separated, "csv": _separated, "jsonl": _json_lines, "folders": _folders}

if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]), sys.argv[2:])
