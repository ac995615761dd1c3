"""Draw models that learn several tasks at once: the difference of each method, set by set."""

from __future__ import annotations

from pathlib import Path

from benchmarks.harness.config.benchmark import OOD_MEAN
from benchmarks.harness.report import plots
from benchmarks.multitask.definition import ID_MEAN
from benchmarks.multitask.outcomes import MultitaskOutcomes
from benchmarks.text.definition import ID, OOD

_DOMAINS = {ID: "", ID_MEAN: "mean of the tasks", OOD: " (OOD)", OOD_MEAN: "mean out of domain"}


def draw_differences(outcomes: MultitaskOutcomes, path: Path) -> None:
    """Draw differences to the baseline with 95 % intervals: a panel per model and mixture, a line per set."""
    rows = outcomes.select_mixtures(outcomes.rows)
    rows = rows[rows["delta"].notna()].sort_values(
        "domain", key=lambda names: names.map(list(_DOMAINS).index), kind="stable"
    )
    if rows.empty:
        plots.placeholder_figure(path, "this suite has no comparison on several tasks")
        return
    panels = [f"{outcomes.title('model', row.model)}, {outcomes.title('task', row.task)}" for row in rows.itertuples()]
    lines = [outcomes.title("task", row.eval_task) + _DOMAINS[row.domain] for row in rows.itertuples()]
    series = [outcomes.title("method", name) for name in rows["method"]]
    rows = rows.assign(
        n=rows["pairs"], panel=panels, line=lines, series=series, style=rows["method"].map(outcomes.style)
    )
    sets = rows[rows["domain"] == OOD].groupby("panel")["eval_task"].nunique()
    rows = rows[(rows["domain"] != OOD_MEAN) | rows["panel"].map(sets).gt(1)]  # no mean over one set
    plots.draw_forest(rows, path, plots.difference_label(outcomes.baseline_title, rows["n"]))
