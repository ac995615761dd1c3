"""Looking: what there is, how far a suite is, and two runs side by side."""

from __future__ import annotations

import dataclasses
from typing import Any

import click

from benchmarks.commands.ahead import plan
from benchmarks.commands.shell import AS_JSON, SUITE, command, echo_json, echo_table, load_suite

_KINDS = ("suites", "benchmarks", "methods", "tasks", "models", "metrics", "claims")
_LONGEST = 60  # of what is printed of one value


@command("List what there is: suites, benchmarks, methods.", name="list")
@click.argument("kind", type=click.Choice(_KINDS), required=False)
@AS_JSON
def list_command(kind: str | None, as_json: bool) -> None:
    """List what there is of a KIND, with titles and numbers; without one, how much there is of each."""
    from benchmarks.harness.config import listing

    rows = listing.LISTS[kind]() if kind else listing.overview()
    if as_json:
        echo_json(rows)
    else:
        echo_table([{key: _cell(value) for key, value in row.items()} for row in rows], right=("runs", "how many"))


def _cell(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else "" if value is None else str(value)


@command("Show what is running, done, failed, waiting.")
@SUITE
@AS_JSON
def status(suite: str, as_json: bool) -> None:
    """Show how many runs of a suite are done, running, failed and waiting; the running and failed ones with the last line of their logs.

    A run that failed was begun, is not being run, and has no numbers. Started again, it goes on from its last checkpoint.
    """
    from benchmarks.harness.results.durations import clock
    from benchmarks.harness.run.standing import count, standing_of

    runs = load_suite(suite).runs
    found = [standing_of(run) for run in runs]
    names = dict.fromkeys(run.benchmark for run in runs)
    rows: list[dict[str, Any]] = [
        {"benchmark": name, **count(one for one in found if one.run.benchmark == name)} for name in names
    ]
    total = {"benchmark": "all", **count(found)}
    shown = [one for state in ("running", "failed") for one in found if one.state == state]
    if as_json:
        listed = [
            {"run": one.run.folder, "state": one.state, "last": one.last, "silent_seconds": one.silent} for one in shown
        ]
        echo_json({"suite": suite, "benchmarks": rows, "total": total, "runs": listed})
        return
    echo_table([*rows, *([total] if len(rows) > 1 else [])], right=("done", "running", "failed", "waiting"))
    for one in shown:
        ago = "" if one.silent is None else f" ({clock(one.silent)} ago)"
        click.echo(f"\n{one.state:<8} {one.run.folder}\n         {_short(one.last) or 'nothing in its log'}{ago}")


@command("List results of other versions of their benchmarks.")
@AS_JSON
def stale(as_json: bool) -> None:
    """List the folders of results/runs that no suite takes any more: of another version of their benchmark, or with a damaged run.json.

    They take nothing but room. A new version computes otherwise, so its runs have other names.
    """
    from benchmarks.harness.results.stale import stale_runs

    found = [dataclasses.asdict(one) for one in stale_runs()]
    if as_json:
        echo_json(found)
        return
    echo_table(found)
    if not found:
        click.echo("no results of other versions")


@command("Put two runs side by side.")
@click.argument("first")
@click.argument("second")
@click.option("--all", "show_all", is_flag=True, help="Also print the numbers that are equal.")
@AS_JSON
def compare(first: str, second: str, show_all: bool, as_json: bool) -> None:
    """Show how two finished runs differ: settings, environment, and numbers with their difference.

    FIRST and SECOND are folders of runs, their ids, or metrics.json files; or two suites' results/reference/*.json.
    """
    from benchmarks.harness.results.contrast import contrast

    found = contrast(first, second)
    if as_json:
        echo_json(dataclasses.asdict(found))
        return
    click.echo(f"a  {found.names[0]}\nb  {found.names[1]}")
    for title, pairs in (("settings", found.settings), ("environment", found.environment)):
        click.echo(f"\n{title} that differ: {len(pairs)}")
        echo_table({"": pair.name, "a": _short(pair.first), "b": _short(pair.second)} for pair in pairs)
    differing = found.differing
    click.echo(f"\nnumbers that differ: {len(differing)} of {len(found.numbers)}")
    echo_table(
        {
            "": pair.name,
            "a": _short(pair.first),
            "b": _short(pair.second),
            "b - a": "" if pair.difference is None else f"{pair.difference:+.3g}",
        }
        for pair in (found.numbers if show_all else differing)
    )


def _short(value: object) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


COMMANDS = (list_command, plan, status, stale, compare)
