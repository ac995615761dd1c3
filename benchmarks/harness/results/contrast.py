"""Two finished runs side by side, or two suites' blessed numbers: settings, environment, numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.harness.base.errors import DefinitionError
from benchmarks.harness.base.paths import RUNS
from benchmarks.harness.config.runs import Run, read_run
from benchmarks.harness.results.check import KEYS, numbers_of, read_reference
from benchmarks.harness.results.records import collect_from, read_metrics_file
from emoe.errors import did_you_mean

# of a run, whose name and seed are settings
_OF_A_RUN = ["part", "set", "metric"]


@dataclass(frozen=True)
class Side:
    """One of the two.

    Attributes:
        name: what it is.
        kind: ``run`` or ``suite's blessed numbers``.
        settings: what was run, flat.
        environment: on what, flat.
        numbers: values as text with all digits, by what they are of.
    """

    name: str
    kind: str
    settings: Mapping[str, Any]
    environment: Mapping[str, Any]
    numbers: Mapping[tuple[str, ...], str]


@dataclass(frozen=True)
class Pair:
    """Something of both sides; None where a side has it not.

    Attributes:
        name: what.
        difference: second less first, of numbers.
    """

    name: str
    first: Any
    second: Any
    difference: float | None = None


@dataclass(frozen=True)
class Contrast:
    """What is different, and all numbers.

    Attributes:
        names: of both sides.
        settings: those that differ.
        environment: what of it differs.
        numbers: all of them.
    """

    names: tuple[str, str]
    settings: list[Pair]
    environment: list[Pair]
    numbers: list[Pair]

    @property
    def differing(self) -> list[Pair]:
        """The numbers that are not the same to the last digit."""
        return [pair for pair in self.numbers if pair.first != pair.second]


def contrast(first: str, second: str) -> Contrast:
    """Put two finished runs, or two suites' blessed numbers, side by side.

    Args:
        first: a run's folder, ``metrics.json`` or id, or a ``.json`` of blessed numbers.
        second: another, of the same kind.

    Raises:
        DefinitionError: one is none of these, is not finished, or is damaged; or they are of two kinds.
    """
    one, other = open_side(first), open_side(second)
    if one.kind != other.kind:
        raise DefinitionError(f"{first} is a {one.kind}, {second} is a {other.kind}: compare two of a kind")
    return Contrast(
        (one.name, other.name),
        [pair for pair in _pairs(one.settings, other.settings) if pair.first != pair.second],
        [pair for pair in _pairs(one.environment, other.environment) if pair.first != pair.second],
        list(_number_pairs(one.numbers, other.numbers)),
    )


def open_side(given: str) -> Side:
    """Read what was named.

    Raises:
        DefinitionError: there is no such run, it is not finished, or a file is damaged; names the nearest.
    """
    path = Path(given)
    if path.suffix == ".json" and path.name not in ("run.json", "metrics.json"):
        return _blessed(path)
    folder = path.parent if path.suffix == ".json" else path
    if not folder.is_dir():
        folder = _by_id(given)
    run = read_run(folder / "run.json", anywhere=True)
    found = read_metrics_file(folder / "metrics.json", run)
    return Side(str(folder), "run", flat(run.spec), flat(found.get("environment", {})), _numbers(run, found))


def _by_id(given: str) -> Path:
    """The folder of a run's id, with or without its benchmark."""
    there = {path.parent.name: path.parent for path in RUNS.glob("*/*/run.json")}
    name = given.rpartition("/")[2]
    if name not in there:
        near = did_you_mean(name, there) if there else f"; no run is below {RUNS}"
        raise DefinitionError(f"'{given}' is no folder, file or id of a run{near}")
    return there[name]


def _numbers(run: Run, found: dict[str, Any]) -> dict[tuple[str, ...], str]:
    """What `check` compares, and what the run took."""
    rows = numbers_of([(run, found)]).rows
    costs = collect_from([(run, found)])
    costs = costs[costs["part"] == "cost"]
    took = {("cost", "", str(row.metric)): repr(float(row.value)) for row in costs.itertuples()}
    return _values(rows, _OF_A_RUN) | took


def _blessed(path: Path) -> Side:
    if not path.is_file():
        raise DefinitionError(f"{path} does not exist")
    reference = read_reference(path.stem, path.parent)
    machines = [dict(parts) for parts in reference.machines.values()]
    commit = json.loads(path.read_text())["commit"]  # read and checked a moment ago
    return Side(
        str(path),
        "suite's blessed numbers",
        {"commit": commit},
        flat(machines[0] if len(machines) == 1 else dict(reference.machines)),
        _values(reference.rows, KEYS),
    )


def _values(rows: pd.DataFrame, keys: list[str]) -> dict[tuple[str, ...], str]:
    return {tuple(map(str, key)): str(value) for *key, value in rows[[*keys, "value"]].itertuples(index=False)}


def flat(content: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Nested settings as one level: ``training.epochs``."""
    found: dict[str, Any] = {}
    for key, value in content.items():
        name = f"{above}{key}"
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{name}.")
        else:
            found[name] = value
    return found


def _pairs(first: Mapping[str, Any], second: Mapping[str, Any]) -> Iterator[Pair]:
    for name in dict.fromkeys([*first, *second]):
        yield Pair(name, first.get(name), second.get(name))


def _number_pairs(first: Mapping[tuple[str, ...], str], second: Mapping[tuple[str, ...], str]) -> Iterator[Pair]:
    for key in dict.fromkeys([*first, *second]):
        one, other = first.get(key), second.get(key)
        yield Pair(" ".join(word for word in key if word), one, other, _difference(one, other))


def _difference(first: str | None, second: str | None) -> float | None:
    try:
        found = float(second or "") - float(first or "")
    except ValueError:  # several numbers, words, or nothing
        return None
    return found if math.isfinite(found) else None
