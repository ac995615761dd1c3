"""Write tables and figures under the paper's numbers, and list them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.harness.base import paths
from benchmarks.harness.base.files import atomic_write
from benchmarks.harness.config.artifacts import FIGURE_FORMATS, Artifacts
from benchmarks.harness.config.paper_items import (
    PaperOutput,
    item_benchmarks,
    load_paper_items,
    outputs_of,
    paper_files,
)
from benchmarks.harness.config.suite import Suite
from benchmarks.harness.report.common_tables import difference_text
from benchmarks.harness.report.outcomes import SETTING
from benchmarks.harness.report.presentation import Presentation
from benchmarks.harness.report.rendering import MISSING, RUNS, Table

_PROTOCOLS = ("published", "clean")  # the paper's own first
_FEW = 3  # verdicts in a caption
_COST = "cost"  # the table that verdicts say nothing about


def write_paper_items(suite: Suite, artifacts: Artifacts, presentation: Presentation) -> None:
    """Write tables and figures once more into ``results/<suite>/paper/``, under the paper's numbers and with its rows.

    Args:
        suite: The suite.
        artifacts: The names of the tables and figures of a benchmark, or of one of its sets.
        presentation: These tables; the figures are drawn already.
    """
    folder = paths.RESULTS / suite.name / "paper"
    tables = {table.name: table for table in presentation.tables}
    for output in outputs_of(artifacts):
        name = artifacts.stem(output.part.name)
        if output.part.figure:
            for end in FIGURE_FORMATS:
                with atomic_write(folder / f"{output.name}.{end}") as temporary:
                    temporary.write_bytes((folder.parent / "figures" / f"{name}.{end}").read_bytes())
        else:
            _select_paper_rows(tables[name], output, suite, presentation.verdicts).write(folder)


def _select_paper_rows(table: Table, output: PaperOutput, suite: Suite, verdicts: Sequence[str]) -> Table:
    """Keep the paper's rows of one selection: the authors' if the suite runs it, else the clean one."""
    frame, caption = table.frame, [table.caption]
    if output.part.rows and "method" in frame:
        frame = frame[frame["method"].str.split(SETTING, regex=False).str[0].isin(output.part.rows)]
    if "protocol" in frame:
        ran = {run.spec.get("protocol") for run in suite.runs_of(output.part.benchmark)}
        protocol = next((name for name in _PROTOCOLS if name in ran), None)
        is_paper = frame["is_ours"].eq(False) if "is_ours" in frame else pd.Series(False, index=frame.index)
        frame = frame[frame["protocol"].eq(protocol) | is_paper]
    if "p_holm" in frame and len(frame) < len(table.frame):
        caption.append(f"p is corrected over all rows of `{table.name}`, of which some stand here.")
    if RUNS in frame and len(frame) > 0 and frame[RUNS].eq("").all():
        caption.append("All numbers are published ones: this suite runs none of these rows.")
    elif output.part.name != _COST and (summary := _summary(frame, verdicts)):
        caption.append(f"What these runs see: {summary}")
    caption.append(f"Made by `snakemake --cores all {output.item} --config suite={suite.name}`.")
    titles = [output.title, *([] if table.title == load_paper_items()[output.item].title else [table.title])]
    return replace(
        table,
        frame=frame.reset_index(drop=True),
        name=output.name,
        title=". ".join(titles),
        caption=" ".join(caption),
    )


def _summary(frame: pd.DataFrame, verdicts: Sequence[str]) -> str:
    """Summarize an ablation by the differences of its first model and set, another table by the first verdicts."""
    if "is_ours" not in frame:  # no ablation
        return " ".join(verdicts[:_FEW])
    rows = frame[frame["is_ours"] & frame["delta"].notna()]
    if rows.empty:
        return ""
    rows = rows.assign(verdict=rows["verdict"].replace(MISSING, ""))
    first = rows[rows["on"].eq(rows["on"].iloc[0]) & rows["model"].eq(rows["model"].iloc[0])]
    words = [f"{row.method_title} {difference_text(row)}" for row in first.itertuples()]
    return f"{first['model_title'].iloc[0]}, {first['on'].iloc[0]}: {'; '.join(words)}."


def paper_index(suite: Suite) -> list[dict[str, Any]]:
    """List the paper's items: ``item``, ``title``, ``naacl``, ``command``, ``files`` of the suite, and ``status``."""
    rows: list[dict[str, Any]] = []
    for name, item in load_paper_items().items():
        files = paper_files(suite, name)
        existing = sum(Path(file).exists() for file in files)
        if item.missing:
            status = f"not made: {item.missing}"
        elif not files:
            status = f"not in this suite (benchmark {', '.join(item_benchmarks(item))})"
        else:
            status = "made" if existing == len(files) else f"{existing} of {len(files)} files"
        command = "" if item.missing else f"snakemake --cores all {name} --config suite={suite.name}"
        shown = [file for file in files if file.endswith((".md", ".png"))]
        row = {"item": name, "title": item.title, "naacl": item.naacl, "command": command}
        rows.append({**row, "files": shown, "status": status})
    return rows
