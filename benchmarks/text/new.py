"""Write a text benchmark from a csv: its folder, its rows in three splits, and a suite of its name."""

from __future__ import annotations

import csv
import hashlib
import io
import keyword
import re
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from benchmarks.harness.base.errors import DataError, DefinitionError
from benchmarks.harness.base.paths import BENCHMARKS, CONFIG, ROOT
from benchmarks.text.readers import label_text
from emoe.errors import did_you_mean

TEXT_NAMES = ("text", "sentence", "review", "content")
LABEL_NAMES = ("label", "class", "category", "target")
SPLIT_COLUMN = "split"
PARTS = ("train", "dev", "test")
DEV_SHARE, TEST_SHARE = 0.15, 0.15

_SPLIT_NAMES = {"train": "train", "dev": "dev", "valid": "dev", "validation": "dev", "val": "dev", "test": "test"}
_SEPARATORS = ",;\t|"
_LEAST_ROWS = 40
_LEAST_ROWS_OF_A_LABEL = 10  # on average
_NO_LABEL = {"", "nan", "null"}  # but -1 and "none" may well be classes

Row = tuple[str, str]


@dataclass(frozen=True)
class Read:
    """The rows of one file: text and label, by the split that the file says, which is None where it says none.

    ``dropped`` rows have no text or no label.
    """

    rows: dict[str | None, list[Row]] = field(default_factory=dict)
    dropped: int = 0


def new_benchmark(
    name: str,
    file: Path,
    *,
    text: str | None = None,
    label: str | None = None,
    others: Mapping[str, Path] | None = None,
) -> str:
    """Write ``benchmarks/<name>`` and ``config/<name>.yaml``. Where anything is wrong, nothing is written.

    The splits are those of ``others``, else of the column ``split``, else drawn by the hash of the text: the same text is always
    in the same split, whatever stands beside it.

    Args:
        name: of the benchmark, its suite and its target.
        file: UTF-8, its cells separated by commas, semicolons, tabs or bars; the first line names the columns.
        text: column of the text; by default the one with a usual name.
        label: column of the label, likewise.
        others: files of their own for ``dev`` and ``test``; ``file`` is then what is trained on.

    Returns:
        What was written, for the reader.

    Raises:
        DefinitionError: the name cannot be taken.
        DataError: a file cannot be read, or is no set of labelled texts.
    """
    _check_name(name)
    files = {"train": file, **(others or {})}
    found = {part: read_rows(path, text, label) for part, path in files.items()}
    dropped = sum(read.dropped for read in found.values())
    if others:
        splits = {part: [row for rows in read.rows.values() for row in rows] for part, read in found.items()}
    else:
        splits = _splits(found["train"].rows, file)
    if "dev" not in splits:
        splits |= divided(splits["train"], {"dev": DEV_SHARE})
    labels = _labels(splits, file)
    _write(name, splits, labels)
    counts = ", ".join(f"{len(splits[part])} {part}" for part in PARTS if part in splits)
    left_out = f"; {dropped} rows without text or label left out" if dropped else ""
    return f"wrote benchmarks/{name} ({counts} rows; labels {', '.join(labels)}{left_out}) and config/{name}.yaml"


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise DefinitionError(f"'{name}' is no name for a benchmark: take small letters, digits and _, a letter first")
    rules = [path.read_text() for path in (ROOT / "Snakefile", *sorted((ROOT / "workflow/rules").glob("*.smk")))]
    if re.search(rf"^rule {name}:", "\n".join(rules), re.MULTILINE) or name.startswith(("run_", "tables_of_")):
        raise DefinitionError(f"'{name}' is a rule of the workflow; take another name")
    for path in (BENCHMARKS / name, BENCHMARKS / f"{name}.py", CONFIG / f"{name}.yaml"):
        if path.exists():
            raise DefinitionError(f"{path} exists; take another name than '{name}'")


def read_rows(file: Path, text: str | None = None, label: str | None = None) -> Read:
    """The labelled texts of a file of separated cells.

    Args:
        file: see :func:`new_benchmark`.
        text: column of the text.
        label: column of the label.

    Raises:
        DataError: no such file or column, or a line that is not like the first; names it.
    """
    names, lines = _cells(file)
    columns = {
        "text": _column(file, names, "text", text, TEXT_NAMES),
        "label": _column(file, names, "label", label, LABEL_NAMES),
    }
    if columns["text"] == columns["label"]:
        raise DataError(
            f"{file}: text and label are both the column '{columns['text']}'; name two by --text and --label"
        )
    places = [names.index(column) for column in columns.values()]
    split = names.index(SPLIT_COLUMN) if SPLIT_COLUMN in names else None
    rows: dict[str | None, list[Row]] = {}
    dropped = 0
    for number, cells in lines:
        if len(cells) != len(names):
            raise DataError(f"{file}, line {number} has {len(cells)} cells, and the first line {len(names)}")
        written, called = cells[places[0]].strip(), label_text(cells[places[1]])
        if not written or called.casefold() in _NO_LABEL:
            dropped += 1
            continue
        part = None if split is None else _part(file, number, cells[split])
        rows.setdefault(part, []).append((written, called))
    return Read(rows, dropped)


def _cells(file: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """The names of the columns, and the cells of the other lines with the line on which each row begins; empty lines are none."""
    if not file.is_file():
        near = did_you_mean(file.name, [path.name for path in file.parent.glob("*.[ct]sv")])
        raise DataError(f"{file} is {'a folder' if file.is_dir() else 'no file'}{near}")
    try:
        content = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file} is not UTF-8: byte {error.start} is {error.object[error.start]:#x}; save it as UTF-8"
        ) from error
    if not content.strip():
        raise DataError(f"{file} is empty")
    first = content.lstrip().partition("\n")[0]
    separator = max(_SEPARATORS, key=lambda sign: len(next(csv.reader([first], delimiter=sign))))
    reader, found, begin = csv.reader(io.StringIO(content), delimiter=separator, strict=True), [], 1
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                found.append((begin, cells))
            begin = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{file}, line {begin}: {error}") from error
    names = [name.strip() for name in found[0][1]]
    if len(names) < 2:
        raise DataError(
            f"{file} has one column, '{names[0]}': a text and its label are two, separated by , ; | or a tab"
        )
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise DataError(f"{file} has two columns '{twice[0]}'; rename one of them")
    return names, found[1:]


def _column(file: Path, names: Sequence[str], kind: str, asked: str | None, usual: Sequence[str]) -> str:
    if asked is not None:
        if asked not in names:
            raise DataError(f"{file} has no column '{asked}'{did_you_mean(asked, names)}")
        return asked
    found = [name for name in names if name.casefold() in usual]
    if len(found) != 1:
        what = f"{len(found)} columns that may be" if found else "no column named like"
        raise DataError(f"{file} has {what} the {kind}; say by --{kind} which of {', '.join(names)} it is")
    return found[0]


def _part(file: Path, line: int, value: str) -> str:
    called = value.strip().casefold()
    if called not in _SPLIT_NAMES:
        raise DataError(
            f"{file}, line {line}: '{value}' in the column 'split' is no split{did_you_mean(called, _SPLIT_NAMES)}"
        )
    return _SPLIT_NAMES[called]


def _splits(rows: Mapping[str | None, list[Row]], file: Path) -> dict[str, list[Row]]:
    """The splits that a file's column names, else those that the hash of the text draws."""
    named = {part: found for part, found in rows.items() if part is not None}
    if not named:
        return divided(rows.get(None, []), {"dev": DEV_SHARE, "test": TEST_SHARE})
    if "train" not in named or len(named) == 1:
        raise DataError(
            f"{file}: the column 'split' has only {', '.join(named)}; it needs train, and dev or test beside it"
        )
    return named


def divided(rows: Sequence[Row], shares: Mapping[str, float]) -> dict[str, list[Row]]:
    """Rows by split: what of them is in none of the shares is ``train``. The hash of a text decides, so that twins stay together."""
    found: dict[str, list[Row]] = {"train": [], **{part: [] for part in shares}}
    for row in rows:
        place, chosen = int.from_bytes(hashlib.sha256(row[0].encode()).digest()[:6], "big") / 2**48, "train"
        for part, share in shares.items():
            if 0 <= place < share:
                chosen = part
            place -= share
        found[chosen].append(row)
    return found


def _labels(splits: Mapping[str, Sequence[Row]], file: Path) -> list[str]:
    """The labels in order: numbers by their size, names by the alphabet."""
    count = sum(map(len, splits.values()))
    if count < _LEAST_ROWS or not all(splits.values()):
        empty = [part for part, rows in splits.items() if not rows]
        raise DataError(
            f"{file}: {count} rows with text and label"
            + (
                f", none of them for {empty[0]}"
                if empty and count >= _LEAST_ROWS
                else f"; it takes {_LEAST_ROWS} at least"
            )
        )
    labels = {called for rows in splits.values() for _, called in rows}
    if len(labels) < 2:
        raise DataError(f"{file}: all rows have the label '{next(iter(labels))}'; there is nothing to tell apart")
    if count < len(labels) * _LEAST_ROWS_OF_A_LABEL:
        raise DataError(
            f"{file}: {len(labels)} labels in {count} rows, fewer than {_LEAST_ROWS_OF_A_LABEL} rows a label; is the column of the label the right one (--label)?"
        )
    if missing := sorted(labels - {called for _, called in splits["train"]}):
        raise DataError(f"{file}: no row with the label '{missing[0]}' is in train, so it cannot be learned")
    numbers = all(re.fullmatch(r"-?\d+", called) for called in labels)
    return sorted(labels, key=int) if numbers else sorted(labels)


def _write(name: str, splits: Mapping[str, Sequence[Row]], labels: Sequence[str]) -> None:
    """Write the folder as a whole, then the configuration of the suite."""
    text = repr([(part, list(splits[part])) for part in PARTS if part in splits])
    rows = f"rows-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    values = {
        "name": name,
        "title": name.replace("_", " ").capitalize(),
        "path": f"benchmarks/{name}/{rows}",
        "labels": yaml.safe_dump(list(labels), default_flow_style=True, width=10**6, allow_unicode=True).strip(),
        "splits": ", ".join(f"{part}: {part}" for part in PARTS if part in splits),
        "rows": ", ".join(f"{part}: {len(splits[part])}" for part in PARTS if part in splits),
    }
    with tempfile.TemporaryDirectory(dir=BENCHMARKS.parent, prefix=".new-") as place:
        folder = Path(place) / name
        (folder / rows).mkdir(parents=True)
        for part, found in splits.items():
            with (folder / rows / f"{part}.csv").open("w", encoding="utf-8", newline="") as file:
                csv.writer(file, lineterminator="\n").writerows([("text", "label"), *found])
        for file_name, template in _FILES.items():
            (folder / file_name).write_text(template.format(**values), encoding="utf-8")
        folder.rename(BENCHMARKS / name)
    (CONFIG / f"{name}.yaml").write_text(_CONFIG.format(**values), encoding="utf-8")


_CONFIG = """# yaml-language-server: $schema=../benchmarks/schemas/config.schema.json
# The benchmark {name} alone: `snakemake --cores 2 {name}`
suite: {name}
benchmarks: [{name}]
"""

_FILES = {
    "__init__.py": '"""{title}: a text benchmark from a csv."""\n',
    "README.md": """# {title}

Text classification, from a csv by `python -m benchmarks new`.

    snakemake --cores 2 {name}

Its rows are in `{path}`. The digits are a hash of the rows: other rows are other runs.
What is compared stands in `benchmark.yaml`, what the labels are in `tasks.yaml`; docs/adding.md says how to change them.
""",
    "tasks.yaml": """# yaml-language-server: $schema=../schemas/tasks.schema.json
tasks:
  {name}:
    title: {title}
    source: {{path: {path}}}
    fields: [text]
    label: label
    labels: {labels}
    metric: accuracy
    # where the csv does not say which row is in which split, the hash of the text does: 70 % train, 15 % dev, 15 % test
    splits: {{{splits}}}
    rows: {{{rows}}}
    download_instructions: "`python -m benchmarks new` writes it from a csv"
""",
    "benchmark.yaml": """# yaml-language-server: $schema=../schemas/text.schema.json
version: 1
title: {title}
pipeline: benchmarks.glue.pipeline
tasks: tasks.yaml
tables: [results, tasks, tests, cost, choices]
figures: {{}}
baseline: vanilla

# of models with six layers, as minilm is
method_defaults:
  gmoe: {{num_experts: 6, top_k: 2, layers: [5]}}
  emoe: {{num_experts: 16, top_k_fraction: 0.5, layers: [5]}}

# names of benchmarks/methods.yaml
methods:
  vanilla: {{}}
  emoe: {{}}
  random_partition: {{}}

training:
  epochs: 3
  batch_size: 8
  eval_batch_size: 32
  max_length: 64
  train_rows: null
  eval_rows: null
  weight_decay: 0.0
  warmup: 0.0
  sampling: group_by_length
  checkpoint_selection: best
  patience: null
  gradient_accumulation_steps: 1
  precision: fp32
  validation_fraction: 0.1
  lora: null
  keep_weights: false
  evaluate_ood: false

suites:
  {name}:
    grid:
      - model: [minilm]
        task: [{name}]
        method: [vanilla, emoe, random_partition]
        learning_rate: [1.0e-4]
        seed: [0, 1]
""",
}
