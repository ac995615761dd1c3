"""One self-contained HTML page, made for reading: verdicts, a table and a figure of each benchmark, the rest folded, what it took."""

from __future__ import annotations

import base64
import os
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import jinja2
import pandas as pd
from markupsafe import Markup

import emoe
from benchmarks.harness.base import paths
from benchmarks.harness.base.files import write_text
from benchmarks.harness.config.artifacts import CLAIMS, Artifacts, artifacts_of
from benchmarks.harness.config.definition import load_benchmark
from benchmarks.harness.config.paper_items import load_paper_items, main_files
from benchmarks.harness.config.runs import Run
from benchmarks.harness.config.suite import Suite
from benchmarks.harness.report.claims import cards, has_random_weights, sentences
from benchmarks.harness.report.paper_items import paper_index
from benchmarks.harness.report.presentation import Presentation, present
from benchmarks.harness.report.rendering import MISSING, code_as_html
from benchmarks.harness.results.records import read_metrics

_HERE = Path(__file__).parent
_FEW_LABELS = 10
_MOST_SENTENCES = 6  # on a benchmark that stand open


@dataclass(frozen=True)
class _Page:
    """Where a page lies, so that its links hold."""

    suite: Suite
    folder: Path

    def to(self, path: Path) -> str:
        return Path(os.path.relpath(path.absolute(), self.folder)).as_posix()

    def table(self, shown: Artifacts, name: str, title: str) -> dict[str, Any]:
        path = paths.RESULTS / self.suite.name / "tables" / shown.stem(name)
        return {
            "title": title,
            "html": _trusted(path.with_suffix(".html")),
            "files": self.to(path),
            "command": f"snakemake --cores 1 {path}.csv --config suite={self.suite.name}",
        }

    def figures(self, shown: Artifacts, without: Collection[str] = ()) -> list[dict[str, str]]:
        folder = paths.RESULTS / self.suite.name / "figures"
        return [
            {
                "name": shown.stem(name),
                "image": _image(folder / f"{shown.stem(name)}.png"),
                "files": self.to(folder / shown.stem(name)),
                "caption": Markup(code_as_html(caption)),  # noqa: S704 -- it escapes
                "alt": shown.short_caption(name),
            }
            for name, caption in shown.figures.items()
            if name not in without
        ]

    def main_figures(self) -> list[dict[str, str]]:
        """The main averages, by :func:`~benchmarks.harness.report.main_figure.draw_main`; the caption stands below the last."""
        item = next(item for item in load_paper_items().values() if item.main)
        stems = list(dict.fromkeys(Path(file).with_suffix("") for file in main_files(self.suite.name)))
        return [
            {
                "name": stem.name,
                "image": _image(stem.with_suffix(".png")),
                "files": self.to(stem),
                "caption": (item.caption or "") if stem == stems[-1] else "",
                "alt": f"{item.title}, {how}",
            }
            for stem, how in zip(stems, ("radar", "differences to the dense model"), strict=True)
        ]


def write_report(suite: Suite, output: Path, benchmark: str | None = None) -> None:
    """Write the report of a suite whose tables and figures exist.

    Args:
        suite: the suite; all runs that are shown are finished.
        output: the page.
        benchmark: show this one alone, and no claims.
    """
    page = _Page(suite, output.parent.absolute())
    shown = [name for name in suite.settings.benchmarks if benchmark in (None, name)]
    costs, environments = _made_by({name: suite.runs_of(name) for name in shown})
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    text = environment.get_template("report.html.j2").render(
        suite=suite.name,
        version=emoe.__version__,
        claims={} if benchmark else _claims(page),
        shown_names=shown,
        sections=[{**_section(page, name), "cost": costs[name]} for name in shown],
        most=_MOST_SENTENCES,
        paper=[] if benchmark else _paper(page),
        costs=costs,
        environments=environments,
        runs_folder=page.to(paths.RUNS),
        style=_trusted(_HERE / "report.css"),
        script=_trusted(_HERE / "report.js"),
    )
    write_text(output, text)


def copy_report(page: Path, output: Path) -> None:
    """Copy a report to another folder, with links that hold there."""
    there = Path(os.path.relpath(page.parent, output.parent)).as_posix()
    write_text(output, re.sub(r'((?:href|data-runs-folder)=")(?!#)', rf"\1{there}/", page.read_text()))


def _claims(page: _Page) -> dict[str, Any]:
    """The claims, their table and figure, and what to know before; nothing where no claim is tested on the suite."""
    suite = page.suite
    if not suite.claimed:
        return {}
    verdicts = pd.read_csv(paths.RESULTS / suite.name / "tables" / f"{CLAIMS.name}.csv")
    return {
        "sentences": list(sentences(verdicts)),
        "random_weights": has_random_weights(suite.runs),
        "cards": list(cards(verdicts)),
        "table": page.table(CLAIMS, "", "Every test"),
        "figures": page.figures(CLAIMS),
        "main": page.main_figures(),
    }


def _paper(page: _Page) -> list[dict[str, Any]]:
    """Where each table and figure of the paper is; nothing where the suite makes none of them."""
    index = paper_index(page.suite)
    if not any(index["files"]):
        return []
    return [
        {**row, "files": [(file.name, page.to(file) if file.exists() else "") for file in map(_to_read, row["files"])]}
        for row in index.to_dict("records")
    ]


def _to_read(file: str) -> Path:
    """A table for a browser, which shows Markdown as it is written."""
    path = Path(file)
    return path.with_suffix(".html") if path.suffix == ".md" else path


def _section(page: _Page, name: str) -> dict[str, Any]:
    benchmark = load_benchmark(name)
    runs = page.suite.runs_of(name)
    definition = benchmark.definition
    kind = benchmark.kind
    presented = present(benchmark, runs)
    return {
        "name": name,
        "title": definition.title,
        "runs": len(runs),
        "random_weights": has_random_weights(runs),
        "suite_note": definition.suites[page.suite.name].note or "",
        "verdicts": presented.verdicts,
        "note": presented.note,
        "data": _data(runs) if kind.counts_labels else [],
        "training": _training(runs) if kind.optimizer else {},
        "optimiser": kind.optimizer,
        **_shown(page, artifacts_of(name), presented),
        "parts": [
            {"title": benchmark.tasks[part].title, **_shown(page, artifacts_of(name, part), presented.parts[part])}
            for part in presented.parts
        ],
    }


def _shown(page: _Page, shown: Artifacts, presented: Presentation) -> dict[str, Any]:
    """Tables and figures of a benchmark or a part of it, and the titles of those that have no row here."""
    tables = dict(zip(shown.tables, presented.tables, strict=True))
    first = next(iter(tables))
    empty = {name: table.title for name, table in tables.items() if table.frame.empty and name != first}
    return {
        "tables": [page.table(shown, name, table.title) for name, table in tables.items() if name not in empty],
        "figures": page.figures(shown, empty),
        "empty": list(empty.values()),
    }


def _data(runs: list[Run]) -> list[dict[str, Any]]:
    """Rows and labels of every split that was used, once a task; of splits that differ between runs the largest."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for run in runs:
        for part, summary in read_metrics(run)["data"].items():
            name, _, task = part.partition(":")  # of a set beside the run's own, or of one of several
            name, task = "test" if name == "ood" else name, task or run.spec["task"]["name"]
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


def _made_by(runs: dict[str, list[Run]]) -> tuple[dict[str, dict[str, str]], list[dict[str, Any]]]:
    """What the runs of each benchmark took, and of ``all`` of them; and the machines and versions they ran on, the commonest first."""
    machines: Counter[tuple[tuple[str, str], ...]] = Counter()
    costs: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
    for name, run in ((name, run) for name, members in runs.items() for run in members):
        found = read_metrics(run)
        machines[tuple(_environment(found["environment"]).items())] += 1
        costs[name].append(found.get("cost", {}))
    every = [cost for members in costs.values() for cost in members]
    took = {name: _took(members) for name, members in {**costs, "all": every}.items()}
    return took, [{"runs": count, "rows": dict(rows)} for rows, count in machines.most_common()]


def _took(costs: Sequence[dict[str, float]]) -> dict[str, str]:
    """Hours, seconds a run and memory of some runs, as texts; a dash where runs do not say."""
    seconds = [cost["job_seconds"] for cost in costs if "job_seconds" in cost]
    memory = [cost["peak_memory_mb"] for cost in costs if "peak_memory_mb" in cost]
    return {
        "runs": f"{len(costs):,}",
        "hours": f"{sum(seconds) / 3600:.2f}" if seconds else MISSING,
        "median": f"{median(seconds):.0f}" if seconds else MISSING,
        "longest": f"{max(seconds):.0f}" if seconds else MISSING,
        "memory": f"{max(memory):,.0f}" if memory else MISSING,
    }


def _environment(found: dict[str, Any]) -> dict[str, str]:
    packages = ", ".join(f"{name} {version}" for name, version in found["packages"].items())
    return {
        "Processor": f"{found['processor']}, {found['cores']} cores; {found['threads']} thread(s) a run",
        "GPUs": ", ".join(found["gpus"]) or "none",
        "Memory": f"{found['memory_gb']} GB",
        "System": f"{found['platform']}, Python {found['python']}",
        "Packages": packages,
        "Commit": f"{found['git_commit'] or 'unknown'}{' with uncommitted changes' if found['git_dirty'] else ''}",
    }


def _trusted(path: Path) -> Markup:
    """Text of our own making: a stylesheet, a script, or a table whose renderer escapes every cell."""
    return Markup(path.read_text())  # noqa: S704


def _image(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
