"""Blessed numbers and measured spreads: the files in ``results/reference``."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pandas as pd
from pydantic import Field

from benchmarks.harness.base.errors import DefinitionError
from benchmarks.harness.base.files import atomic_write, write_json
from benchmarks.harness.base.paths import REFERENCE
from benchmarks.harness.config.schema import Strict, parse
from benchmarks.harness.results.quantities import COLUMNS, KEYS, quantity_of

MACHINE = "machine"
_BLESSED = [*COLUMNS, MACHINE]
# a value may differ by so many times the largest difference that was seen
FACTOR = 3.0
# what single precision leaves of sums of some thousand terms, where nothing larger was seen
ROUNDING = 1e-6


class MachineFile(Strict):
    """Where and from what numbers were blessed: ``<suite>.json``."""

    commit: str
    """Of the code."""
    machines: dict[str, dict[str, str]]
    """Parts of each machine's fingerprint, by the name that the rows have."""


class Spread(Strict):
    """How far apart machines, threads and kernels were in a quantity, over all benchmarks and parts."""

    quantity: str
    """A metric, or ``first losses``, or ``routing``."""
    largest: float
    """Largest deviation that was seen; see :func:`~benchmarks.harness.results.quantities.deviation`."""
    numbers: Annotated[int, Field(gt=0)]
    """How many comparisons it is the largest of."""


class SpreadFile(Strict):
    """Measured spreads: ``<suite>_spread.json``."""

    made_by: str
    """The command."""
    commit: str
    """Of the code."""
    machine: dict[str, str]
    """Parts of the fingerprint of the machine that was compared with."""
    variants: list[str]
    """What was varied."""
    runs: int
    """How many runs were run again under each."""
    spreads: list[Spread]


@dataclass(frozen=True)
class Tolerances:
    """How far a number from another machine may be from the blessed one.

    Attributes:
        spreads: largest deviation that was seen, by quantity.
    """

    spreads: Mapping[str, float]

    def of(self, part: str, metric: str, one: float = 0.0) -> float:
        """The largest deviation that passes.

        Args:
            part: of the number.
            metric: of the number.
            one: what one row or one choice makes of what is counted, which may differ by one more than was seen; 0 for what is measured,
                which may differ by :data:`FACTOR` times as much as was seen.
        """
        seen = self.spreads.get(quantity_of(part, metric), 0.0)
        return max(seen + one * (1 + ROUNDING) if one else FACTOR * seen, ROUNDING)


@dataclass(frozen=True)
class Reference:
    """Blessed numbers: a row a run and number, with the machine that made it."""

    rows: pd.DataFrame
    machines: Mapping[str, Mapping[str, str]]


def machine_name(parts: Mapping[str, str]) -> str:
    """A short name for a fingerprint, by its content; none for one that was not recorded."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:8] if parts else ""


def reference_file(suite: str, folder: Path = REFERENCE) -> Path:
    """Where a suite's blessed numbers are."""
    return folder / f"{suite}.csv"


def spread_file(suite: str, folder: Path = REFERENCE) -> Path:
    """Where a suite's measured spreads are."""
    return folder / f"{suite}_spread.json"


def write_reference(
    suite: str,
    reference: Reference,
    commit: str,
    folder: Path = REFERENCE,
) -> Path:
    """Write blessed numbers and their machines."""
    path = reference_file(suite, folder)
    with atomic_write(path) as temporary:
        reference.rows[_BLESSED].to_csv(temporary, index=False, lineterminator="\n")
    machines = {name: dict(sorted(parts.items())) for name, parts in reference.machines.items()}
    content = MachineFile(commit=commit, machines=machines)
    write_json(path.with_suffix(".json"), content.model_dump())
    return path


def read_reference(suite: str, folder: Path = REFERENCE) -> Reference:
    """Read blessed numbers.

    Raises:
        DefinitionError: there are none, or the file is damaged or of an older form.
    """
    path = reference_file(suite, folder)
    again = f"bless a run of the suite (`python -m benchmarks bless --suite {suite}`)"
    try:
        text = path.read_text()
        machines = json.loads(path.with_suffix(".json").read_text())
    except FileNotFoundError as error:
        if error.filename == str(path):
            raise DefinitionError(f"{path} does not exist: {again}") from error
        raise DefinitionError(
            f"{path} has no {path.with_suffix('.json').name} beside it, which says on what it was made: {again}"
        ) from error
    except json.JSONDecodeError as error:
        raise DefinitionError(f"{path.with_suffix('.json')} is damaged ({error}): {again}") from error
    try:
        rows = pd.read_csv(io.StringIO(text), keep_default_na=False, dtype=dict.fromkeys(_BLESSED, str))
        rows = rows[_BLESSED].astype({"seed": int})
    except (KeyError, ValueError) as error:
        raise DefinitionError(f"{path} is no table of blessed numbers, or one of an older form: {again}") from error
    twice = rows[rows.duplicated(KEYS)]
    if len(twice):
        raise DefinitionError(f"{path} has two rows of '{' '.join(map(str, twice.iloc[0][KEYS]))}': {again}")
    read = parse(machines, MachineFile, str(path.with_suffix(".json")))
    return Reference(rows, read.machines)


def read_spreads(path: Path) -> SpreadFile:
    """Measured spreads.

    Raises:
        DefinitionError: the file is damaged.
    """
    try:
        content = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise DefinitionError(f"{path} is damaged: {error}") from error
    return parse(content, SpreadFile, str(path))


def read_tolerances(suite: str, folder: Path = REFERENCE) -> Tolerances:
    """The measured spreads of a suite and of the smoke suite, which every method is in: the larger of both.

    Raises:
        DefinitionError: neither was measured, or a file is damaged.
    """
    files = {spread_file(suite, folder), spread_file("smoke", folder)}
    spreads: dict[str, float] = {}
    for path in [path for path in files if path.exists()]:
        for row in read_spreads(path).spreads:
            spreads[row.quantity] = max(spreads.get(row.quantity, 0.0), row.largest)
    if not spreads:
        raise DefinitionError(
            f"{spread_file(suite, folder)} does not exist, and these numbers are of another machine than the blessed ones: "
            f"measure how far machines are apart (`python -m benchmarks spread --suite {suite}`)"
        )
    return Tolerances(spreads)
