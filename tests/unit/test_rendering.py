"""A table in every format: numbers, the best, and what has to be escaped."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pandas as pd

from benchmarks.harness.report.rendering import Column, Table

TABLE = Table(
    "A & B",
    "50 % of_it",
    {"g": "Group", "name": "Name"},
    [
        Column("accuracy", "a", std="s", best="a"),
        Column("loss", "l", best="l"),
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
    assert texts["Δ (%)"].tolist() == ["+0.0 [-1.0, +1.0]", "+2.0", "–"]
    best = TABLE.best()
    assert best["Accuracy (%)"].tolist() == [True, False, False]  # a group of one has no best
    assert best["Loss"].tolist() == [True, False, False]  # 2 is better than 10, though "10" sorts first


def test_every_format_escapes() -> None:
    assert "**100.0 ± 1.0**" in TABLE.markdown()
    latex = TABLE.latex()
    for text in (
        r"\toprule",
        r"\textbf{100.0 $\pm$ 1.0}",
        r"\caption{A \& B.}",
        "% How to read it: 50 % of_it",
        r"two\_",
    ):
        assert text in latex
    assert "two_&lt;b&gt;" in TABLE.html()
    assert "<strong>100.0 ± 1.0</strong>" in TABLE.html()


def test_latex_names_groups_once_breaks_wide_tables_and_sets_long_notes_below() -> None:
    sources = ["the first of the two places that a number is from", "another place that a number is from, just as long"]
    rows = [
        {
            "model": model,
            "name": f"row {number}",
            **{f"c{column}": number + column for column in range(12)},
            "source": sources[number % 2],
        }
        for model in ("one", "two")
        for number in range(4)
    ]
    columns = [Column("loss", f"c{column}", label=f"Number {column}") for column in range(12)]
    table = Table(
        "T", "", {"model": "Model", "name": "Name"}, columns, pd.DataFrame(rows), notes={"source": "Source"}, name="t"
    )
    parts = table.latex().split(r"\end{table}")[:-1]
    assert len(parts) > 1
    for part in parts:
        assert part.count(r"\textit{one}") == part.count(r"\textit{two}") == 1
        assert all(f"row {number} &" in part for number in range(4))
    assert [f"Number {column}" in "".join(parts) for column in range(12)] == [True] * 12
    assert all("".join(parts).count(source) == 1 for source in sources)
    assert f"a: {sources[0]}; b: {sources[1]}." in parts[-1]


def test_markdown_escapes_what_would_end_a_cell_or_begin_a_tag() -> None:
    frame = pd.DataFrame({"name": ["a | b\n\n# c <script>x</script>"], "a": [0.5]})
    said = "p < 0.05 | `a|b`<br>"
    table = Table("T <b>", said, {"name": "N | M"}, [Column("accuracy", "a", label="L|<i>")], frame)
    title, _, heading, _, row, _, caption = table.markdown().splitlines()
    assert title == "### T \\<b>"
    for line in (heading, row):
        assert len(re.findall(r"(?<!\\)\|", line)) == 3
    assert "N \\| M" in heading
    assert "a \\| b # c \\<script>x\\</script>" in row
    assert caption == "p < 0.05 \\| `a|b`\\<br>"


def test_an_empty_table_is_still_a_table(tmp_path: Path) -> None:
    empty = Table(
        "E", "", {"name": "Name"}, [Column("accuracy", "a", best="a")], pd.DataFrame({"name": [], "a": []}), name="e"
    )
    empty.write(tmp_path)
    assert "Accuracy" in (tmp_path / "e.md").read_text()
