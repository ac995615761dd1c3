"""``python -m tests.mutation --suite smoke``: the mutation score of `make check`, as a Markdown table."""

from __future__ import annotations

import tempfile
from pathlib import Path

import click

from benchmarks.harness.config.suite import suite_of_job
from benchmarks.harness.results.reference import read_tolerances
from benchmarks.harness.results.regression import present
from tests.mutation.methods import MUTATIONS, method_mutants
from tests.mutation.mutants import Verdict, table
from tests.mutation.records import record_mutants


@click.command()
@click.option("--suite", default="smoke", show_default=True, help="A finished suite.")
@click.option("--each", default=2, show_default=True, help="Runs of a benchmark that a mutation of code is done to.")
@click.option("--jobs", default=1, show_default=True, help="Runs at a time.")
@click.option("--only", default="", help="Mutations of code whose names contain this.")
@click.option("--records/--no-records", default=True, show_default=True, help="Mutants of records too.")
def main(suite: str, each: int, jobs: int, only: str, records: bool) -> None:
    """Print what `make check` sees of mutants of a finished suite, on the machine that made it and as if on another."""
    runs = suite_of_job(suite).runs
    tolerances = read_tolerances(suite)
    verdicts: list[Verdict] = []
    if records:
        blessed, _ = present(runs, suite)
        verdicts += record_mutants(blessed, lambda: tolerances)
    with tempfile.TemporaryDirectory(prefix="mutants-") as temporary:
        chosen = [mutation for mutation in MUTATIONS if only in mutation.name]
        verdicts += method_mutants(runs, chosen, Path(temporary), lambda: tolerances, each=each, jobs=jobs)
    click.echo(table(verdicts))


if __name__ == "__main__":
    main()
