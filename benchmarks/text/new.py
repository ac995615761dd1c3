"""Create a text benchmark from a csv: a copy of ``template/``, the rows, and a suite."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from string import Template

from benchmarks.harness.base import (
    BENCHMARKS,
    CONFIG,
    DataError,
    DefinitionError,
    atomic_write,
    write_text,
)
from benchmarks.harness.config.names import check_name
from benchmarks.harness.report.artifacts import all_artifacts
from benchmarks.text.data import label_text, read_csv
from emoe.errors import did_you_mean

_TEMPLATE = Path(__file__).with_name("template")
_NO_LABEL = {"", "nan", "null"}  # missing labels; -1 and none are not here: they may be classes


def new_benchmark(name: str, file: Path, text: str = "text", label: str = "label") -> None:
    """Write a new benchmark to ``benchmarks/<name>``, and its suite to ``config/<name>.yaml``.

    Args:
        name: The name of the benchmark, its suite and its target.
        file: The csv, with a header.
        text: The column of the text.
        label: The column of the label.

    Raises:
        DefinitionError: The name is invalid or taken, or the workflow uses it.
        DataError: The file cannot be read, lacks a column, or has fewer than two labels.
    """
    _check_name(name)
    labels = _labels(file, text, label)
    # the name changes with the content, so that changed rows make new runs
    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:8]
    csv_name = f"rows-{digest}.csv"
    # the texts for the placeholders of the templates
    values = {
        "text": _yaml(text),
        "label": _yaml(label),
        "labels": _yaml(labels),
        "name": name,
        "title": name.replace("_", " ").capitalize(),
        "csv": f"benchmarks/{name}/{csv_name}",
    }
    folder = BENCHMARKS / name
    folder.mkdir()
    with atomic_write(folder / csv_name) as temporary:
        temporary.write_bytes(file.read_bytes())
    # the suite goes to config/, the other files to the benchmark's folder
    for template in _TEMPLATE.iterdir():
        target = folder / template.name
        if template.name == "config.yaml":
            target = CONFIG / f"{name}.yaml"
        content = Template(template.read_text(encoding="utf-8"))
        write_text(target, content.substitute(values))


def _yaml(value: object) -> str:
    """Format a value as one line of YAML. JSON is valid YAML."""
    return json.dumps(value, ensure_ascii=False)


def _check_name(name: str) -> None:
    """Raise a DefinitionError if a benchmark, a suite or a target cannot have this name."""
    check_name(name)
    for path in (BENCHMARKS / name, BENCHMARKS / f"{name}.py", CONFIG / f"{name}.yaml"):
        if path.exists():
            raise DefinitionError(f"{path} exists; choose another name than '{name}'")
    # the workflow has a target for each benchmark, and for each data set with its own tables
    targets = [artifacts.name for artifacts in all_artifacts()]
    if name in targets:
        raise DefinitionError(f"'{name}' is the target of a set's tables; choose another name")


def _labels(file: Path, text: str, label: str) -> list[str]:
    """Return the labels of a csv: numbers sorted by value, names alphabetically.

    Raises:
        DataError: The csv cannot be read, lacks a column, or has fewer than two labels.
    """
    rows = read_csv(file)
    for column in (text, label):
        if column not in rows:
            near = did_you_mean(column, rows)
            raise DataError(f"{file} has no column '{column}'{near}; set it with --text or --label")
    values = {label_text(cell) for cell in rows[label]}
    labels = {value for value in values if value.casefold() not in _NO_LABEL}
    if not labels:
        raise DataError(f"{file}: no row has a label; a benchmark needs two labels")
    if len(labels) == 1:
        (only,) = labels
        raise DataError(f"{file}: the only label is '{only}'; a benchmark needs two labels")
    are_numbers = all(re.fullmatch(r"-?\d+", value) for value in labels)
    if are_numbers:
        return sorted(labels, key=int)
    return sorted(labels)
