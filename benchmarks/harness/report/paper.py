"""Write our versions of the paper's tables and figures, and draw Fig. 2.

The files are named after the paper's numbers, such as ``table_4``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from benchmarks.harness.report.common import SETTING_SEPARATOR, name_or_count
from benchmarks.harness.report.evidence import Evidence, find_evidence
from benchmarks.harness.report.paper_items import MainAverage, PaperOutput
from benchmarks.harness.report.presentation import Presentation
from benchmarks.harness.report.style import EMOE, GMOE
from benchmarks.harness.report.table import Table

# the titles of the methods in the main figure, by their keys in paper.yaml
_MAIN_TITLES: dict[Literal["gmoe", "emoe"], str] = {"gmoe": "GMoE", "emoe": "EMoE"}
_MAIN_STYLES = {"gmoe": GMOE, "emoe": EMOE}


def write_paper_items(suite: Suite, presentation: Presentation) -> None:
    """Write our versions of the paper's tables and figures into ``results/<suite>/paper/``.

    The files are named after the paper's numbers, such as ``table_4``. Tables keep only the rows
    that the paper has. Figures are copied, so ``results/<suite>/figures/`` must already have them.

    Args:
        suite: The suite.
        presentation: The tables and figures of a benchmark, or of one of its data sets.
    """
    folder = paths.RESULTS / suite.name / "paper"
    figures = paths.RESULTS / suite.name / "figures"
    tables = {table.name: table for table in presentation.tables}
    for output in paper_items.outputs_of(presentation.artifacts):
        name = presentation.artifacts.stem(output.source.name)
        if output.source.figure:
            _copy_figure(figures / name, folder / output.name)
        else:
            paper_table = _select_paper_rows(tables[name], output, suite)
            paper_table.write(folder)


def _copy_figure(source: Path, target: Path) -> None:
    """Copy a figure in all formats. Both paths have no ending."""
    for ending in FIGURE_FORMATS:
        content = Path(f"{source}.{ending}").read_bytes()
        with atomic_write(Path(f"{target}.{ending}")) as temporary:
            temporary.write_bytes(content)


def _select_paper_rows(table: Table, output: PaperOutput, suite: Suite) -> Table:
    """Return a copy of our table with the paper's title and only the rows that the paper has."""
    of_methods = _select_methods(table.frame, output.source.rows)
    frame = _select_protocol(of_methods, output.source.benchmark, suite)
    is_shorter = len(frame) < len(table.frame)

    caption = (
        f"{table.caption} Models, sets and seeds are those of the suite `{suite.name}`; the "
        "paper's may differ."
    )
    if "p_holm" in frame and is_shorter:
        caption += (
            f" p is corrected over all rows of `{table.name}`; this table shows some of them."
        )

    # the paper's title, then our own if it says more
    title = output.title
    paper_title = paper_items.load_paper().items[output.item].title
    if table.title != paper_title:
        title += f". {table.title}"
    return replace(
        table, frame=frame.reset_index(drop=True), name=output.name, title=title, caption=caption
    )


def _select_methods(frame: pd.DataFrame, methods: Sequence[str] | None) -> pd.DataFrame:
    """Keep the rows of the named methods in all settings.

    All rows are kept if no method is named.
    """
    if not methods or "method" not in frame:
        return frame
    names_without_setting = frame["method"].str.split(SETTING_SEPARATOR, regex=False).str[0]
    return frame[names_without_setting.isin(methods)]


def _select_protocol(frame: pd.DataFrame, benchmark: str, suite: Suite) -> pd.DataFrame:
    """Keep our rows of one protocol: the published one if it has all rows, else the clean one.

    A suite may run the published protocol only for some tasks or methods of the clean one. Rows
    with the paper's own numbers are always kept.
    """
    if "protocol" not in frame:
        return frame
    is_chosen = frame["protocol"].eq(_protocol_with_all_rows(suite, benchmark))
    # a table without this column has no numbers of the paper
    if "is_ours" not in frame:
        return frame[is_chosen]
    is_only_in_paper = ~frame["is_ours"].astype(bool)
    return frame[is_chosen | is_only_in_paper]


def _protocol_with_all_rows(suite: Suite, benchmark: str) -> str:
    """Return ``published`` if a suite plans all rows under this protocol, else ``clean``."""
    # a row of a table has a model, a task and a method
    rows_by_protocol: dict[str, set[tuple[str, ...]]] = {"published": set(), "clean": set()}
    for run in suite.runs_of(benchmark):
        rows_by_protocol[run.protocol].add((run.model, run.task, run.method))
    published_rows = rows_by_protocol["published"]
    clean_rows = rows_by_protocol["clean"]
    if published_rows and published_rows.issuperset(clean_rows):
        return "published"
    return "clean"


def main_rows(numbers: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Compare GMoE and EMoE with the dense model in each main average, such as the mean over GLUE.

    Args:
        numbers: The numbers that claims compare, by benchmark, from
            :func:`.claims_table.read_claim_numbers`.

    Returns:
        Rows for :func:`.plots.draw_forest`, with ``method`` (``gmoe`` or ``emoe``) and ``is_ours``.
        Each average has one panel: the rows of our models, then the rows with the paper's numbers.
    """
    rows: list[dict[str, Any]] = []
    for average in paper_items.load_paper().main.values():
        benchmark = average.of.benchmark
        if benchmark in numbers:
            for model, of_model in numbers[benchmark].groupby("model", sort=False):
                rows += _our_rows(average, str(model), of_model)
        rows += _published_rows(average)
    frame = pd.DataFrame(rows)
    return frame.assign(series=frame["method"].map(_MAIN_TITLES))


def _our_rows(average: MainAverage, model: str, numbers: pd.DataFrame) -> list[dict[str, Any]]:
    """Compute the rows of one of our models, one per method that has runs.

    ``numbers`` are the claim numbers of the model.
    """
    source = average.of
    evidence_by_method: dict[Literal["gmoe", "emoe"], Evidence] = {}
    for method in _MAIN_TITLES:
        # `gmoe` and `emoe` are fields with the names of the two methods in the benchmark
        name_in_benchmark = getattr(source, method)
        comparison = source.comparison(name_in_benchmark)
        evidence = find_evidence(numbers, comparison)
        if evidence is not None:
            evidence_by_method[method] = evidence

    if not evidence_by_method:
        return []
    line = _line_title(average, model, evidence_by_method)
    rows = []
    for method, evidence in evidence_by_method.items():
        row = {
            "panel": average.title,
            "line": line,
            "method": method,
            "is_ours": True,
            **evidence.difference.columns(),
            "style": _MAIN_STYLES[method],
        }
        rows.append(row)
    return rows


def _published_rows(average: MainAverage) -> list[dict[str, Any]]:
    """Make the rows with the paper's numbers of an average, drawn as crosses without intervals."""
    rows = []
    for model, scores in average.paper.items():
        for method in _MAIN_TITLES:
            row = {
                "panel": average.title,
                "line": model,
                "method": method,
                "is_ours": False,
                "delta": (scores[method] - scores["dense"]) / 100,  # from percent to a share
                "n": 0,  # no interval
                "style": replace(_MAIN_STYLES[method], marker="x"),
            }
            rows.append(row)
    return rows


def _line_title(
    average: MainAverage,
    model: str,
    evidence_by_method: Mapping[Literal["gmoe", "emoe"], Evidence],
) -> str:
    """Return the title of a line in the figure: the model, the compared tasks, and the pairs.

    If the methods have other tasks or other numbers of pairs, each method is described apart.
    """
    compared_texts = []
    texts_with_method = []
    for method, evidence in evidence_by_method.items():
        text = _compared_text(average, evidence)
        compared_texts.append(text)
        texts_with_method.append(f"{_MAIN_TITLES[method]}: {text}")

    compared = ";\n".join(texts_with_method)
    are_all_the_same = len(set(compared_texts)) == 1
    if are_all_the_same:
        compared = compared_texts[0]
    return f"{model_title(model)}\n({compared})"


def _compared_text(average: MainAverage, evidence: Evidence) -> str:
    """Name the compared tasks, and count the pairs. More than three tasks are only counted."""
    titles = load_benchmark(average.of.benchmark).task_titles
    tasks = [titles.get(task, task) for task in evidence.tasks]
    pairs = plots.count_text([evidence.difference.n], "pairs")
    return f"{name_or_count(tasks, 'sets')}; {pairs}"


def draw_main(numbers: Mapping[str, pd.DataFrame], path: Path) -> None:
    """Draw the paper's main figure: how GMoE and EMoE differ from the dense model.

    Each main average has a panel, and each model a line. Without numbers of ours, a placeholder is
    drawn.

    Args:
        numbers: The numbers that claims compare, by benchmark.
        path: The path without ending.
    """
    rows = main_rows(numbers)
    if rows["is_ours"].any():
        label = "Difference to the dense model (points); bars: 95 % intervals; crosses: the paper"
        plots.draw_forest(rows, path, label)
    else:
        plots.placeholder_figure(path)
