"""Write our counterparts of the paper's tables and figures, numbered as in the paper, and draw Fig. 2."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from benchmarks.harness import base as paths
from benchmarks.harness.base import atomic_write
from benchmarks.harness.config import paper_items
from benchmarks.harness.config.artifacts import FIGURE_FORMATS, Artifacts
from benchmarks.harness.config.benchmark import load_benchmark
from benchmarks.harness.config.catalogue import model_title
from benchmarks.harness.config.paper_items import MainAverage, PaperOutput
from benchmarks.harness.config.suite import Suite
from benchmarks.harness.report import plots
from benchmarks.harness.report.common import SETTING, name_or_count
from benchmarks.harness.report.presentation import Presentation
from benchmarks.harness.report.style import EMOE, GMOE, MethodStyle
from benchmarks.harness.report.table import RUNS, Table
from benchmarks.harness.results.claims import find_evidence

_PROTOCOLS = ("published", "clean")  # in order of preference


def write_paper_items(suite: Suite, artifacts: Artifacts, presentation: Presentation) -> None:
    """Write the paper's tables and figures into ``results/<suite>/paper/``, with its numbering and rows.

    The figures of the benchmark or set must be drawn already, because they are copied.
    """
    folder = paths.RESULTS / suite.name / "paper"
    tables = {table.name: table for table in presentation.tables}
    for output in paper_items.outputs_of(artifacts):
        name = artifacts.stem(output.part.name)
        if output.part.figure:
            for end in FIGURE_FORMATS:
                with atomic_write(folder / f"{output.name}.{end}") as temporary:
                    temporary.write_bytes((folder.parent / "figures" / f"{name}.{end}").read_bytes())
        else:
            _select_paper_rows(tables[name], output, suite).write(folder)


def _select_paper_rows(table: Table, output: PaperOutput, suite: Suite) -> Table:
    """Keep the rows that the paper has, under the authors' selection if the suite runs it, else the clean one."""
    frame, caption = table.frame, [table.caption]
    if output.part.rows and "method" in frame:
        frame = frame[frame["method"].str.split(SETTING, regex=False).str[0].isin(output.part.rows)]
    if "protocol" in frame:
        ran = {run.spec.get("protocol") for run in suite.runs_of(output.part.benchmark)}
        protocol = next((name for name in _PROTOCOLS if name in ran), None)
        is_paper = frame["is_ours"].eq(False) if "is_ours" in frame else pd.Series(False, index=frame.index)
        frame = frame[frame["protocol"].eq(protocol) | is_paper]
    if "p_holm" in frame and len(frame) < len(table.frame):
        caption.append(f"p is corrected over all rows of `{table.name}`; this table shows some of them.")
    if RUNS in frame and len(frame) > 0 and frame[RUNS].eq("").all():
        caption.append("All numbers are published: this suite runs none of these rows.")
    caption.append(f"Made by `snakemake --cores all {output.item} --config suite={suite.name}`.")
    is_named = table.title == paper_items.load_paper().items[output.item].title
    title = output.title if is_named else f"{output.title}. {table.title}"
    return replace(table, frame=frame.reset_index(drop=True), name=output.name, title=title, caption=" ".join(caption))


def paper_index(suite: Suite) -> list[dict[str, Any]]:
    """List the paper's items: ``item``, ``title``, ``naacl``, ``command``, ``files`` of the suite, ``status``."""
    rows: list[dict[str, Any]] = []
    for name, item in paper_items.load_paper().items.items():
        files = paper_items.paper_files(suite, name)
        existing = sum(Path(file).exists() for file in files)
        shown = [file for file in files if file.endswith((".md", ".png"))]
        if item.missing:
            status = f"not made: {item.missing}"
        elif not files:
            status = f"not in this suite (benchmark {', '.join(paper_items.item_benchmarks(item))})"
        elif existing < len(files):
            status = f"{existing} of {len(files)} files"
        else:
            shown = [file for file in shown if file.endswith(".md") or plots.is_drawn(Path(file))]
            status = "made" if shown else "no run of this suite is of it"
        command = "" if item.missing else f"snakemake --cores all {name} --config suite={suite.name}"
        row = {"item": name, "title": item.title, "naacl": item.naacl, "command": command}
        rows.append({**row, "files": shown, "status": status})
    return rows


_MAIN_STYLES: dict[Literal["gmoe", "emoe"], MethodStyle] = {"gmoe": GMOE, "emoe": EMOE}
_MAIN_TITLES = {"gmoe": "GMoE", "emoe": "EMoE"}


def main_rows(numbers: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Compare GMoE and EMoE with the dense model in each main average: first our models, then the paper's.

    Args:
        numbers: The claim numbers of a suite, by benchmark.

    Returns:
        Rows for :func:`.plots.draw_forest`, with the ``method`` and ``is_ours``.
    """
    rows = []
    for average in paper_items.load_paper().main.values():
        if average.of.benchmark in numbers:
            rows += _our_differences(average, numbers[average.of.benchmark])
        for model, published in average.paper.items():
            for method, style in _MAIN_STYLES.items():
                row = {"panel": average.title, "line": model, "method": method, "is_ours": False}
                row |= {"delta": (published[method] - published["dense"]) / 100, "n": 0}
                rows.append({**row, "series": _MAIN_TITLES[method], "style": replace(style, marker="x")})
    return pd.DataFrame(rows)


def _our_differences(average: MainAverage, numbers: pd.DataFrame) -> list[dict[str, Any]]:
    """Compare the methods with the dense model, for each model; its line names the tasks and counts the pairs."""
    titles = load_benchmark(average.of.benchmark).task_titles
    rows = []
    for model, of_model in numbers.groupby("model", sort=False):
        compared = {}
        for method in _MAIN_STYLES:
            evidence = find_evidence(of_model, average.of.comparison(getattr(average.of, method)))
            if evidence:
                compared[method] = evidence
        tasks = dict.fromkeys(titles.get(task, task) for evidence in compared.values() for task in evidence.tasks)
        pairs = plots.count_text([evidence.difference.n for evidence in compared.values()], "pairs")
        line = f"{model_title(str(model))}\n({name_or_count(list(tasks), 'sets')}; {pairs})"
        for method, evidence in compared.items():
            row = {"panel": average.title, "line": line, "method": method, "is_ours": True}
            row |= {**evidence.difference.columns(), "n": evidence.difference.n}
            rows.append({**row, "series": _MAIN_TITLES[method], "style": _MAIN_STYLES[method]})
    return rows


def draw_main(rows: pd.DataFrame, path: Path) -> None:
    """Draw the differences of GMoE and EMoE to the dense model: a panel per average, a line per model."""
    if rows["is_ours"].any():
        plots.draw_forest(
            rows, path, "Difference to the dense model (points); bars: 95 % intervals; crosses: the paper"
        )
    else:
        plots.placeholder_figure(path, "this suite runs none of the main averages")
