"""Looking: what there is, what a suite will take, how far it is, and two runs side by side."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import click

from benchmarks.commands.shell import AS_JSON, SUITE, benchmark_option, command, echo_json, echo_table, load_suite

if TYPE_CHECKING:
    from benchmarks.harness.planning.suite import Suite
    from benchmarks.harness.running.outlook import Outlook, Work

_KINDS = ("suites", "benchmarks", "methods", "tasks", "models", "metrics", "claims")
_LONGEST = 60  # of what is printed of one value
_BASES = {
    "seed": "as other seeds took",
    "kind": "as its model's finished runs took",
    "blessed": "as where the suite was blessed",
}


@command("List what there is: suites, benchmarks, methods.", name="list")
@click.argument("kind", type=click.Choice(_KINDS), required=False)
@AS_JSON
def list_command(kind: str | None, as_json: bool) -> None:
    """List what there is of a KIND, with titles and numbers; without one, how much there is of each."""
    from benchmarks.harness.planning import listing

    rows = listing.LISTS[kind]() if kind else listing.overview()
    if as_json:
        echo_json(rows)
    else:
        echo_table([{key: _cell(value) for key, value in row.items()} for row in rows], right=("runs", "how many"))


def _cell(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else "" if value is None else str(value)


def _loaded(suite: str, benchmark: str | None) -> Suite:
    """A suite, and where its data is."""
    import os

    loaded = load_suite(suite, benchmark)
    os.environ.update(loaded.environment())
    return loaded


@command("Say what a suite will take, before anything runs.")
@SUITE
@benchmark_option("Only this one.")
@AS_JSON
def plan(suite: str, benchmark: str | None, as_json: bool) -> None:
    """Say of every benchmark of a suite how many runs are done and missing, and what the missing ones take: time, GPUs, memory, downloads.

    Nothing runs and nothing is downloaded. Time is what finished runs of the same kind took; where there is none it is unknown.
    """
    from benchmarks.harness.running.outlook import look_ahead

    loaded = _loaded(suite, benchmark)
    outlook = look_ahead(loaded, benchmark)
    if as_json:
        content = dataclasses.asdict(outlook)
        for row in (*content["work"], content["total"]):
            row["missing"] = row["runs"] - row["done"]
        echo_json({"suite": suite, **content})
    else:
        _show(outlook, suite)


def _show(outlook: Outlook, suite: str) -> None:
    several = [outlook.total] if len(outlook.work) > 1 else []
    echo_table([_row(work) for work in (*outlook.work, *several)], right=("runs", "done", "missing", "GPUs", "memory"))
    click.echo(
        "\nTime is that of one run after the other; `--cores N` of snakemake does several at a time. GPUs, threads and memory are those of one run"
    )
    for basis, words in _BASES.items():
        if found := outlook.total.by_basis.get(basis):
            click.echo(f"{found} runs are taken to last {words}")
    if outlook.total.unknown:
        click.echo(f"{outlook.total.unknown} runs have no time: nothing like them has finished here or was blessed")
    if outlook.partitions:
        click.echo(f"\n{outlook.partitions_there} of {outlook.partitions} clusterings are made")
    for title, needs in (("models", outlook.models), ("packages", outlook.packages)):
        if needs:
            there = sum(need.there for need in needs)
            click.echo(f"\n{there} of {len(needs)} {title} are there" + (", missing:" if there < len(needs) else ""))
            for need in needs:
                if not need.there:
                    click.echo(f"  {need.name} ({need.place})")
    if outlook.sets:
        absent = dict.fromkeys(part.name for part in outlook.sets if part.rows is None)
        there = sum(part.rows is not None for part in outlook.sets)
        click.echo(
            f"\n{there} of {len(outlook.sets)} parts of sets are there"
            + (f", missing: {', '.join(absent)}" if absent else "")
        )
        if absent:
            click.echo(f"Where they come from: `python -m benchmarks data --suite {suite} --check`")


def _row(work: Work) -> dict[str, object]:
    return {
        "benchmark": work.name,
        "runs": work.runs,
        "done": work.done,
        "missing": work.missing,
        "time of the missing": _time(work, work.seconds),
        "GPU time": _time(work, work.gpu_seconds) if work.gpus else "",
        "GPUs": work.gpus,
        "threads": ("all" if work.threads == 0 else work.threads) if work.missing else "",
        "memory": f"{work.mem_mb / 1000:g} GB" if work.missing else "",
    }


def _time(work: Work, seconds: float) -> str:
    from benchmarks.harness.results.durations import clock

    if work.unknown == work.missing:
        return "unknown" if work.missing else ""
    return clock(seconds) + (f" + {work.unknown} unknown" if work.unknown else "")


@command("Show what is running, done, failed, waiting.")
@SUITE
@AS_JSON
def status(suite: str, as_json: bool) -> None:
    """Show how many runs of a suite are done, running, failed and waiting; the running and failed ones with the last line of their logs.

    A run that failed was begun, is not being run, and has no numbers. Started again, it goes on from its last checkpoint.
    """
    from benchmarks.harness.results.durations import clock
    from benchmarks.harness.running.standing import count, standing_of

    runs = _loaded(suite, None).runs
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


COMMANDS = (list_command, plan, status, compare)
