"""Write the page of a suite, one self-contained HTML file: verdicts first, then tables and figures, then costs."""

from __future__ import annotations

import base64
import os
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from markupsafe import Markup

import emoe
from benchmarks.harness import base as paths
from benchmarks.harness.base import write_text
from benchmarks.harness.config.catalogue import model_title
from benchmarks.harness.config.suite import Suite
from benchmarks.harness.report.artifacts import CLAIMS, artifacts_of
from benchmarks.harness.report.claims import claimed_benchmarks
from benchmarks.harness.report.claims_table import CAPTION, verdict_sentences
from benchmarks.harness.report.common import name_or_count
from benchmarks.harness.report.paper import paper_index
from benchmarks.harness.report.paper_items import load_paper, main_figure
from benchmarks.harness.report.plots import is_drawn
from benchmarks.harness.report.section import Machine, Section, read_section, section_title
from benchmarks.harness.report.table import TEMPLATES

_HERE = Path(__file__).parent
_DATA = ["Task", "Split", "Rows used", "By label", "Dropped without a clear label or text"]


def write_report(suite: Suite, output: Path, benchmark: str | None = None) -> None:
    """Write the page of a suite, or of one benchmark without the claims. The tables and figures must exist."""
    page = _Page(suite, output.parent.absolute())
    names = [name for name in suite.settings.benchmarks if benchmark in (None, name)]
    sections = {name: read_section(artifacts_of(name), suite.name) for name in names}
    costs = {name: _costs(name, [section]) for name, section in sections.items()}
    cost_of_all = _costs("all", list(sections.values()))
    models: dict[str, None] = {}
    run_names: dict[str, str] = {}
    for section in sections.values():
        models |= dict.fromkeys(section.models)
        run_names |= section.runs
    is_random = _are_random(sections.values())
    text = TEMPLATES.get_template("page.html.j2").render(
        suite=suite.name,
        version=emoe.__version__,
        claims={} if benchmark else page.claims(is_random),
        shown_names=names,
        sections=[
            {**page.section(name, section), "cost": costs[name]}
            for name, section in sections.items()
        ],
        models=name_or_count([model_title(model) for model in models], "models"),
        paper=[] if benchmark else page.paper_items(),
        costs=[*costs.values(), cost_of_all],
        machines=_sum_machines(sections.values()),
        runs_folder=page.link(paths.RUNS),
        run_names=run_names,
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

    def drawn_figure(self, path: Path, caption: str) -> dict[str, str]:
        """Return a figure's template data; empty for a placeholder."""
        return self.figure(path, caption) if is_drawn(path) else {}

    def figure(self, path: Path, caption: str) -> dict[str, str]:
        """Return a figure's template data."""
        image = base64.b64encode(path.with_suffix(".png").read_bytes()).decode()
        return {
            "name": path.name,
            "image": f"data:image/png;base64,{image}",
            "files": self.link(path),
            "caption": caption,
            "alt": caption_title(caption),
        }

    def tables_and_figures(self, section: Section) -> dict[str, Any]:
        """List the tables and figures of a section, and the titles of the empty ones."""
        tables = []
        figures = []
        empty: dict[str, None] = {}
        for table in section.tables:
            if table.is_empty:
                empty[table.title] = None
            else:
                tables.append(self.table(table.name, table.title))
        for figure in section.figures:
            if figure.is_empty:
                empty[caption_title(figure.caption)] = None
            else:
                figures.append(self.figure(self.results / "figures" / figure.name, figure.caption))
        return {"tables": tables, "figures": figures, "empty": list(empty)}

    def section(self, name: str, section: Section) -> dict[str, Any]:
        """Return the template data of a benchmark and its sets."""
        parts = []
        for part in self.suite.parts(name):
            of_set = artifacts_of(name, part)
            shown = self.tables_and_figures(read_section(of_set, self.suite.name))
            parts.append({"title": section_title(of_set), **shown})
        return {
            "name": name,
            "title": section_title(artifacts_of(name)),
            "random_weights": bool(section.random_weights),
            "suite_note": self.suite.benchmark_parts[name].settings.note or "",
            "verdicts": section.verdicts,
            "note": section.note,
            "data": [
                dict(zip(_DATA, row.model_dump().values(), strict=True)) for row in section.data
            ],
            "training": section.training,
            "optimizer": section.optimizer,
            **self.tables_and_figures(section),
            "parts": parts,
        }

    def claims(self, is_random: bool) -> dict[str, Any]:
        """Return the claims with their table and figures; empty if the suite tests no claim."""
        if not claimed_benchmarks(self.suite):
            return {}
        verdicts = pd.read_csv(self.results / "tables" / f"{CLAIMS.name}.csv")
        main = next(item for item in load_paper().items.values() if item.main)
        return {
            "sentences": [] if is_random else verdict_sentences(verdicts),
            "tests": {
                title: tests.to_dict("records")
                for title, tests in verdicts.groupby("claim_title", sort=False)
            },
            "table": self.table(CLAIMS.name, "Every test"),
            "figure": self.drawn_figure(self.results / "figures" / CLAIMS.name, CAPTION),
            "main": self.drawn_figure(main_figure(self.suite.name), main.caption or ""),
        }

    def paper_items(self) -> list[dict[str, Any]]:
        """List the files of the paper's items; empty if the suite makes none of them."""
        rows = paper_index(self.suite)
        for row in rows:
            files = [
                Path(re.sub(r"\.md$", ".html", file)) for file in row["files"]
            ]  # a browser shows no Markdown
            row["files"] = [(file.name, self.link(file) if file.exists() else "") for file in files]
        return rows if any(row["files"] for row in rows) else []


def caption_title(caption: str) -> str:
    """Return a caption's first sentence; ``Fig. 4`` does not end one."""
    return re.split(r"\. (?=[A-Z])|: ", caption, maxsplit=1)[0].rstrip(".")


def _are_random(sections: Iterable[Section]) -> bool:
    """Return True if all models of all sections have random weights."""
    known = [section.random_weights for section in sections if section.random_weights is not None]
    return bool(known) and all(known)


def _costs(name: str, sections: Sequence[Section]) -> dict[str, str]:
    """Format the run count, hours, seconds per run and peak memory of some benchmarks."""
    seconds: list[float] = []
    for section in sections:
        seconds += section.job_seconds
    peak_memory = max(section.peak_memory_mb for section in sections)
    return {
        "Benchmark": name,
        "Runs": f"{len(seconds):,}",
        "Hours": f"{sum(seconds) / 3600:.2f}",
        "Median run (s)": f"{statistics.median(seconds):.0f}",
        "Longest run (s)": f"{max(seconds):.0f}",
        "Peak memory (MB)": f"{peak_memory:,.0f}",
    }


def _sum_machines(sections: Iterable[Section]) -> list[Machine]:
    """Add up the runs of each machine, and list the machines, those with most runs first."""
    runs: Counter[tuple[tuple[str, str], ...]] = Counter()
    for section in sections:
        for machine in section.machines:
            runs[tuple(machine.facts.items())] += machine.runs
    return [Machine(runs=count, facts=dict(facts)) for facts, count in runs.most_common()]


def _read_trusted(path: Path) -> Markup:
    """Read a stylesheet, a script, or a rendered table (its cells are escaped) as safe HTML."""
    return Markup(path.read_text(encoding="utf-8"))  # noqa: S704
