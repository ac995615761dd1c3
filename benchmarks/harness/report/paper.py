"""Write our counterparts of the paper's tables and figures, numbered as in the paper, and draw Fig. 2."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from benchmarks.harness import base as paths
from benchmarks.harness.base import atomic_write
from benchmarks.harness.config.benchmark import load_benchmark
from benchmarks.harness.config.catalogue import model_title
from benchmarks.harness.config.suite import Suite
from benchmarks.harness.report import paper_items, plots
from benchmarks.harness.report.artifacts import FIGURE_FORMATS
from benchmarks.harness.report.common import SETTING, name_or_count
from benchmarks.harness.report.evidence import Evidence, find_evidence
from benchmarks.harness.report.paper_items import MainAverage, PaperOutput
from benchmarks.harness.report.presentation import Presentation
from benchmarks.harness.report.style import EMOE, GMOE, MethodStyle
from benchmarks.harness.report.table import Table

_PROTOCOLS = ("published", "clean")  # in order of preference


def write_paper_items(suite: Suite, presentation: Presentation) -> None:
    """Write the paper's tables and figures into ``results/<suite>/paper/``, with its numbering and rows.

    The figures of the benchmark or set must be drawn already, because they are copied.
    """
    folder = paths.RESULTS / suite.name / "paper"
    by_name = {table.name: table for table in presentation.tables}
    for output in paper_items.outputs_of(presentation.artifacts):
        name = presentation.artifacts.stem(output.part.name)
        if output.part.figure:
            for end in FIGURE_FORMATS:
                with atomic_write(folder / f"{output.name}.{end}") as temporary:
                    temporary.write_bytes(
                        (folder.parent / "figures" / f"{name}.{end}").read_bytes()
                    )
        else:
            _select_paper_rows(by_name[name], output, suite).write(folder)


def _select_paper_rows(table: Table, output: PaperOutput, suite: Suite) -> Table:
    """Keep the paper's rows, under the authors' selection if the suite has it, else the clean one."""
    frame, caption = table.frame, table.caption
    if output.part.rows and "method" in frame:
        frame = frame[frame["method"].str.split(SETTING, regex=False).str[0].isin(output.part.rows)]
    if "protocol" in frame:
        ran = {run.spec.get("protocol") for run in suite.runs_of(output.part.benchmark)}
        protocol = next((name for name in _PROTOCOLS if name in ran), None)
        is_paper = (
            frame["is_ours"].eq(False)
            if "is_ours" in frame
            else pd.Series(False, index=frame.index)
        )
        frame = frame[frame["protocol"].eq(protocol) | is_paper]
    if "p_holm" in frame and len(frame) < len(table.frame):
        caption += (
            f" p is corrected over all rows of `{table.name}`; this table shows some of them."
        )
    is_named = table.title == paper_items.load_paper().items[output.item].title
    title = output.title if is_named else f"{output.title}. {table.title}"
    return replace(
        table, frame=frame.reset_index(drop=True), name=output.name, title=title, caption=caption
    )


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
        command = (
            "" if item.missing else f"snakemake --cores all {name} --config suite={suite.name}"
        )
        row = {"item": name, "title": item.title, "naacl": item.naacl, "command": command}
        rows.append({**row, "files": shown, "status": status})
    return rows


_MAIN: dict[Literal["gmoe", "emoe"], tuple[str, MethodStyle]] = {
    "gmoe": ("GMoE", GMOE),
    "emoe": ("EMoE", EMOE),
}


def main_rows(numbers: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Compare GMoE and EMoE with the dense model in each main average: first our models, then the paper's.

    Args:
        numbers: The claim numbers of a suite, by benchmark.

    Returns:
        Rows for :func:`.plots.draw_forest`, with the ``method`` and ``is_ours``.
    """
    rows: list[dict[str, Any]] = []
    no_numbers = pd.DataFrame(columns=["model"])
    for average in paper_items.load_paper().main.values():
        for model, of_model in numbers.get(average.of.benchmark, no_numbers).groupby(
            "model", sort=False
        ):
            compared = {
                method: find_evidence(of_model, average.of.comparison(getattr(average.of, method)))
                for method in _MAIN
            }
            evidence = {method: result for method, result in compared.items() if result}
            line = _line_title(average, str(model), evidence.values())
            for method, result in evidence.items():
                row = {"panel": average.title, "line": line, "method": method, "is_ours": True}
                rows.append(
                    {
                        **row,
                        **result.difference.columns(),
                        "n": result.difference.n,
                        "style": _MAIN[method][1],
                    }
                )
        for model, published in average.paper.items():
            for method, (_, style) in _MAIN.items():
                row = {"panel": average.title, "line": model, "method": method, "is_ours": False}
                delta = (published[method] - published["dense"]) / 100
                rows.append({**row, "delta": delta, "n": 0, "style": replace(style, marker="x")})
    frame = pd.DataFrame(rows)
    return frame.assign(
        series=frame["method"].map({method: title for method, (title, _) in _MAIN.items()})
    )


def _line_title(average: MainAverage, model: str, evidence: Collection[Evidence]) -> str:
    """Return a model's title, with the tasks and the number of pairs."""
    titles = load_benchmark(average.of.benchmark).task_titles
    tasks = dict.fromkeys(titles.get(task, task) for result in evidence for task in result.tasks)
    pairs = plots.count_text([result.difference.n for result in evidence], "pairs")
    return f"{model_title(model)}\n({name_or_count(list(tasks), 'sets')}; {pairs})"


def draw_main(numbers: Mapping[str, pd.DataFrame], path: Path) -> None:
    """Draw the differences of GMoE and EMoE to the dense model: a panel per average, a line per model."""
    rows = main_rows(numbers)
    if rows["is_ours"].any():
        label = "Difference to the dense model (points); bars: 95 % intervals; crosses: the paper"
        plots.draw_forest(rows, path, label)
    else:
        plots.placeholder_figure(path)
