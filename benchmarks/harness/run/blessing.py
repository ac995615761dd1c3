"""Bless a suite's numbers: from a clean checkout, and only numbers that repeat."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from benchmarks.harness.base.errors import DefinitionError, RunError
from benchmarks.harness.base.paths import REFERENCE, ROOT, RUNS
from benchmarks.harness.config.runs import Run
from benchmarks.harness.results.reference import write_reference
from benchmarks.harness.results.regression import judge, present
from benchmarks.harness.run.environment import git
from benchmarks.harness.run.repetition import cheapest
from benchmarks.harness.run.verification import run_again


def clean_commit(root: Path = ROOT) -> str:
    """The commit of the checkout.

    Raises:
        DefinitionError: it is no checkout, or something in it but blessed numbers is not committed.
    """
    try:
        commit = git(root, "rev-parse", "HEAD")
        changed = git(root, "status", "--porcelain", "--", ".", ":(exclude)results/reference")
    except (OSError, subprocess.CalledProcessError) as error:
        raise DefinitionError(f"{root} is no git checkout: blessed numbers belong to a commit") from error
    if changed:
        lines = changed.splitlines()
        raise DefinitionError(
            f"{len(lines)} files are not committed, among them {lines[0].split()[-1]}: commit or remove them, blessed numbers belong to a commit"
        )
    return commit


def bless(
    runs: Sequence[Run], suite: str, folder: Path = REFERENCE, say: Callable[[str], None] = print, root: Path = ROOT
) -> Path:
    """Make the present numbers the reference, after the cheapest run of every benchmark gave the same numbers once more.

    Args:
        runs: of the suite.
        suite: its name.
        folder: where references are.
        say: where to say what is going on.
        root: the checkout.

    Raises:
        DefinitionError: the checkout is not clean, a run is not finished or was made by older code, or a number did not repeat.
        RunError: a run failed when it was run again.
    """
    commit = clean_commit(root)
    numbers, unfinished = present(runs, suite)
    if unfinished:
        raise DefinitionError(f"{len(unfinished)} of {len(runs)} runs are not finished, the first is {unfinished[0]}")
    if "" in numbers.machines:
        raise DefinitionError(
            f"runs below {RUNS} do not say on what they ran: they were made by older code; delete them and run them again"
        )
    refuse_what_does_not_repeat(cheapest(runs), say)
    return write_reference(suite, numbers, commit, folder)


def refuse_what_does_not_repeat(runs: Sequence[Run], say: Callable[[str], None] = print) -> None:
    """Execute finished runs once more in a temporary folder and compare every number.

    Raises:
        DefinitionError: a number is another one.
        RunError: a run failed.
    """
    repeated = run_again(runs, say)
    for name, last in repeated.failed.items():
        raise RunError(f"{name} failed when it was run again: {last}")
    comparison = judge(repeated.before, repeated.after, _no_tolerances)
    if not comparison.passed:
        raise DefinitionError(f"numbers do not repeat, so they cannot be blessed:\n{comparison}")


def _no_tolerances() -> NoReturn:
    raise DefinitionError(
        "this is another machine than the one that the runs were made on: run the suite anew here, or bless there"
    )
