"""The numbers by which `check` compares finished runs, and how far apart two of them are."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pandas as pd

from benchmarks.harness.base.errors import DefinitionError
from benchmarks.harness.config.catalogue import Judged, load_metrics
from benchmarks.harness.config.kinds import OOD_MEAN
from benchmarks.harness.config.runs import Run
from benchmarks.harness.results.records import AS, GROUP_KEYS, ROUTING, collect_from

KEYS = ["run", "seed", "part", "set", "metric"]
COLUMNS = [*KEYS, "value"]
_ID = "id"
PROBE, LOADS, LOSS = "probe", "loads", "loss_"
# of a model before it is trained, and of one that another run has trained, which carries the rounding of its training
LOGITS, TRAINED_LOGITS = "logits", "trained_logits"
# counts, names and digests of what was read, converted and trained
CONTENT, CONVERSION, TRAINED = "content", "conversion", "trained"
_EXACT = {CONTENT, CONVERSION, TRAINED}


def judged_how(metric: str) -> Judged:
    """How a number is judged: ``exact`` on every machine, ``measured`` by the spread between machines, ``shown`` alone."""
    if metric in _EXACT:
        return "exact"
    if metric in (LOADS, LOGITS, TRAINED_LOGITS) or metric.startswith(LOSS):
        return "measured"
    known = load_metrics()
    return known[metric].judged if metric in known else "shown"


def quantities(read: Iterable[tuple[Run, Mapping[str, Any]]]) -> pd.DataFrame:
    """One row a number of finished runs, from their ``metrics.json``: :data:`COLUMNS`, values as text with all digits, and the run's ``id``.

    ``run`` says what was run, in words, without the seed. What is only shown is there for measurements, not what a run took.

    Raises:
        DefinitionError: two runs that differ in nothing by which they are named.
    """
    pairs = list(read)
    records = collect_from((run, dict(found)) for run, found in pairs)
    named = records["metric"].isin(set(load_metrics()))
    records = records[named & ~records["part"].isin(["cost", "dev_best"])]
    names = {run_id: _name(first) for run_id, first in records.groupby("run_id", sort=False).first().iterrows()}
    taken: dict[tuple[str, int], str] = {}
    rows = []
    for run, found in pairs:
        if run.id not in names:
            continue
        name, seed = names[run.id], int(run.spec["seed"])
        if taken.setdefault((name, seed), run.id) != run.id:
            raise DefinitionError(f"the runs {run.id} and {taken[name, seed]} cannot be told apart by '{name}'")
        rows += [(name, seed, *more, run.id) for more in _of_itself(run, found)]
    rows += [
        (
            names[row.run_id],
            int(row.seed),
            row.part,
            row.eval_task,
            row.metric,
            _text(row.metric, float(row.value)),
            row.run_id,
        )
        for row in records.itertuples()
    ]
    return pd.DataFrame(rows, columns=[*COLUMNS, _ID]).sort_values(KEYS, kind="stable", ignore_index=True)


def _name(record: pd.Series[Any]) -> str:
    values = [f"{record[key]:g}" if key == "learning_rate" else str(record[key]) for key in GROUP_KEYS]
    return " ".join(value for value in values if value)


def _text(metric: str, value: float) -> str:
    """All digits; counts as whole numbers."""
    return str(int(value)) if judged_how(metric) == "exact" and value.is_integer() else repr(value)


def _of_itself(run: Run, found: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    """What a run says of itself beside scores: its probe, its model and its data."""
    probe = found.get(PROBE, {})
    for number, loss in enumerate(probe.get("losses", ()), 1):
        yield PROBE, "", f"{LOSS}{number}", loss
    if probe.get(LOGITS):
        name = TRAINED_LOGITS if "candidates" in run.spec else LOGITS
        yield PROBE, "", name, " ".join(repr(value) for value in probe[LOGITS].values())
    for layer, loads in probe.get(LOADS, {}).items():
        yield PROBE, f"layer {layer}", LOADS, " ".join(map(str, loads))
    model = found.get("model", {})
    for layer in model.get("conversion", ()):
        place = f"layer {layer['index']}"
        yield "model", place, CONVERSION, f"{layer['experts']} experts of {layer['expert_size']}, top {layer['top_k']}"
        if layer.get("explained") is not None:
            yield "model", place, "inertia", repr(1 - layer["explained"])
    for group, content in model.get("trained", {}).items():
        yield "model", group, TRAINED, f"{content['parameters']} {content['names']}"
    for part, summary in found.get("data", {}).items():
        yield "data", part, CONTENT, _content(summary)


def _content(summary: Mapping[str, Any]) -> str:
    """Counts and digests of a set; where it came from may differ."""
    words = [f"{name} {value}" for name, value in sorted(summary.items()) if isinstance(value, int)]
    words += [f"{label}: {count}" for label, count in summary.get("labels", {}).items()]
    return ", ".join([*words, *([summary["digest"]] if "digest" in summary else [])])


def quantity_of(part: str, metric: str) -> str:
    """Under which name the spread of a number is measured.

    All first losses are one quantity, and all that is told of the routing of a trained model; losses out of domain, which a rounding moves farther, are one of their own.
    """
    if metric.startswith(LOSS):
        return "first losses"
    if metric in ROUTING:
        return "routing"
    return "ood loss" if metric == "loss" and part.partition(AS)[0] == "ood" else metric


def one_counts(rows: pd.DataFrame) -> dict[tuple[str, int, str, str, str], float]:
    """By how much one row moves a score at most, and one choice the loads, by the :data:`KEYS` of a row that is counted from something.

    Scores are of the sets whose classes are known; by one row of the smallest class, a mean over sets by the mean of theirs.
    """
    sets = {
        (str(row.run), int(row.seed), str(row.set)): _smallest_share(row.value)
        for row in rows[rows["metric"] == CONTENT].itertuples()
    }
    others: dict[tuple[str, int], list[float]] = {}
    for (run, seed, place), share in sets.items():
        if place.startswith("ood:"):
            others.setdefault((run, seed), []).append(share)
    found = {}
    for row in rows.itertuples():
        key = str(row.run), int(row.seed), str(row.part), str(row.set), str(row.metric)
        run, seed, part, name, metric = key
        if metric == LOADS:
            found[key] = 1 / max(sum(map(int, row.value.split(" "))), 1)
        elif (base := part.partition(AS)[0]) in ("dev", "test", "ood") and metric != "loss":
            places = (f"{base}:{name}", *(() if base == "ood" else (base, f"{name} in")))
            found[key] = max(sets.get((run, seed, place), 0.0) for place in places)
        elif base == OOD_MEAN and (run, seed) in others:
            found[key] = statistics.mean(others[run, seed])
    return found


def _smallest_share(content: str) -> float:
    """What one row of the smallest class is of the mean over classes."""
    counts = [int(count) for count in re.findall(r": (\d+)", content)]
    return 1 / (len(counts) * max(min(counts), 1)) if counts else 0.0


def deviation(metric: str, before: str, after: str) -> float:
    """How far apart two values are: 0 is equal, and a spread is measured in it.

    Of experts' loads it is the share of choices that moved; of first losses and logits the largest difference relative to their size; of other
    numbers the difference, relative above 1; of what has to be the same everywhere it is 0 or infinite.
    """
    if before == after:
        return 0.0
    if judged_how(metric) == "exact":
        return math.inf
    old, new = ([float(part) for part in value.split(" ")] for value in (before, after))
    if len(old) != len(new) or not all(map(math.isfinite, [*old, *new])):
        return math.inf
    if metric == LOADS:
        return sum(abs(a / max(sum(old), 1) - b / max(sum(new), 1)) for a, b in zip(old, new, strict=True)) / 2
    largest = max(abs(a - b) for a, b in zip(old, new, strict=True))
    size = max(map(abs, old))
    relative = metric in (LOGITS, TRAINED_LOGITS) or metric.startswith(LOSS)
    return largest / (max(size, 1e-12) if relative else max(size, 1.0))
