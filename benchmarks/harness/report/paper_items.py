"""Write tables and figures under the paper's numbers, and say which there are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd

from benchmarks.harness.base import paths
from benchmarks.harness.base.files import atomic_write
from benchmarks.harness.config.artifacts import FIGURE_FORMATS, Artifacts
from benchmarks.harness.config.paper_items import (
    PaperOutput,
    load_paper_items,
    outputs_of,
    paper_files,
    shown_benchmarks,
)
from benchmarks.harness.config.suite import Suite
from benchmarks.harness.report.common_tables import difference_text
from benchmarks.harness.report.outcomes import SETTING
from benchmarks.harness.report.presentation import Presentation
from benchmarks.harness.report.rendering import MISSING, RUNS, Table

_PROTOCOLS = ("published", "clean")  # the paper's own first
_FEW = 3  # verdicts in a caption
_COST = "cost"  # of which no verdict says anything


def write_paper_items(suite: Suite, shown: Artifacts, presented: Presentation) -> None:
    """Write those tables and figures that are the paper's once more, under its numbers and with its rows, into ``results/<suite>/paper/``.

    Args:
        suite: whose runs.
        shown: the benchmark, or one of its sets.
        presented: what is shown of it; its figures are drawn already.
    """
    folder = paths.RESULTS / suite.name / "paper"
    tables = {table.name: table for table in presented.tables}
    for output in outputs_of(shown):
        name = shown.stem(output.part.shown)
        if output.part.figure:
            for end in FIGURE_FORMATS:
                with atomic_write(folder / f"{output.name}.{end}") as temporary:
                    temporary.write_bytes((folder.parent / "figures" / f"{name}.{end}").read_bytes())
        else:
            _as_in_the_paper(tables[name], output, suite, presented.verdicts).write(folder)


def _as_in_the_paper(table: Table, output: PaperOutput, suite: Suite, verdicts: Sequence[str]) -> Table:
    """A table with the paper's rows, by one selection: the authors' where the suite has runs of it, else the clean one."""
    frame, said = table.frame, [table.caption]
    if output.part.rows and "method" in frame:
        frame = frame[frame["method"].str.split(SETTING, regex=False).str[0].isin(output.part.rows)]
    if "protocol" in frame:
        ran = {run.spec.get("protocol") for run in suite.runs_of(output.part.benchmark)}
        wanted = next((name for name in _PROTOCOLS if name in ran), None)
        alone = frame["is_ours"].eq(False) if "is_ours" in frame else pd.Series(False, index=frame.index)  # the paper's
        frame = frame[frame["protocol"].eq(wanted) | alone]
    if "p_holm" in frame and len(frame) < len(table.frame):
        said.append(f"p is corrected over all rows of `{table.name}`, of which some stand here.")
    alone = RUNS in frame and len(frame) > 0 and frame[RUNS].eq("").all()
    if alone:
        said.append("All numbers are published ones: this suite runs none of these rows.")
    if not alone and output.part.shown != _COST and (seen := _seen(frame, verdicts)):
        said.append(f"What these runs see: {seen}")
    said.append(f"Made by `snakemake --cores all {output.item} --config suite={suite.name}`.")
    own = [] if table.title == load_paper_items()[output.item].title else [table.title]
    return replace(
        table,
        frame=frame.reset_index(drop=True),
        name=output.name,
        title=". ".join([output.title, *own]),
        caption=" ".join(said),
    )


def _seen(frame: pd.DataFrame, verdicts: Sequence[str]) -> str:
    """What came out: of an ablation the differences of its rows where it was first looked, else the first verdicts on the benchmark; nothing where nothing of it ran."""
    if "is_ours" not in frame:  # no ablation
        return " ".join(verdicts[:_FEW])
    rows = frame[frame["is_ours"] & frame["delta"].notna()]
    if rows.empty:
        return ""
    rows = rows.assign(verdict=rows["verdict"].replace(MISSING, ""))
    first = rows[rows["on"].eq(rows["on"].iloc[0]) & rows["model"].eq(rows["model"].iloc[0])]
    words = [f"{row.method_title} {difference_text(row)}" for row in first.itertuples()]
    return f"{first['model_title'].iloc[0]}, {first['on'].iloc[0]}: {'; '.join(words)}."


def paper_index(suite: Suite) -> pd.DataFrame:
    """A row a table or figure of the paper: ``item``, ``title``, ``naacl``, ``command``, ``files`` of the suite, and ``status``."""
    found = []
    for name, item in load_paper_items().items():
        files = paper_files(suite, name)
        if item.missing:
            status = f"not made: {item.missing}"
        elif not files:
            status = f"not in this suite (benchmark {', '.join(shown_benchmarks(item))})"
        else:
            there = sum(Path(file).exists() for file in files)
            status = "made" if there == len(files) else f"{there} of {len(files)} files"
        found.append(
            {
                "item": name,
                "title": item.title,
                "naacl": item.naacl,
                "command": "" if item.missing else f"snakemake --cores all {name} --config suite={suite.name}",
                "files": [file for file in files if file.endswith((".md", ".png"))],
                "status": status,
            }
        )
    return pd.DataFrame(found)
