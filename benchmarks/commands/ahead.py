"""Looking ahead: what a suite will take."""

from __future__ import annotations

import dataclasses
import math
import os
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from benchmarks.commands.shell import AS_JSON, SUITE, benchmark_option, command, echo_json, echo_table, load_suite

if TYPE_CHECKING:
    from benchmarks.harness.config.suite import Suite
    from benchmarks.harness.run.downloads import Need
    from benchmarks.harness.run.outlook import Outlook, Work

_WIDTH = 100
_DAY, _HOUR = 86400.0, 3600.0
_LONG = 100 * _HOUR  # from here on nobody wants minutes
_BASES = {
    "seed": "as runs took that differ in the seed alone",
    "finished": "as the cost model says, corrected by finished runs of their benchmarks",
    "blessed": "as the cost model says, corrected by what their benchmarks took where the suite was blessed",
    "others": "as the cost model says, corrected by finished runs of other benchmarks",
    "stated": "as the cost model says of what devices.yaml states: nothing like them was measured",
}


def _tables(_context: click.Context, _parameter: click.Parameter, begun: str) -> list[str]:
    from benchmarks.harness.config.paper_items import load_paper_items

    return [name for name in load_paper_items() if name.startswith(begun)]


def _devices(_context: click.Context, _parameter: click.Parameter, begun: str) -> list[str]:
    from benchmarks.harness.config.devices import load_devices

    return [name for name in load_devices() if name.startswith(begun)]


def _finite(_context: click.Context, _parameter: click.Parameter, value: float | None) -> float | None:
    if value is not None and not math.isfinite(value):
        raise click.BadParameter(f"{value} is no speed")
    return value


@command("Say what a suite will take, before anything runs.")
@SUITE
@benchmark_option("Only this one.")
@click.option(
    "--table", shell_complete=_tables, help="Only what a table or figure of the paper needs: table_3, figure_7."
)
@click.option(
    "--device",
    shell_complete=_devices,
    help="What runs are to run on (devices.yaml): a100, h100, cpu. By default this machine; for runs that ask for a GPU, where it has none, a100.",
)
@click.option(
    "--tflops",
    type=click.FloatRange(min=0, min_open=True),
    callback=_finite,
    help="What the device does in 10^12 operations a second, instead of what devices.yaml says.",
)
@click.option("--cores", type=click.IntRange(min=1), help="CPU cores that work at once; by default this machine's.")
@click.option("--gpus", type=click.IntRange(min=1), default=1, show_default=True, help="GPUs that work at once.")
@AS_JSON
def plan(
    suite: str,
    benchmark: str | None,
    table: str | None,
    device: str | None,
    tflops: float | None,
    cores: int | None,
    gpus: int,
    as_json: bool,
) -> None:
    """Say of every benchmark of a suite, and of every table and figure of the paper, how many runs are done and missing, and what the missing ones take: time, GPUs,
    memory, disk, downloads.

    Nothing runs and nothing is downloaded. Times are estimates: a cost model of parameters, tokens and steps, corrected by finished runs; it says how far it is
    off on these, and on what each time rests.
    """
    from benchmarks.harness.run.outlook import look_ahead

    loaded = load_suite(suite, benchmark)
    os.environ.update(loaded.environment())
    cores = cores or os.cpu_count() or 1
    outlook = look_ahead(loaded, benchmark, table, device, tflops)
    if as_json:
        _echo_json(outlook, suite, _at_once(outlook.total, cores, gpus))
    else:
        _show(outlook, loaded, cores, gpus)


def _at_once(work: Work, cores: int, gpus: int) -> float:
    """Seconds where as many runs go at once as there is room for; no shorter than the longest."""
    shared = work.core_seconds / cores, work.gpu_seconds / gpus
    return max(*shared, work.longest_seconds)


def _echo_json(outlook: Outlook, suite: str, seconds: float) -> None:
    content = dataclasses.asdict(outlook)
    content["devices"] = {name: device.model_dump() for name, device in outlook.devices.items()}
    for row in (*content["work"], content["total"], *content["tables"]):
        row["missing"] = row["runs"] - row["done"]
    echo_json({"suite": suite, "seconds_at_once": seconds, **content})


def _show(outlook: Outlook, suite: Suite, cores: int, gpus: int) -> None:
    total = outlook.total
    several = [total] if len(outlook.work) > 1 else []
    _echo_work("benchmark", (*outlook.work, *several))
    _echo_rests(outlook, cores, gpus)
    if outlook.tables:
        click.echo("\nThe paper's tables and figures, each with all runs that it needs; above, every run counts once")
        _echo_work("item", outlook.tables)
    _echo_errors(outlook)
    _echo_disk(outlook)
    if outlook.partitions:
        click.echo(f"\n{outlook.partitions_there} of {outlook.partitions} clusterings are made")
    _echo_needs("models", outlook.models)
    _echo_needs("packages", outlook.packages)
    _echo_needs("sets", outlook.sets)
    if any(not one.there for one in outlook.sets):
        click.echo(f"Where they come from: `python -m benchmarks data --suite {suite.name} --check`")


def _echo_work(title: str, works: Sequence[Work]) -> None:
    columns = ("runs", "done", "missing", "time", "GPU-hours", "GPUs", "memory", "disk")
    echo_table([{title: work.name, **_row(work)} for work in works], right=columns)


def _row(work: Work) -> dict[str, object]:
    left = bool(work.missing)
    return {
        "runs": work.runs,
        "done": work.done,
        "missing": work.missing,
        "time": _time(work, work.seconds),
        "GPU-hours": f"{work.gpu_seconds / _HOUR:,.0f}"
        if work.gpu_seconds >= _LONG
        else f"{work.gpu_seconds / _HOUR:.1f}"
        if work.gpus
        else "",
        "GPUs": work.gpus or "",
        "memory": _bytes(work.memory_bytes) if left else "",
        "disk": _bytes(work.kept_bytes) if left else "",
    }


def _time(work: Work, seconds: float) -> str:
    if work.unknown == work.missing:
        return "unknown" if work.missing else ""
    return _span(seconds) + (" +" if work.unknown else "")


def _span(seconds: float) -> str:
    from benchmarks.harness.results.durations import clock

    return f"{seconds / _HOUR:,.0f} h" if seconds >= _LONG else clock(seconds)


def _bytes(size: float | None) -> str:
    if size is None:
        return "unknown"
    for limit, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if size >= limit:
            found = size / limit
            return f"{found:.0f} {unit}" if found >= 10 else f"{found:.1f} {unit}"
    return f"{size / 1e3:.0f} kB"


def _echo_rests(outlook: Outlook, cores: int, gpus: int) -> None:
    """What times mean, and on what they rest."""
    total = outlook.total
    notes = []
    if total.missing > total.unknown:
        notes.append("Time is that of one run after the other, at most." + _early(total))
        places = [f"{cores} core{'s' * (cores > 1)}"] if total.core_seconds else []
        places += [f"{gpus} GPU{'s' * (gpus > 1)}"] if total.gpu_seconds else []
        together = _at_once(total, cores, gpus)
        days = f" ({together / _DAY:,.0f} days)" if together >= 3 * _DAY else ""
        notes.append(
            f"On {' and '.join(places)}: {_span(together)}{days}. Clusterings, tables and reading of images are not counted."
        )
    for basis, words in _BASES.items():
        if found := total.by_basis.get(basis):  # type: ignore[call-overload]
            notes.append(f"{found:,} runs are taken to last {words}.")
    if total.unknown:
        notes.append(
            f"{total.unknown:,} runs have no time (+): nothing says what they compute (their model's shape, the rows of their sets)."
        )
    for name, device in outlook.devices.items():
        if total.missing and device.memory_gb:
            speeds = ", ".join(f"{device.speed(kind) / 1e12:.3g} {kind}" for kind in device.tflops)
            notes.append(
                f"Device: {name} ({device.title}), taken to do {speeds} TFLOP/s. That is stated, not measured; `--device`, `--tflops` say otherwise."
            )
    if total.memory_bytes is not None:
        where = "each GPU" if total.gpus else "the machine"
        notes.append(
            f"Memory is what the largest run needs of {where}; GPUs are what one run asks for, disk what runs leave."
        )
    if total.too_large:
        notes.append(f"{total.too_large:,} runs need more memory than such a GPU has.")
    if outlook.assumed:
        notes.append(f"Taken at the most, or left out: {'; '.join(outlook.assumed)}.")
    click.echo()
    for note in notes:
        click.echo(textwrap.fill(note, _WIDTH, break_on_hyphens=False, break_long_words=False))


def _early(work: Work) -> str:
    if work.least_seconds > 0.99 * work.seconds:
        return ""
    return f" Runs may stop early: it is {_span(work.least_seconds)} where all do so at their first chance."


def _echo_errors(outlook: Outlook) -> None:
    """How far the model is off on finished runs."""
    if not outlook.errors["time"]:
        return
    click.echo(
        "\n"
        + textwrap.fill(
            "How far estimates are off on finished runs. Each is estimated from the others, without those that differ in the seed alone; `new`: from other "
            "benchmarks alone. `all` is the sum of the estimates over the sum of what runs took.",
            _WIDTH,
        )
    )
    new = {error.name: error for error in outlook.errors["time of other benchmarks"]}
    memory = {error.name: error for error in outlook.errors["memory"]}
    rows = []
    for error in outlook.errors["time"]:
        rows.append(
            {
                "benchmark": error.name,
                "runs": error.runs,
                "time: median": f"{error.median:.0%}",
                "worst": f"{error.worst:.0%}",
                "all": f"{error.total:.2f}",
                "new: median": f"{new[error.name].median:.0%}" if error.name in new else "",
                "memory: median": f"{memory[error.name].median:.1%}" if error.name in memory else "",
                "worst ": f"{memory[error.name].worst:.0%}" if error.name in memory else "",
            }
        )
    echo_table(rows, right=list(rows[0])[1:])


def _echo_disk(outlook: Outlook) -> None:
    total = outlook.total
    if not total.missing:
        return
    needs = [one for one in (*outlook.models, *outlook.sets, *outlook.packages) if not one.there]
    unknown = sum(one.bytes is None for one in needs)
    downloads = f"downloads {_bytes(sum(one.bytes or 0.0 for one in needs))}" + (
        f" and {unknown} of unknown size" if unknown else ""
    )
    text = f"Disk: results {_bytes(total.kept_bytes)}, tokens and outputs of frozen layers {_bytes(outlook.cache_bytes)}, {downloads if needs else 'no downloads'}"
    if total.checkpoint_bytes:
        text += f". A run's checkpoints take up to {_bytes(total.checkpoint_bytes)} more, which go when it ends"
    click.echo("\n" + textwrap.fill(text, _WIDTH))


def _echo_needs(title: str, needs: Sequence[Need]) -> None:
    if not needs:
        return
    there = sum(need.there for need in needs)
    click.echo(f"\n{there} of {len(needs)} {title} are there" + (", missing:" if there < len(needs) else ""))
    rows = []
    for need in needs:
        if not need.there:
            row = {"": need.name, "from": need.place, "size": _bytes(need.bytes)}
            rows.append(
                row | ({"rows": "unknown" if need.rows is None else f"{need.rows:,}"} if title == "sets" else {})
            )
    echo_table(rows, right=("size", "rows"))
