"""Compare numbers with the blessed ones, run finished runs again, and bless numbers."""

from __future__ import annotations

import sys

import click

from benchmarks.commands.shell import AS_JSON, SUITE, command, load_suite


@command("Compare a suite's numbers with the blessed ones.")
@SUITE
@AS_JSON
@click.option("--elsewhere", is_flag=True, help="Judge as if this were another machine than the one that blessed.")
def check(suite: str, as_json: bool, elsewhere: bool) -> None:
    """Compare a suite's numbers with the blessed ones. The exit status is 1 if one changed, is missing or is new.

    On the machine that blessed them, numbers have to be equal to the last digit. On another one they may differ by the
    `tolerance` of their metric in benchmarks/metrics.yaml.
    """
    from benchmarks.harness.results.check import check as check_suite

    comparison = check_suite(load_suite(suite).runs, suite, elsewhere=elsewhere)
    click.echo(comparison.to_json() if as_json else str(comparison))
    if not comparison.passed:
        sys.exit(1)


@command("Run some finished runs again: do they repeat?")
@SUITE
@click.option("--runs", "count", type=click.IntRange(min=1), default=3, show_default=True, help="How many are drawn.")
@click.option("--seed", type=int, default=None, help="Of the drawing; by default another one every time.")
@AS_JSON
def verify(suite: str, count: int, seed: int | None, as_json: bool) -> None:
    """Execute some finished runs of a suite again and compare their numbers. The exit status is 1 if one differs.

    The new runs are written to a temporary folder. On the machine that made the first ones, numbers have to be equal to
    the last digit. On another one they may differ by the `tolerance` of their metric in benchmarks/metrics.yaml.
    """
    import random

    from benchmarks.harness.results.check import verify as verify_runs

    seed = random.SystemRandom().randrange(2**16) if seed is None else seed
    click.echo(f"drawn with --seed {seed}", err=True)
    comparison = verify_runs(load_suite(suite).runs, suite, count, seed, lambda text: click.echo(text, err=True))
    click.echo(comparison.to_json() if as_json else str(comparison))
    if not comparison.passed:
        sys.exit(1)


@command("Make a suite's present numbers the blessed ones.")
@SUITE
def bless(suite: str) -> None:
    """Make a suite's present numbers the reference of `check`.

    The checkout has to be clean, and numbers have to repeat: the fastest run of every benchmark is executed again and
    compared exactly.
    """
    from benchmarks.harness.results.check import bless as bless_suite

    click.echo(f"wrote {bless_suite(load_suite(suite).runs, suite, click.echo)}")


COMMANDS = (check, verify, bless)
