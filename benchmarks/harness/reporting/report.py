"""One self-contained HTML page: verdict, tables, figures, how it was made."""

from __future__ import annotations

import base64
from collections import Counter
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from markupsafe import Markup

import emoe
from benchmarks.harness.base import paths
from benchmarks.harness.planning.definition import load_benchmark
from benchmarks.harness.planning.runs import Run
from benchmarks.harness.planning.suite import CLAIMS, Artifacts, Suite, artifacts_of
from benchmarks.harness.reporting.claims import has_random_weights, sentences
from benchmarks.harness.reporting.paper_items import paper_index
from benchmarks.harness.reporting.presentation import present
from benchmarks.harness.reporting.rendering import MISSING, Table
from benchmarks.harness.results.records import read_metrics

_FEW_LABELS = 10


def write_report(suite: Suite, output: Path, benchmark: str | None = None) -> None:
    """Write the report of a suite whose tables and figures exist.

    Args:
        suite: the suite; all runs that are shown are finished.
        output: the page.
        benchmark: show this one alone, and no claims.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    page = environment.get_template("report.html.j2").render(
        suite=suite.name,
        version=emoe.__version__,
        claims={} if benchmark else _claims(suite),
        sections=[_section(suite, name) for name in suite.settings.benchmarks if benchmark in (None, name)],
        paper=Markup() if benchmark else _paper(suite),
        environments=_environments(suite.runs_of(benchmark) if benchmark else suite.runs),
        style=_trusted(Path(__file__).parent / "report.css"),
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(page)


def _claims(suite: Suite) -> dict[str, Any]:
    """The table and figure of the claims, and what to know before; nothing where no claim is tested on the suite."""
    if not suite.claimed:
        return {}
    verdicts = pd.read_csv(paths.RESULTS / suite.name / "tables" / f"{CLAIMS.name}.csv")
    return {
        "sentences": list(sentences(verdicts)),
        "random_weights": has_random_weights(suite.runs),
        "table": _table(suite, CLAIMS, ""),
        "figures": _figures(suite, CLAIMS),
    }


def _paper(suite: Suite) -> Markup:
    """Where each table and figure of the paper is; empty where the suite makes none of them."""
    index = paper_index(suite)
    if not any(index["files"] != MISSING):
        return Markup()
    table = Table(
        "Which file shows what the paper shows",
        "Numbers are those of the first version (arXiv). Each is made by its command, with what it needs; the same tables with all rows and selections are above.",
        {
            "item": "Item",
            "title": "Shows",
            "naacl": "In the NAACL version",
            "command": "Command",
            "files": "Files",
            "status": "Status",
        },
        [],
        index.assign(
            command=[
                f"{command} --config suite={suite.name}" if command != MISSING else MISSING
                for command in index["command"]
            ]
        ),
        wraps=True,
    )
    return Markup(table.html())  # noqa: S704


def _section(suite: Suite, name: str) -> dict[str, Any]:
    benchmark = load_benchmark(name)
    runs = suite.runs_of(name)
    definition = benchmark.definition
    kind = benchmark.kind
    presented = present(benchmark, runs)
    shown = artifacts_of(name)
    return {
        "name": name,
        "title": definition.title,
        "runs": len(runs),
        "random_weights": has_random_weights(runs),
        "suite_note": definition.suites[suite.name].note or "",
        "verdicts": presented.verdicts,
        "note": presented.note,
        "data": _data(runs) if kind.counts_labels else [],
        "training": _training(runs) if kind.optimizer else {},
        "optimiser": kind.optimizer,
        "tables": [_table(suite, shown, table) for table in shown.tables],
        "figures": _figures(suite, shown),
        "parts": [
            {
                "title": benchmark.tasks[part].title,
                "tables": [_table(suite, artifacts_of(name, part), table) for table in definition.set_tables],
                "figures": _figures(suite, artifacts_of(name, part)),
            }
            for part in presented.parts
        ],
    }


def _table(suite: Suite, shown: Artifacts, table: str) -> Markup:
    return _trusted(paths.RESULTS / suite.name / "tables" / f"{shown.stem(table)}.html")


def _figures(suite: Suite, shown: Artifacts) -> list[dict[str, str]]:
    folder = paths.RESULTS / suite.name / "figures"
    return [
        {"image": _image(folder / f"{shown.stem(figure)}.png"), "caption": caption}
        for figure, caption in shown.figures.items()
    ]


def _data(runs: list[Run]) -> list[dict[str, Any]]:
    """Rows and labels of every split that was used, once a task; of splits that differ between runs the largest."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for run in runs:
        for part, summary in read_metrics(run)["data"].items():
            task = part.removeprefix("ood:") if part.startswith("ood:") else run.spec["task"]["name"]
            name = "test" if part.startswith("ood:") else part
            if (task, name) in found and found[task, name]["rows"] > summary["rows"]:
                continue
            labels = summary.get("labels") or {"from": summary["range"][0], "to": summary["range"][1]}
            text = ", ".join(f"{label}: {count}" for label, count in labels.items())
            if len(labels) > _FEW_LABELS:
                text = f"{len(labels)} classes, {min(labels.values())} to {max(labels.values())} each"
            found[task, name] = {
                "task": task,
                "split": name,
                "rows": summary["rows"],
                "labels": text,
                "dropped": summary["dropped"],
            }
    return [found[key] for key in sorted(found)]


def _training(runs: list[Run]) -> dict[str, str]:
    """Training settings; where tasks differ, each value with its tasks."""
    found: dict[str, dict[str, list[str]]] = {}
    settings = [{**run.spec["training"], **run.spec.get("hparams", {})} for run in runs]
    keys = dict.fromkeys(key for given in settings for key in given)
    for run, given in zip(runs, settings, strict=True):
        for key in keys:
            value = given.get(key)
            tasks = found.setdefault(key, {}).setdefault("–" if value is None else str(value), [])
            if run.spec["task"]["name"] not in tasks:
                tasks.append(run.spec["task"]["name"])
    return {
        key: next(iter(values))
        if len(values) == 1
        else "; ".join(f"{value} ({', '.join(t)})" for value, t in values.items())
        for key, values in found.items()
    }


def _environments(runs: list[Run]) -> list[dict[str, Any]]:
    """The machines and versions that the runs ran on, the commonest first."""
    seen: Counter[tuple[tuple[str, str], ...]] = Counter()
    for run in runs:
        found = read_metrics(run)["environment"]
        packages = ", ".join(f"{name} {version}" for name, version in found["packages"].items())
        gpus = ", ".join(found["gpus"]) or "none"
        rows = {
            "Processor": f"{found['processor']}, {found['cores']} cores; {found['threads']} thread(s) a run",
            "GPUs": gpus,
            "Memory": f"{found['memory_gb']} GB",
            "System": f"{found['platform']}, Python {found['python']}",
            "Packages": packages,
            "Commit": f"{found['git_commit'] or 'unknown'}{' with uncommitted changes' if found['git_dirty'] else ''}",
        }
        seen[tuple(rows.items())] += 1
    return [{"runs": count, "rows": dict(rows)} for rows, count in seen.most_common()]


def _trusted(path: Path) -> Markup:
    """Text of our own making: a stylesheet, or a table whose renderer escapes every cell."""
    return Markup(path.read_text())  # noqa: S704


def _image(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
