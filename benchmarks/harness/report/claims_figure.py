"""Draw the figures of the claims: our differences and the paper's effects."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd

from benchmarks.harness.config.suite import Suite
from benchmarks.harness.report.artifacts import CLAIMS, NARROW, claimed_in_points
from benchmarks.harness.report.evidence import Verdict
from benchmarks.harness.report.plots import draw_forest, placeholder_figure, wrap_text
from benchmarks.harness.report.style import MethodStyle
from benchmarks.harness.report.table import MISSING

CAPTION = (
    "The claims of the paper and the differences that these runs measured, with 95 % intervals "
    "where n ≥ 3; crosses are the paper's effects. The shaded band is the margin of equivalence. "
    "Verdicts are corrected for the number of tests, but intervals are not. So an undecided "
    "interval may exclude 0. Intervals of the rows at the bottom cover the choice of questions, "
    "not training. Tests in other units than points are in the table."
)
_AXIS_LABEL = "Difference in points, with 95 % interval; shaded: the margin of equivalence"
# added to the label if an undecided interval excludes 0
_CORRECTED = "undecided: not significant after correction for the number of tests"
_TRAININGS = ("seed", "trial")  # pairs that are trainings
_LABEL_WIDTH = 1.4  # inches of a test's title, beside its marks
_MINUS = "\u2212"

# names of series, besides the verdicts
_NO_VERDICT = "random weights"
_PAPER = "the paper"
_STYLES = {
    Verdict.SUPPORTED: MethodStyle("#0072b2", "o"),
    Verdict.CONTRADICTED: MethodStyle("#d55e00", "X"),
    Verdict.EQUIVALENT: MethodStyle("#009e73", "s"),
    Verdict.UNDECIDED: MethodStyle("#777777", "D"),
    Verdict.UNTESTABLE: MethodStyle("#777777", "D", hollow=True),
    _NO_VERDICT: MethodStyle("#777777", "o"),
    _PAPER: MethodStyle("#222222", "x"),
}


def draw_all_claims(suite: Suite, rows: pd.DataFrame, folder: Path) -> None:
    """Draw the headline tests, wide and narrow, and all tests of each benchmark, in a folder.

    ``rows`` are from :func:`.claims_table.judge_claims`.
    """
    headline_rows = rows[rows["headline"]]
    draw_claims(headline_rows, folder / CLAIMS.name)
    draw_claims(headline_rows, folder / CLAIMS.stem(NARROW), narrow=True)
    for name in claimed_in_points(suite):
        rows_of_benchmark = rows[rows["benchmark"] == name]
        draw_claims(rows_of_benchmark, folder / CLAIMS.stem(name))


def draw_claims(rows: pd.DataFrame, path: Path, *, narrow: bool = False) -> None:
    """Draw a forest plot of the tests in points, with one panel per claim.

    Crosses mark the paper's effects. Some tests compare two methods by questions instead of by
    trainings. Their panels are at the bottom, below a heading, because their intervals do not
    cover the noise of training.

    Args:
        rows: Rows of :func:`.claims_table.judge_claims`. Tests in other units, and claims without
            evidence, are left out.
        path: The path without ending.
        narrow: True to draw for a telephone.
    """
    has_number = rows["delta"].notna()
    is_in_points = rows["unit"].eq("points")
    shown = rows[has_number & is_in_points]
    if shown.empty:
        placeholder_figure(path)
        return

    headings = [_heading(pair) for pair in shown["pair"]]
    # panels with the same heading are a group; trainings have an empty one, which is sorted first
    grouped = shown.assign(group=headings).sort_values("group", kind="stable")

    marks = pd.concat([_our_marks(grouped), _paper_marks(grouped)])
    line_titles = list(marks["test"])
    # a wide figure has the titles of lines beside the marks, where there is little room
    if not narrow:
        line_titles = [wrap_text(title, inches=_LABEL_WIDTH, size=7) for title in line_titles]
    placed_marks = marks.assign(
        panel=marks["claim_title"],
        line=line_titles,
        style=marks["series"].map(_STYLES),
    )
    draw_forest(_points_to_shares(placed_marks), path, _axis_label(shown), narrow=narrow)


def _heading(pair: str) -> str:
    """Return the heading of the tests with a kind of pairs, such as ``seed`` or ``question``.

    It is empty for pairs that are trainings.
    """
    if pair in _TRAININGS:
        return ""
    return f"Intervals cover {pair}s, not training"


def _axis_label(rows: pd.DataFrame) -> str:
    """Return the label of the axis. It explains undecided intervals that exclude 0, if any."""
    is_undecided = rows["verdict"].eq(Verdict.UNDECIDED)
    # Only a t-test has a p that is corrected. Other claims, such as that of the same score, are
    # judged by their intervals alone.
    has_p = rows["p"].notna()
    excludes_zero = (rows["low"] > 0) | (rows["high"] < 0)
    if (is_undecided & has_p & excludes_zero).any():
        return f"{_AXIS_LABEL}; {_CORRECTED}"
    return _AXIS_LABEL


def _points_to_shares(marks: pd.DataFrame) -> pd.DataFrame:
    """Convert the numbers of marks from points to shares, as :func:`.draw_forest` takes them."""
    return marks.assign(
        delta=marks["delta"] / 100,
        low=marks["low"] / 100,
        high=marks["high"] / 100,
        margin=marks["margin"] / 100,
    )


def _our_marks(rows: pd.DataFrame) -> pd.DataFrame:
    """Add the columns ``series`` and ``text``, for the marks of our differences.

    ``series`` is the entry of the legend, and ``text`` has the difference and the count of pairs.
    """
    series = rows["verdict"].replace(MISSING, _NO_VERDICT)
    # the axis has the unit
    differences = rows["difference_without_unit"].str.replace("-", _MINUS)
    counts = "n = " + rows["n_shown"]
    return rows.assign(series=series, text=differences + "\n" + counts)


def _paper_marks(rows: pd.DataFrame) -> pd.DataFrame:
    """Make the marks of the paper's effects, one per row with a known effect."""
    with_effect = rows[rows["effect"].notna()]
    # n = 0, so that the mark is drawn without an interval
    return with_effect.assign(
        delta=with_effect["effect"], n=0, margin=math.nan, series=_PAPER, text=""
    )
