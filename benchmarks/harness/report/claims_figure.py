"""Draw the figures of the claims: our differences and the paper's effects."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from benchmarks.harness.report.evidence import Verdict
from benchmarks.harness.report.plots import draw_forest, placeholder_figure
from benchmarks.harness.report.style import MethodStyle
from benchmarks.harness.report.table import MISSING

# names of series, besides the verdicts
_NO_VERDICT = "random weights"
_PAPER = "the paper"
_STYLES = {
    Verdict.SUPPORTED: MethodStyle("#0072b2", "o"),
    Verdict.CONTRADICTED: MethodStyle("#d55e00", "X"),
    Verdict.UNDECIDED: MethodStyle("#777777", "D"),
    Verdict.UNTESTABLE: MethodStyle("#777777", "D", hollow=True),
    _NO_VERDICT: MethodStyle("#777777", "o"),
    _PAPER: MethodStyle("#222222", "x"),
}


def draw_claims(rows: pd.DataFrame, path: Path) -> None:
    """Draw a forest plot of the tests in points, with one panel per claim.

    Crosses mark the paper's effects.

    ``rows`` are from :func:`.claims_table.judge_claims`. Writes ``<path>.pdf`` and ``.png``. Tests
    in other units, and claims without evidence, appear only in the table.
    """
    has_number = rows["delta"].notna()
    is_in_points = rows["unit"].eq("points")
    shown = rows[has_number & is_in_points]
    if shown.empty:
        placeholder_figure(path)
        return

    marks = pd.concat([_our_marks(shown), _paper_marks(shown)])
    numbers = ["delta", "low", "high", "margin"]
    marks[numbers] /= 100  # draw_forest takes shares and prints points
    with_places = marks.assign(
        panel=marks["claim_title"], line=marks["test"], style=marks["series"].map(_STYLES)
    )
    draw_forest(with_places, path, "Points; shaded: no difference that matters")


def _our_marks(rows: pd.DataFrame) -> pd.DataFrame:
    """Add the columns ``series`` and ``text``, for the marks of our differences.

    ``series`` is the entry of the legend, and ``text`` is printed beside the mark.
    """
    series = rows["verdict"].replace(MISSING, _NO_VERDICT)
    intervals = rows["runs_shown"].str.replace(" points", "")
    counts = rows["n"].astype(int).astype(str)
    return rows.assign(series=series, text=intervals + ", n " + counts)


def _paper_marks(rows: pd.DataFrame) -> pd.DataFrame:
    """Make the marks of the paper's effects, one per row with a known effect."""
    with_effect = rows[rows["effect"].notna()]
    # n = 0, so that the mark is drawn without an interval
    return with_effect.assign(delta=with_effect["effect"], n=0, series=_PAPER, text="")
