"""Measure how far numbers of the same run are apart between machines: with other threads and other kernels of the same processor."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from benchmarks.harness.base.errors import RunError
from benchmarks.harness.base.files import write_json
from benchmarks.harness.base.paths import REFERENCE, RUNS
from benchmarks.harness.config.runs import Run
from benchmarks.harness.results.quantities import KEYS, deviation, judged_how, quantity_of
from benchmarks.harness.results.records import read_metrics
from benchmarks.harness.results.reference import (
    Reference,
    Spread,
    SpreadFile,
    read_reference,
    read_spreads,
    reference_file,
    spread_file,
)
from benchmarks.harness.results.regression import as_reference
from benchmarks.harness.run.blessing import clean_commit
from benchmarks.harness.run.repetition import Repetition, borrow, cheapest, prepare_folder, repeat

Sample = Literal["all", "seeds", "cheapest", "none"]


@dataclass(frozen=True)
class Variant:
    """What stands for another machine.

    Attributes:
        name: for readers.
        threads: CPU threads.
        variables: of the environment, read when torch is imported.
        compiled: experts by compiled kernels.
    """

    name: str
    threads: int = 1
    variables: Mapping[str, str] = field(default_factory=dict)
    compiled: bool = True


# threads that wait leave the cores to other runs
_TWO = {"OMP_WAIT_POLICY": "PASSIVE"}
# Kernels of other processors on this one, other orders of summation, and no compiled experts.
VARIANTS = (
    Variant("AVX2", 1, {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "AVX2"}),
    Variant("SSE", 1, {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE"}),
    Variant("2 threads", 2, _TWO),
    Variant("2 threads, no compiled experts", 2, _TWO, compiled=False),
)


def sample(runs: Sequence[Run], which: Sample) -> list[Run]:
    """All finished runs, or one seed of each, or the cheapest of each benchmark, or none; with those that they evaluate."""
    if which == "none":
        return []
    if which == "all":
        return list(runs)
    chosen = cheapest(runs) if which == "cheapest" else _one_seed(runs)
    folders = {folder for run in chosen for folder in run.spec.get("candidates", ())}
    return [run for run in runs if run in chosen or run.folder in folders]


def _one_seed(runs: Sequence[Run]) -> list[Run]:
    first: dict[str, Run] = {}
    for run in runs:
        spec = {key: value for key, value in run.spec.items() if key not in ("seed", "candidates")}
        first.setdefault(repr(sorted(spec.items())), run)
    return list(first.values())


def run_again(runs: Sequence[Run], folder: Path, threads: int, jobs: int) -> None:
    """Execute runs in another folder; those that evaluate others after those.

    Raises:
        RunError: one failed.
    """
    prepare_folder(folder)
    for late in (False, True):
        some = [run for run in runs if ("candidates" in run.spec) == late]
        if failed := repeat([Repetition(run, folder.resolve(), threads) for run in some], jobs=jobs):
            raise RunError(f"{failed[0].run.id} failed when it was run again: {failed[0].last}")


def measure(
    runs: Sequence[Run],
    suite: str,
    which: Sample,
    jobs: int,
    folder: Path = REFERENCE,
    say: Callable[[str], None] = print,
    *,
    add: bool = False,
) -> Path:
    """Run a sample of finished runs again under every one of :data:`VARIANTS`, and write the largest deviation of every quantity.

    Where numbers of another machine are blessed, the differences of all finished runs to them count as well: that is what the variants stand for.
    With the sample ``none`` they are all that counts, and nothing is run.

    Args:
        runs: finished ones.
        suite: which they are of.
        which: of them are run again.
        jobs: runs at a time.
        folder: where references are.
        say: told what is run.
        add: of a quantity that was measured before, on another machine perhaps, keep the larger deviation.

    Raises:
        RunError: a run failed, or there is nothing to compare with.
    """
    commit = clean_commit()
    chosen, varied = sample(runs, which), VARIANTS if which != "none" else ()
    before = as_reference([(run, read_metrics(run)) for run in chosen or runs[:1]])
    largest: dict[str, list[float]] = {}
    for variant in varied:
        say(f"{len(chosen)} runs with {variant.name}")
        with tempfile.TemporaryDirectory(prefix="again-") as temporary:
            place = Path(temporary).resolve()
            again(chosen, suite, place, variant, jobs)
            after = as_reference([(run, read_metrics(run, place / RUNS)) for run in chosen])
        for quantity, apart in deviations(before, after):
            largest.setdefault(quantity, []).append(apart)
    variants = [variant.name for variant in varied]
    elsewhere = _of_another_machine(suite, runs, folder)
    if elsewhere:
        blessed, now, count = elsewhere
        processors = {parts.get("processor", "another machine") for parts in blessed.machines.values()}
        variants.append(f"as blessed on {', '.join(sorted(processors))}, {count} runs")
        for quantity, apart in deviations(blessed, now):
            largest.setdefault(quantity, []).append(apart)
    if not largest:
        raise RunError(
            f"no run of '{suite}' was blessed on another machine, so that there is nothing to compare with: take another --sample than 'none'"
        )
    spreads = [
        Spread(quantity=quantity, largest=max(found), numbers=len(found)) for quantity, found in sorted(largest.items())
    ]
    content = SpreadFile(
        made_by=f"python -m benchmarks spread --suite {suite} --sample {which}; of {', '.join(dict.fromkeys(run.benchmark for run in runs))}",
        commit=commit,
        machine=dict(next(iter(before.machines.values()))),
        variants=variants,
        runs=len(chosen),
        spreads=spreads,
    )
    path = spread_file(suite, folder)
    if add and path.exists():
        content = _larger(read_spreads(path), content)
    write_json(path, content.model_dump())
    return path


def _larger(before: SpreadFile, after: SpreadFile) -> SpreadFile:
    """Two measurements as one."""
    both: dict[str, list[Spread]] = {}
    for spread in (*before.spreads, *after.spreads):
        both.setdefault(spread.quantity, []).append(spread)
    return SpreadFile(
        made_by=f"{before.made_by}; and {after.made_by} ({after.commit[:7]})",
        commit=before.commit,
        machine=before.machine,
        variants=[*before.variants, *after.variants],
        runs=before.runs,
        spreads=[
            Spread(
                quantity=name,
                largest=max(spread.largest for spread in found),
                numbers=sum(spread.numbers for spread in found),
            )
            for name, found in sorted(both.items())
        ],
    )


def _of_another_machine(suite: str, runs: Sequence[Run], folder: Path) -> tuple[Reference, Reference, int] | None:
    """The blessed numbers and those here, where all were made on other machines, of the runs that are the same experiments, and how many these are.

    Names of rows do not say all that shapes a run's numbers; what has to be equal on every machine (rows and their digests, counts, the conversion) does.
    """
    if not reference_file(suite, folder).exists():
        return None
    blessed, now = read_reference(suite, folder), as_reference([(run, read_metrics(run)) for run in runs])
    if set(blessed.machines) & set(now.machines):
        return None
    exact = [
        found.rows[[judged_how(metric) == "exact" for metric in found.rows["metric"]]][[*KEYS, "value"]]
        for found in (blessed, now)
    ]
    both = exact[0].merge(exact[1], on=[*KEYS], how="outer", suffixes=("_blessed", "_now"))
    of_run = ["run", "seed"]
    same = (both["value_blessed"] == both["value_now"]).groupby([both[key] for key in of_run]).all()
    kept = set(same[same].index)
    found = []
    for reference in (blessed, now):
        rows = reference.rows
        chosen = [key in kept for key in rows[of_run].itertuples(index=False, name=None)]
        found.append(Reference(rows[chosen], reference.machines))
    return found[0], found[1], len(kept)


def again(runs: Sequence[Run], suite: str, folder: Path, variant: Variant, jobs: int) -> None:
    """Execute runs under a variant, in a process that is started with its variables.

    Raises:
        RunError: one failed.
    """
    for run in runs:
        borrowed = [name for name in run.spec.get("candidates", ()) if name not in {one.folder for one in runs}]
        borrow(borrowed, folder)
    command = [sys.executable, "-m", "benchmarks", "again", str(folder), "--suite", suite]
    command += ["--threads", str(variant.threads), "--jobs", str(jobs), *(run.folder for run in runs)]
    variables = {**os.environ, **variant.variables}
    if not variant.compiled:  # none in the cache, and nothing to compile with
        variables |= {"XDG_CACHE_HOME": str(folder / "cache"), "CXX": "false"}
    done = subprocess.run(command, env=variables, check=False, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise RunError(f"{variant.name}: {done.stderr.strip().splitlines()[-1:]}")


def deviations(before: Reference, after: Reference) -> list[tuple[str, float]]:
    """How far every number that may differ between machines is from another machine's, with its quantity."""
    merged = before.rows.merge(after.rows, on=KEYS, suffixes=("_before", "_after"))
    return [
        (
            quantity_of(str(row.part), str(row.metric)),
            deviation(str(row.metric), row.value_before, row.value_after),
        )
        for row in merged.itertuples()
        if judged_how(str(row.metric)) == "measured"
    ]
