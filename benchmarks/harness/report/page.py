"""Write the page of a suite, one self-contained HTML file: verdicts first, then tables and figures, then costs."""

from __future__ import annotations

import base64
import itertools
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from markupsafe import Markup

import emoe
from benchmarks.harness import base as paths
from benchmarks.harness.base import write_text
from benchmarks.harness.config.artifacts import CLAIMS
from benchmarks.harness.config.benchmark import load_benchmark
from benchmarks.harness.config.catalogue import model_title
from benchmarks.harness.config.paper_items import load_paper, main_figure
from benchmarks.harness.config.runs import Run
from benchmarks.harness.config.suite import Suite
from benchmarks.harness.report.claims import CAPTION, verdict_sentences
from benchmarks.harness.report.common import name_or_count
from benchmarks.harness.report.paper import paper_index
from benchmarks.harness.report.plots import is_drawn
from benchmarks.harness.report.presentation import Presentation, has_random_weights, present
from benchmarks.harness.report.table import MISSING, TEMPLATES
from benchmarks.harness.results.records import read_metrics

_HERE = Path(__file__).parent
_FEW_LABELS = 10
_DATA = ["Task", "Split", "Rows used", "By label", "Dropped without a clear label or text"]


def write_report(suite: Suite, output: Path, benchmark: str | None = None) -> None:
    """Write the page of a suite, or of one benchmark without the claims. The tables and figures must exist."""
    page = _Page(suite, output.parent.absolute())
    names = [name for name in suite.settings.benchmarks if benchmark in (None, name)]
    recorded = {name: [_page_metrics(run) for run in suite.runs_of(name)] for name in names}
    everything = list(itertools.chain(*recorded.values()))
    models = dict.fromkeys(run.spec["model"]["name"] for name in names for run in suite.runs_of(name))
    costs = {name: _costs(name, members) for name, members in {**recorded, "all": everything}.items()}
    machines = Counter(tuple(_environment_texts(metrics["environment"]).items()) for metrics in everything)
    text = TEMPLATES.get_template("page.html.j2").render(
        suite=suite.name,
        version=emoe.__version__,
        claims={} if benchmark else page.claims(),
        shown_names=names,
        sections=[{**_section(page, name, recorded[name]), "cost": costs[name]} for name in names],
        models=name_or_count([model_title(model) for model in models], "models"),
        paper=[] if benchmark else page.paper_items(),
        costs=list(costs.values()),
        environments=[{"runs": count, "rows": dict(rows)} for rows, count in machines.most_common()],
        runs_folder=page.link(paths.RUNS),
        style=_read_trusted(_HERE / "page.css"),
        script=_read_trusted(_HERE / "page.js"),
    )
    write_text(output, text)


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

    def table(self, name: str, title: str) -> dict[str, Any]:
        path = self.results / "tables" / name
        return {
            "title": title,
            "html": _read_trusted(path.with_suffix(".html")),
            "files": self.link(path),
            "command": f"snakemake --cores 1 {path}.csv --config suite={self.suite.name}",
        }

    def figure(self, path: Path, caption: str) -> dict[str, str]:
        """Return a figure's template data; empty for a placeholder."""
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

    def tables_and_figures(self, presentation: Presentation) -> dict[str, Any]:
        """List the tables and figures of a benchmark or set, and the titles of the empty ones."""
        tables = [self.table(table.name, table.title) for table in presentation.tables if len(table.frame)]
        empty = [table.title for table in presentation.tables if not len(table.frame)]
        figures = []
        for name, entry in presentation.figures.items():
            if figure := self.figure(self.results / "figures" / name, entry.caption):
                figures.append(figure)
            else:
                empty.append(caption_title(entry.caption))
        return {"tables": tables, "figures": figures, "empty": list(dict.fromkeys(empty))}

    def claims(self) -> dict[str, Any]:
        """Return the claims with their table and figures; empty if the suite tests no claim."""
        if not self.suite.claimed:
            return {}
        verdicts = pd.read_csv(self.results / "tables" / f"{CLAIMS.name}.csv")
        main = next(item for item in load_paper().items.values() if item.main)
        is_random = has_random_weights(self.suite.runs)
        return {
            "sentences": [] if is_random else verdict_sentences(verdicts),
            "tests": {title: tests.to_dict("records") for title, tests in verdicts.groupby("claim_title", sort=False)},
            "table": self.table(CLAIMS.name, "Every test"),
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
    """Return a caption's first sentence; ``Fig. 4`` does not end one."""
    return re.split(r"\. (?=[A-Z])|: ", caption, maxsplit=1)[0].rstrip(".")


def _page_metrics(run: Run) -> dict[str, Any]:
    """Read the parts of a ``metrics.json`` that the page shows outside tables and figures."""
    metrics = read_metrics(run)
    return {key: metrics.get(key, {}) for key in ("data", "cost", "environment")}


def _section(page: _Page, name: str, recorded: list[dict[str, Any]]) -> dict[str, Any]:
    benchmark = load_benchmark(name)
    runs = page.suite.runs_of(name)
    presentation, is_random = present(benchmark, runs), has_random_weights(runs)
    verdicts = [] if is_random else presentation.verdicts
    return {
        "name": name,
        "title": benchmark.definition.title,
        "random_weights": is_random,
        "suite_note": page.suite.benchmark_parts[name].settings.note or "",
        "verdicts": verdicts,
        "note": presentation.note,
        "data": _data_rows(runs, recorded),
        "training": _training_texts(runs) if presentation.optimizer else {},
        "optimiser": presentation.optimizer,
        **page.tables_and_figures(presentation),
        "parts": [
            {"title": benchmark.tasks[part].title, **page.tables_and_figures(presented)}
            for part, presented in presentation.parts.items()
        ],
    }


def _data_rows(runs: list[Run], recorded: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """List row and label counts per task and split; use the largest split if runs differ."""
    rows = []
    for run, metrics in zip(runs, recorded, strict=True):
        for key, summary in metrics["data"].items():
            split, _, task = key.partition(":")  # "split:task" if a run has several sets
            labels = summary.get("labels") or dict(zip(("from", "to"), summary.get("range", ()), strict=False))
            texts = [f"{label}: {count}" for label, count in labels.items()]
            listed = ", ".join(texts) if len(texts) <= _FEW_LABELS else f"{len(texts)} classes"
            names = (task or run.spec["task"]["name"], "test" if split == "ood" else split)
            rows += [(*names, summary["rows"], listed, summary["dropped"])] if labels else []
    frame = pd.DataFrame(rows, columns=_DATA).sort_values(_DATA[:3], kind="stable")
    return frame.drop_duplicates(_DATA[:2], keep="last").to_dict("records")


def _training_texts(runs: list[Run]) -> dict[str, str]:
    """Describe the training settings by key; list up to three values if runs differ."""
    settings = pd.DataFrame([{**run.spec["training"], **run.spec.get("hparams", {})} for run in runs])
    texts = settings.astype(object).where(settings.notna(), MISSING).astype(str)
    return {key: name_or_count(list(texts[key].unique()), "values") for key in texts}


def _costs(name: str, recorded: list[dict[str, Any]]) -> dict[str, str]:
    """Format the run count, hours, seconds per run and peak memory of a benchmark."""
    costs = pd.DataFrame([metrics["cost"] for metrics in recorded])
    seconds = costs["job_seconds"]
    return {
        "Benchmark": name,
        "Runs": f"{len(costs):,}",
        "Hours": f"{seconds.sum() / 3600:.2f}",
        "Median run (s)": f"{seconds.median():.0f}",
        "Longest run (s)": f"{seconds.max():.0f}",
        "Peak memory (MB)": f"{costs['peak_memory_mb'].max():,.0f}",
    }


def _environment_texts(environment: dict[str, Any]) -> dict[str, str]:
    """Format the machine, packages and commit of a run."""
    texts = {}
    for key, value in environment.items():
        if key != "fingerprint":  # for `check`
            listed = [f"{name} {version}" for name, version in value.items()] if isinstance(value, dict) else value
            texts[key.replace("_", " ")] = (", ".join(listed) or "none") if isinstance(listed, list) else str(listed)
    return texts


def _read_trusted(path: Path) -> Markup:
    """Read a stylesheet, a script, or a rendered table (its cells are escaped) as safe HTML."""
    return Markup(path.read_text())  # noqa: S704
