"""Test a table in every format: numbers, the best ones, and characters that have to be escaped."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pandas as pd
import pytest

from benchmarks.harness.base import DefinitionError
from benchmarks.harness.report.table import Column, Table, escape_markdown

TABLE = Table(
    "A & B",
    "50 % of_it",
    {"g": "Group", "name": "Name"},
    [
        Column("accuracy", "a", std="s", marks_best=True),
        Column("loss", "l", marks_best=True),
        Column("accuracy", "d", "Δ", interval=("lo", "hi"), signed=True),
    ],
    pd.DataFrame(
        {
            "g": ["x", "x", "y"],
            "name": ["one", "two_<b>", "three"],
            "a": [0.9999, 0.09999, 0.5],
            "s": [0.01, math.nan, 0.0],
            "l": [2.0, 10.0, math.nan],
            "d": [-0.00001, 0.02, math.nan],
            "lo": [-0.01, math.nan, math.nan],
            "hi": [0.01, math.nan, math.nan],
        }
    ),
    group=("g",),
)


def test_cells_and_the_best_by_number() -> None:
    texts = TABLE.texts()
    assert texts["Accuracy (%)"].tolist() == ["100.0 ± 1.0", "10.0", "50.0 ± 0.0"]
    assert texts["Δ (points)"].tolist() == ["+0.0 [-1.0, +1.0]", "+2.0", "–"]
    best = TABLE.best_cells()
    assert best["Accuracy (%)"].tolist() == [True, False, False]  # a group of one has no best
    assert best["Loss"].tolist() == [
        True,
        False,
        False,
    ]  # 2 is better than 10, though "10" sorts first
    judged = replace(
        TABLE, frame=TABLE.frame.assign(verdict="better"), notes={"verdict": "Verdict"}
    )
    bare = judged.with_random_weights_note()
    assert (bare.best_cells().to_numpy().any(), set(bare.texts()["Verdict"])) == (False, {"–"})


def test_an_end_of_an_interval_that_is_rounded_to_0_keeps_its_sign() -> None:
    ends = TABLE.frame.assign(d=[-0.02, 0.02, -0.0001], lo=-0.0402, hi=[-0.0001, 0.0001, -0.0001])
    texts = replace(TABLE, frame=ends).texts()
    assert texts["Δ (points)"].tolist() == [
        "-2.0 [-4.0, -0.0]",
        "+2.0 [-4.0, +0.0]",
        "+0.0 [-4.0, -0.0]",
    ]


def test_every_format_escapes() -> None:
    assert "**100.0 ± 1.0**" in TABLE.markdown()
    latex = TABLE.latex()
    for text in (
        r"\toprule",
        r"\textbf{100.0 ± 1.0}",
        r"\caption{A \& B.}",
        r"two\_<b>",
        "% How to read",
    ):
        assert text in latex
    assert escape_markdown("[x](javascript:alert(1))") == r"[x\](javascript:alert(1))"
    assert "two_&lt;b&gt;" in TABLE.html()
    assert "<strong>100.0 ± 1.0</strong>" in TABLE.html()


def test_markdown_escapes_what_would_end_a_cell_or_begin_a_tag() -> None:
    frame = pd.DataFrame({"name": ["a | b\n\n# c <script>x</script>"], "a": [0.5]})
    table = Table(
        "T <b>", "p < 0.05 | `ab`<br>", {"name": "N | M"}, [Column("accuracy", "a")], frame
    )
    title, _, heading, _, row, _, caption = table.markdown().splitlines()
    assert title == "### T \\<b>"
    assert "N \\| M" in heading
    assert row.startswith("| a \\| b # c \\<script>x\\</script> |")
    assert caption == "p < 0.05 \\| `ab`\\<br>"


def test_two_columns_with_the_same_heading_are_refused() -> None:
    frame = pd.DataFrame({"name": ["x", "y"], "a": [0.1, 0.2], "b": [0.3, 0.4]})
    columns = [Column("accuracy", "a", "IMDB"), Column("accuracy", "b", "IMDB")]
    table = Table("Scores", "", {"name": "Name"}, columns, frame)
    problem = "two columns of the table 'Scores' have the heading 'IMDB (%)'"
    with pytest.raises(DefinitionError, match=re.escape(problem)):
        table.markdown()
    # a column without numbers is not printed
    without_numbers = replace(table, frame=frame.assign(b=math.nan))
    assert list(without_numbers.texts()) == ["Name", "IMDB (%)"]
