"""Write the page of a suite, one self-contained HTML file: verdicts first, then tables and figures, then costs."""

from __future__ import annotations

import base64
import itertools
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd
from markupsafe import Markup

import emoe
from benchmarks.harness import base as paths
from benchmarks.harness.base import write_text
from benchmarks.harness.config.artifacts import CLAIMS, Artifacts, artifacts_of
from benchmarks.harness.config.benchmark import load_benchmark
from benchmarks.harness.config.catalogue import model_title
from benchmarks.harness.config.paper_items import load_paper, main_figure
from benchmarks.harness.config.runs import Run
from benchmarks.harness.config.suite import Suite
from benchmarks.harness.report.claims import CAPTION, claim_cards, verdict_sentences
from benchmarks.harness.report.common import has_random_weights, name_or_count
from benchmarks.harness.report.paper import paper_index
from benchmarks.harness.report.plots import is_drawn
from benchmarks.harness.report.presentation import Presentation, present
from benchmarks.harness.report.table import MISSING, TEMPLATES
from benchmarks.harness.results.records import read_metrics

_HERE = Path(__file__).parent
_FEW_LABELS = 10


def write_report(suite: Suite, output: Path, benchmark: str | None = None) -> None:
    """Write the page of a suite, or of one benchmark without the claims. The tables and figures must exist."""
    page = _Page(suite, output.parent.absolute())
    names = [name for name in suite.settings.benchmarks if benchmark in (None, name)]
    recorded = {name: [_page_metrics(run) for run in suite.runs_of(name)] for name in names}
    everything = list(itertools.chain(*recorded.values()))
    models = dict.fromkeys(run.spec["model"]["name"] for name in names for run in suite.runs_of(name))
    costs = {name: _cost_texts(members) for name, members in {**recorded, "all": everything}.items()}
    machines = Counter(tuple(_environment_texts(metrics["environment"]).items()) for metrics in everything)
    text = TEMPLATES.get_template("page.html.j2").render(
        suite=suite.name,
        version=emoe.__version__,
        claims={} if benchmark else page.claims(),
        shown_names=names,
        sections=[{**_section(page, name, recorded[name]), "cost": costs[name]} for name in names],
        models=name_or_count([model_title(model) for model in models], "models"),
        paper=[] if benchmark else page.paper_items(),
        costs=costs,
        environments=[{"runs": count, "rows": dict(rows)} for rows, count in machines.most_common()],
        runs_folder=page.link(paths.RUNS),
        style=_read_trusted(_HERE / "page.css"),
        script=_read_trusted(_HERE / "page.js"),
    )
    write_text(output, text)


def copy_report(page: Path, output: Path) -> None:
    """Copy a page to another folder and adapt its links."""
    folder = Path(os.path.relpath(page.parent, output.parent)).as_posix()
    write_text(output, re.sub(r'((?:href|data-runs-folder)=")(?!#)', rf"\1{folder}/", page.read_text()))


@dataclass(frozen=True)
class _Page:
    """Make the parts of a page that have links. Links are relative to the page's folder."""

    suite: Suite
    folder: Path

    @property
    def results(self) -> Path:
        return paths.RESULTS / self.suite.name

    def link(self, path: Path) -> str:
        return Path(os.path.relpath(path.absolute(), self.folder)).as_posix()

    def table(self, artifacts: Artifacts, name: str, title: str) -> dict[str, Any]:
        path = self.results / "tables" / artifacts.stem(name)
        return {
            "title": title,
            "html": _read_trusted(path.with_suffix(".html")),
            "files": self.link(path),
            "command": f"snakemake --cores 1 {path}.csv --config suite={self.suite.name}",
        }

    def figure(self, path: Path, caption: str) -> dict[str, str]:
        """Return a figure with its picture; empty for a placeholder."""
        if not is_drawn(path):
            return {}
        image = base64.b64encode(path.with_suffix(".png").read_bytes()).decode()
        return {
            "name": path.name,
            "image": f"data:image/png;base64,{image}",
            "files": self.link(path),
            "caption": caption,
            "alt": caption_title(caption),
        }

    def tables_and_figures(self, artifacts: Artifacts, presentation: Presentation) -> dict[str, Any]:
        """List the tables and figures of a benchmark or set, and the titles of the empty ones."""
        tables = dict(zip(artifacts.tables, presentation.tables, strict=True))
        shown = [name for name, table in tables.items() if len(table.frame)] or [*tables][:1]  # the page opens with one
        empty = [table.title for name, table in tables.items() if name not in shown]
        figures = []
        for name, entry in presentation.figures.items():
            if figure := self.figure(self.results / "figures" / name, entry.caption):
                figures.append(figure)
            else:
                empty.append(caption_title(entry.caption))
        return {
            "tables": [self.table(artifacts, name, tables[name].title) for name in shown],
            "figures": figures,
            "empty": list(dict.fromkeys(empty)),
        }

    def claims(self) -> dict[str, Any]:
        """Return the claims with their table and figures; empty if the suite tests no claim."""
        if not self.suite.claimed:
            return {}
        verdicts = pd.read_csv(self.results / "tables" / f"{CLAIMS.name}.csv")
        main = next(item for item in load_paper().items.values() if item.main)
        return {
            "sentences": list(verdict_sentences(verdicts)),
            "random_weights": has_random_weights(self.suite.runs),
            "cards": list(claim_cards(verdicts)),
            "table": self.table(CLAIMS, "", "Every test"),
            "figure": self.figure(self.results / "figures" / CLAIMS.name, CAPTION),
            "main": self.figure(main_figure(self.suite.name), main.caption or ""),
        }

    def paper_items(self) -> list[dict[str, Any]]:
        """List the files of the paper's items; empty if the suite makes none of them."""
        rows = paper_index(self.suite)
        for row in rows:
            files = [Path(re.sub(r"\.md$", ".html", file)) for file in row["files"]]  # a browser shows no Markdown
            row["files"] = [(file.name, self.link(file) if file.exists() else "") for file in files]
        return rows if any(row["files"] for row in rows) else []


def caption_title(caption: str) -> str:
    """Cut a caption at the first full stop, which is not that of ``Fig. 4``."""
    return re.split(r"\. (?=[A-Z])|: ", caption, maxsplit=1)[0].rstrip(".")


def _page_metrics(run: Run) -> dict[str, Any]:
    """Read the parts of a ``metrics.json`` that the page shows outside tables and figures."""
    metrics = read_metrics(run)
    return {part: metrics.get(part, {}) for part in ("data", "cost", "environment")}


def _section(page: _Page, name: str, recorded: list[dict[str, Any]]) -> dict[str, Any]:
    benchmark = load_benchmark(name)
    runs = page.suite.runs_of(name)
    presentation, is_random = present(benchmark, runs), has_random_weights(runs)
    verdicts = [] if is_random else presentation.verdicts
    return {
        "name": name,
        "title": benchmark.definition.title,
        "runs": len(runs),
        "random_weights": is_random,
        "suite_note": page.suite.benchmark_parts[name].settings.note or "",
        "verdicts": verdicts,
        "note": presentation.note,
        "data": _data_rows(runs, recorded) if presentation.shows_labels else [],
        "training": _training_texts(runs) if presentation.optimizer else {},
        "optimiser": presentation.optimizer,
        **page.tables_and_figures(artifacts_of(name), presentation),
        "parts": [
            {"title": benchmark.tasks[part].title, **page.tables_and_figures(artifacts_of(name, part), presented)}
            for part, presented in presentation.parts.items()
        ],
    }


def _data_rows(runs: list[Run], recorded: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """List row and label counts of every split of a task; if a split differs between runs, the largest one."""
    summaries: dict[tuple[str, str], dict[str, Any]] = {}
    for run, metrics in zip(runs, recorded, strict=True):
        for part, summary in metrics["data"].items():
            split, _, task = part.partition(":")  # named "part:task" if a run has several sets
            key = (task or run.spec["task"]["name"], "test" if split == "ood" else split)
            if key not in summaries or summaries[key]["rows"] <= summary["rows"]:
                summaries[key] = summary
    return [
        {"task": task, "split": split, "labels": _labels(summary), **{key: summary[key] for key in ("rows", "dropped")}}
        for (task, split), summary in sorted(summaries.items())
    ]


def _labels(summary: dict[str, Any]) -> str:
    labels = summary.get("labels") or dict(zip(("from", "to"), summary["range"], strict=True))
    if len(labels) > _FEW_LABELS:
        return f"{len(labels)} classes, {min(labels.values())} to {max(labels.values())} each"
    return ", ".join(f"{label}: {count}" for label, count in labels.items())


def _training_texts(runs: list[Run]) -> dict[str, str]:
    """Describe the training settings by key. If a value differs between tasks, list each value with its tasks."""
    settings = [{**run.spec["training"], **run.spec.get("hparams", {})} for run in runs]
    texts = [{key: str(value) for key, value in values.items() if value is not None} for values in settings]
    keys = dict.fromkeys(key for values in settings for key in values)
    tasks = pd.Series([run.spec["task"]["name"] for run in runs])
    described = {}
    for key, values in pd.DataFrame(texts, columns=list(keys)).fillna(MISSING).items():
        tasks_of = tasks.groupby(values, sort=False).unique()
        differing = "; ".join(f"{value} ({', '.join(names)})" for value, names in tasks_of.items())
        described[str(key)] = differing if len(tasks_of) > 1 else str(values[0])
    return described


def _cost_texts(recorded: list[dict[str, Any]]) -> dict[str, str]:
    """Format run count, hours, seconds per run and peak memory (MB); a dash if no run has them."""
    seconds = [metrics["cost"]["job_seconds"] for metrics in recorded]
    memory = [metrics["cost"]["peak_memory_mb"] for metrics in recorded if "peak_memory_mb" in metrics["cost"]]
    return {
        "runs": f"{len(recorded):,}",
        "hours": f"{sum(seconds) / 3600:.2f}" if seconds else MISSING,
        "median": f"{median(seconds):.0f}" if seconds else MISSING,
        "longest": f"{max(seconds):.0f}" if seconds else MISSING,
        "memory": f"{max(memory):,.0f}" if memory else MISSING,
    }


def _environment_texts(environment: dict[str, Any]) -> dict[str, str]:
    changes = " with uncommitted changes" if environment["git_dirty"] else ""
    return {
        "Processor": "{processor}, {cores} cores; {threads} thread(s) a run".format_map(environment),
        "GPUs": ", ".join(environment["gpus"]) or "none",
        "Memory": f"{environment['memory_gb']} GB",
        "System": f"{environment['platform']}, Python {environment['python']}",
        "Packages": ", ".join(f"{name} {version}" for name, version in environment["packages"].items()),
        "Commit": f"{environment['git_commit'] or 'unknown'}{changes}",
    }


def _read_trusted(path: Path) -> Markup:
    """Read a stylesheet, a script, or a rendered table (its cells are escaped) as safe HTML."""
    return Markup(path.read_text())  # noqa: S704
