"""Write the page of a suite: one HTML file that contains its images, style and script.

Verdicts come first, then tables and figures, then costs.
"""

from __future__ import annotations

import base64
import os
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from markupsafe import Markup
from PIL import Image

import emoe
from benchmarks.harness import base as paths
from benchmarks.harness.base import distinct, read_text, write_text
from benchmarks.harness.config.catalogue import model_title
from benchmarks.harness.config.suite import Suite
from benchmarks.harness.report.artifacts import CLAIMS, NARROW, artifacts_of, remake_advice
from benchmarks.harness.report.claim_rows import read_claim_rows
from benchmarks.harness.report.claims import claimed_benchmarks
from benchmarks.harness.report.claims_figure import CAPTION
from benchmarks.harness.report.claims_table import verdict_sentences
from benchmarks.harness.report.common import name_or_count
from benchmarks.harness.report.paper_index import paper_index
from benchmarks.harness.report.paper_items import load_paper, main_figure, main_item
from benchmarks.harness.report.placeholders import is_drawn
from benchmarks.harness.report.plots import STYLE
from benchmarks.harness.report.section import (
    DataRow,
    Machine,
    Section,
    merge_machines,
    read_section,
    section_title,
)
from benchmarks.harness.report.table import TEMPLATES

_HERE = Path(__file__).parent
# columns of the table of the claims: those of the sentences on the verdicts, then those of the rows
_CLAIM_COLUMNS = (
    "claim",
    "claim_title",
    "endpoint",
    "verdict",
    "benchmark",
    "test_shown",
    "gain",
    "difference_shown",
    "n_shown",
    "paper",
)
_READABLE_DPI = 120  # pixels of an inch; a letter of 7 points is then 11.7 pixels high


def write_report(suite: Suite, output: Path, benchmark: str | None = None) -> None:
    """Write the HTML page of a suite, or of one of its benchmarks.

    The tables, figures and sections must exist. Only the page of a suite has the claims and the
    paper's tables and figures.
    """
    page = _Page(suite, folder=output.parent.absolute())
    names = list(suite.settings.benchmarks)
    if benchmark is not None:
        names = [name for name in names if name == benchmark]
    sections = {name: read_section(artifacts_of(name), suite.name) for name in names}
    all_sections = list(sections.values())

    shown_sections = [page.section(name, section) for name, section in sections.items()]
    # a row for each benchmark, and one for all
    cost_rows = [_cost_cells(name, [section]) for name, section in sections.items()]
    cost_rows.append(_cost_cells("all", all_sections))

    claims = {}
    paper_items = []
    if benchmark is None:
        claims = page.claims(_are_random(all_sections))
        paper_items = page.paper_items()

    text = TEMPLATES.get_template("page.html.j2").render(
        suite=suite.name,
        version=emoe.__version__,
        claims=claims,
        shown_names=names,
        sections=shown_sections,
        models=_models_text(all_sections),
        paper=paper_items,
        cost=_cost_text(all_sections),
        costs=cost_rows,
        machines=_machines_of(all_sections),
        runs_folder=page.link(paths.RUNS),
        run_names=_run_names(all_sections),
        style=_trust(read_text(_HERE / "page.css")),
        script=_trust(read_text(_HERE / "page.js")),
    )
    write_text(output, text)


@dataclass(frozen=True)
class _Page:
    """The parts of a page that read files or link to them. Methods return data for the template.

    Attributes:
        suite: The suite.
        folder: The absolute path of the page's folder. Links are relative to it.
    """

    suite: Suite
    folder: Path

    @property
    def results(self) -> Path:
        return paths.RESULTS / self.suite.name

    def link(self, path: Path) -> str:
        """Return the relative link to a file."""
        relative = os.path.relpath(path.absolute(), self.folder)
        return Path(relative).as_posix()

    def table(self, name: str, title: str) -> dict[str, Any]:
        """Return the HTML of a written table, the link to its files, and the command to make it."""
        path = self.results / "tables" / name
        return {
            "title": title,
            "html": self._read_html(path.with_suffix(".html")),
            "link_without_ending": self.link(path),
            "command": f"snakemake --cores 1 {path}.csv --config suite={self.suite.name}",
        }

    def _read_html(self, path: Path) -> Markup:
        """Read a written table. Its cells are already escaped."""
        return _trust(read_text(path, remake_advice(path, self.suite.name)))

    def drawn_figure(self, path: Path, caption: str, narrow: Path | None = None) -> dict[str, str]:
        """Return a written figure as an image with caption and link, as :meth:`figure` does.

        The dictionary is empty if the figure is only a placeholder.
        """
        if not is_drawn(path):
            return {}
        return self.figure(path, caption, narrow)

    def figure(self, path: Path, caption: str, narrow: Path | None = None) -> dict[str, str]:
        """Return a written figure as an image, with its caption and the link to its files.

        Paths have no ending. ``narrow`` is the same figure for telephones; without it, they show
        the same image.
        """
        return {
            "name": path.name,
            "image": _read_image(path),
            "readable_width": str(_readable_width(path)),
            "narrow_image": _read_image(narrow) if narrow else "",
            "link_without_ending": self.link(path),
            "caption": caption,
            "alt": caption_title(caption),
        }

    def tables_and_figures(self, section: Section) -> dict[str, Any]:
        """Return the ``tables`` and ``figures`` of a section that have content.

        ``empty`` has the titles of the other tables and figures.
        """
        tables = []
        figures = []
        empty = []
        for table in section.tables:
            if table.is_empty:
                empty.append(table.title)
            else:
                tables.append(self.table(table.name, table.title))
        for figure in section.figures:
            if figure.is_empty:
                empty.append(caption_title(figure.caption))
            else:
                path = self.results / "figures" / figure.name
                figures.append(self.figure(path, figure.caption))
        # a table and a figure may have the same title
        return {"tables": tables, "figures": figures, "empty": distinct(empty)}

    def section(self, name: str, section: Section) -> dict[str, Any]:
        """Return what the page shows of a benchmark, and of each of its sets that has tables."""
        data_sets = []
        for data_set in self.suite.sets_with_tables(name):
            of_set = artifacts_of(name, data_set)
            shown = self.tables_and_figures(read_section(of_set, self.suite.name))
            data_sets.append({"title": section_title(of_set), **shown})

        return {
            "name": name,
            "title": section_title(artifacts_of(name)),
            "random_weights": bool(section.random_weights),
            "suite_note": self.suite.benchmark_parts[name].settings.note or "",
            "verdicts": section.verdicts,
            "note": section.note,
            "data": [_data_cells(row) for row in section.data],
            "data_warnings": [mixed.warning for mixed in section.mixed_sets],
            "training": section.training,
            "optimizer": section.optimizer,
            **self.tables_and_figures(section),
            "data_sets": data_sets,
            "cost": _cost_text([section]),
        }

    def claims(self, is_random: bool) -> dict[str, Any]:
        """Return the claims with their table and figures. Empty if the suite tests no claim.

        ``is_random`` is True if all models have random weights, so that verdicts mean nothing.
        """
        if not claimed_benchmarks(self.suite):
            return {}
        # one row per test
        rows = read_claim_rows(self.suite.name, _CLAIM_COLUMNS)

        sentences: list[str] = []
        if not is_random:
            sentences = verdict_sentences(pd.DataFrame(rows))

        # the page has one group of rows per claim
        tests_by_claim: dict[str, list[dict[str, str]]] = {}
        for row in rows:
            tests_by_claim.setdefault(row["claim_title"], []).append(row)

        figures = self.results / "figures"
        narrow = figures / CLAIMS.stem(NARROW)
        figure_of_averages = load_paper().items[main_item()]
        main_caption = figure_of_averages.caption or ""
        return {
            "sentences": sentences,
            "tests": tests_by_claim,
            "table": self.table(CLAIMS.name, "Every test"),
            "figure": self.drawn_figure(figures / CLAIMS.name, CAPTION, narrow),
            "main": self.drawn_figure(main_figure(self.suite.name), main_caption),
        }

    def paper_items(self) -> list[dict[str, Any]]:
        """List the paper's tables and figures with links to our versions.

        Each item is a row of :func:`.paper_index.paper_index`, with the additional key ``links``.
        It has a pair for each of the row's ``files``: the file's name, and the link to it. The link
        is empty for a missing file. The list is empty if the suite makes none of our versions.
        """
        rows = paper_index(self.suite)
        if not any(row["files"] for row in rows):
            return []
        items = []
        for row in rows:
            links = [self._paper_link(file) for file in row["files"]]
            items.append({**row, "links": links})
        return items

    def _paper_link(self, file: str) -> tuple[str, str]:
        """Return the name of a file and the link to it, which is empty for a missing file."""
        path = Path(file)
        # a browser shows HTML, but not Markdown
        if path.suffix == ".md":
            path = path.with_suffix(".html")
        if not path.exists():
            return path.name, ""
        return path.name, self.link(path)


def _data_cells(row: DataRow) -> dict[str, Any]:
    """Return the cells of a row in the table of data sets, by heading."""
    return {
        "Task": row.task,
        "Split": row.split,
        "Rows used": row.rows,
        "By label": row.labels,
        "Dropped without a clear label or text": row.dropped,
    }


def _models_text(sections: Iterable[Section]) -> str:
    """List the titles of the models in some sections. More than three are only counted."""
    names: list[str] = []
    for section in sections:
        names += section.models
    titles = [model_title(name) for name in distinct(names)]
    return name_or_count(titles, "models")


def _run_names(sections: Iterable[Section]) -> dict[str, str]:
    """Map the folder of each run in some sections to a readable name."""
    names: dict[str, str] = {}
    for section in sections:
        names.update(section.runs)
    return names


def caption_title(caption: str) -> str:
    """Return the first sentence of a caption, or its text before a colon.

    A full stop ends a sentence only before a capital letter, so ``Fig. 4`` does not end one.
    """
    parts = re.split(r"\. (?=[A-Z])|: ", caption, maxsplit=1)
    title = parts[0]
    return title.rstrip(".")  # a caption of one sentence still has its full stop


def _are_random(sections: Iterable[Section]) -> bool:
    """Return True if all models of all sections have random weights."""
    # a section of measurements has None, because its weights do not matter
    known = [section.random_weights for section in sections if section.random_weights is not None]
    if not known:
        return False
    return all(known)


def _cost_cells(name: str, sections: Sequence[Section]) -> dict[str, str]:
    """Return a row of the table of costs: the runs, times and memory of sections, by heading.

    ``name`` is the first cell: the name of a benchmark, or ``all``.
    """
    seconds: list[float] = []
    for section in sections:
        seconds += section.job_seconds
    peak_memory = max(section.peak_memory_mb for section in sections)
    return {
        "Benchmark": name,
        "Runs": f"{len(seconds):,}",
        "All runs (min)": f"{sum(seconds) / 60:,.1f}",
        "Typical run (s)": f"{statistics.median(seconds):,.0f}",
        "Longest run (s)": f"{max(seconds):,.0f}",
        "Most memory (GB)": f"{peak_memory / 1000:,.1f}",
    }


def _cost_text(sections: Sequence[Section]) -> str:
    """Write the number of runs and their time, such as ``15 runs, 2 h 5 min of computing``."""
    num_runs = sum(len(section.job_seconds) for section in sections)
    seconds_of_sections = [sum(section.job_seconds) for section in sections]
    seconds = sum(seconds_of_sections)
    noun = "run" if num_runs == 1 else "runs"
    return f"{num_runs:,} {noun}, {duration_text(seconds)} of computing"


def duration_text(seconds: float) -> str:
    """Write a duration in hours and minutes, in minutes, or in seconds if it is short."""
    whole_seconds = round(seconds)
    if whole_seconds < 60:
        return f"{whole_seconds} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60:,} h {minutes % 60} min"


def _machines_of(sections: Iterable[Section]) -> list[Machine]:
    """List the machines of all sections with their total runs, those with most runs first."""
    machines: list[Machine] = []
    for section in sections:
        machines += section.machines
    return merge_machines(machines)


def _readable_width(path: Path) -> int:
    """Return the width in pixels at which a telephone shows a figure with readable letters.

    ``path`` has no ending.
    """
    with Image.open(path.with_suffix(".png")) as image:
        inches = image.width / STYLE["savefig.dpi"]
    return round(inches * _READABLE_DPI)


def _read_image(path: Path) -> str:
    """Return a written figure as a URL that contains the image, so that the page is one file.

    ``path`` has no ending.
    """
    content = path.with_suffix(".png").read_bytes()
    text = base64.b64encode(content).decode()
    return f"data:image/png;base64,{text}"


def _trust(text: str) -> Markup:
    """Mark a stylesheet, a script or a rendered table as HTML that templates do not escape."""
    return Markup(text)  # noqa: S704
