"""Numbers over time: the blessed ones, how far machines are apart, and whether finished runs repeat."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

import click

from benchmarks.commands.shell import AS_JSON, SUITE, THREADS, benchmark_option, command, load_suite


@command("Compare a suite's numbers with the blessed ones.")
@SUITE
@AS_JSON
@click.option("--elsewhere", is_flag=True, help="Judge as if this were another machine than the one that blessed.")
def check(suite: str, as_json: bool, elsewhere: bool) -> None:
    """Compare a suite's numbers with the blessed ones; ends with status 1 where one changed, is missing or is new.

    On the machine that blessed them numbers have to be equal to the last digit, on another one within the spread between machines that was
    measured (`spread`). Times are shown and decide nothing.
    """
    from benchmarks.harness.results.regression import compare

    comparison = compare(load_suite(suite).runs, suite, elsewhere=elsewhere)
    click.echo(comparison.to_json() if as_json else str(comparison))
    if not comparison.passed:
        sys.exit(1)


@command("Run some finished runs again: do they repeat?")
@SUITE
@click.option("--runs", "count", type=click.IntRange(min=1), default=3, show_default=True, help="How many are drawn.")
@click.option("--seed", type=int, default=None, help="Of the drawing; by default another one every time.")
@AS_JSON
def verify(suite: str, count: int, seed: int | None, as_json: bool) -> None:
    """Execute finished runs of a suite again, drawn at random, and compare their numbers; ends with status 1 where one is another.

    It happens in a temporary folder: what the runs wrote stays as it is. On the machine that made them numbers have to be equal to the last
    digit, on another one within the spread between machines that was measured (`spread`).
    """
    import random

    from benchmarks.harness.run.verification import verify as verify_runs

    loaded = load_suite(suite)
    seed = random.SystemRandom().randrange(2**16) if seed is None else seed
    found = verify_runs(
        loaded.runs, suite, count, seed, say=lambda text: click.echo(f"{text} (--seed {seed})", err=True)
    )
    click.echo(found.to_json() if as_json else str(found))
    if not found.passed:
        sys.exit(1)


@command("Make a suite's present numbers the blessed ones.")
@SUITE
def bless(suite: str) -> None:
    """Make a suite's present numbers the reference that `check` compares with.

    Only in a clean checkout, and only numbers that repeat: the cheapest run of every benchmark is run once more and compared exactly.
    It takes as long as those runs did, half a minute for smoke and some minutes for mini; how long is said at the start.
    """
    from benchmarks.harness.run.blessing import bless as bless_runs

    click.echo(f"wrote {bless_runs(load_suite(suite).runs, suite, say=click.echo)}")


@command("Measure how far numbers are apart between machines.")
@SUITE
@click.option(
    "--sample",
    type=click.Choice(["all", "seeds", "cheapest", "none"]),
    default="cheapest",
    show_default=True,
    help="Every run, one seed of each, the cheapest of each benchmark, or none: what is blessed on another machine alone.",
)
@benchmark_option("Only these; several may be named.", multiple=True)
@click.option("--jobs", default=1, show_default=True, help="Runs at a time.")
@click.option(
    "--add", is_flag=True, help="Keep what was measured before, on another machine perhaps, where it is larger."
)
def spread(
    suite: str, sample: Literal["all", "seeds", "cheapest", "none"], benchmark: tuple[str, ...], jobs: int, add: bool
) -> None:
    """Measure how far a suite's numbers are apart between machines: the tolerances of `check` on another one.

    Runs finished runs again under other threads and kernels of this processor; four times as long as they took. Needs a clean checkout.
    """
    from benchmarks.harness.run.spread import measure

    runs = [run for run in load_suite(suite, *benchmark).runs if not benchmark or run.benchmark in benchmark]
    click.echo(f"wrote {measure(runs, suite, sample, jobs, say=click.echo, add=add)}")


@command("Run finished runs once more, in a folder.", hidden=True)
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("runs", nargs=-1)
@SUITE
@THREADS
@click.option("--jobs", default=1, help="Runs at a time.")
def again(folder: Path, runs: tuple[str, ...], suite: str, threads: int, jobs: int) -> None:
    """Run RUNS of a suite once more, in FOLDER."""
    from benchmarks.harness.run.spread import run_again

    known = load_suite(suite).runs_by_folder
    run_again([known[name] for name in runs], folder, threads, jobs)


COMMANDS = (check, verify, bless, spread, again)
