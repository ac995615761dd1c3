"""Test a table in every format: numbers, the best ones, and characters that have to be escaped."""

from __future__ import annotations

import errno
import math
import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pandas as pd
import pytest

from benchmarks.harness.report.plots import placeholder_figure
from benchmarks.harness.report.table import Column, Table, escape_latex, escape_markdown

TABLE = Table(
    "A & B",
    "50 % of_it",
    {"g": "Group", "name": "Name"},
    [
        Column("accuracy", "a", std="s", best=True),
        Column("loss", "l", best=True),
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
ODD = ["a < b > c | d", "α 中 ŧ é ł “x” ✓ ≤", "\\ { } $ # % & _ ^ ~ \" '", "x\n\ny\t \x07", "word " * 40]


def test_cells_and_the_best_by_number() -> None:
    texts = TABLE.texts()
    assert texts["Accuracy (%)"].tolist() == ["100.0 ± 1.0", "10.0", "50.0 ± 0.0"]
    assert texts["Δ (%)"].tolist() == ["+0.0 [-1.0, +1.0]", "+2.0", "–"]
    best = TABLE.best()
    assert best["Accuracy (%)"].tolist() == [True, False, False]  # a group of one has no best
    assert best["Loss"].tolist() == [True, False, False]  # 2 is better than 10, though "10" sorts first
    judged = replace(TABLE, frame=TABLE.frame.assign(verdict="better"), notes={"verdict": "Verdict"})
    bare = judged.without_verdicts("Random weights. ")
    assert (bare.best().to_numpy().any(), set(bare.texts()["Verdict"])) == (False, {"–"})


def test_every_format_escapes() -> None:
    assert "**100.0 ± 1.0**" in TABLE.markdown()
    latex = TABLE.latex()
    for text in (r"\toprule", r"\textbf{100.0 $\pm$ 1.0}", r"\caption{A \& B.}", r"two\_\textless{}b", "% How to read"):
        assert text in latex
    assert "two_&lt;b&gt;" in TABLE.html()
    assert "<strong>100.0 ± 1.0</strong>" in TABLE.html()


def odd_table(rows: int = 60) -> Table:
    frame = pd.DataFrame({"name": (ODD * rows)[:rows], "a": 0.5, "b": [*range(rows)], "note": "é > | " * 9})
    columns = [Column("accuracy", "a", label="Ac|<i>"), Column("loss", "b", best=True)]
    return Table("T < U", "α | β\n\nγ", {"name": "N | M"}, columns, frame, notes={"note": "Note"}, name="odd_table")


def test_pdflatex_compiles_any_text_over_several_pages(tmp_path: Path) -> None:
    if shutil.which("pdflatex") is None:
        pytest.skip("no LaTeX on this machine (Debian: apt-get install texlive-latex-recommended)")
    text = odd_table().latex()
    packages = "".join(re.findall(r"^% (\\usepackage.*)", text, re.MULTILINE))
    document = rf"\documentclass{{article}}{packages}\begin{{document}}{text}\end{{document}}"
    (tmp_path / "odd.tex").write_text(document)
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "odd.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, errors="replace", check=False)
    assert done.returncode == 0, done.stdout
    assert escape_latex("<b> | 中") == r"\textless{}b\textgreater{} \textbar{} \texttt{U+4E2D}"


def test_markdown_escapes_what_would_end_a_cell_or_begin_a_tag() -> None:
    frame = pd.DataFrame({"name": ["a | b\n\n# c <script>x</script>"], "a": [0.5]})
    table = Table("T <b>", "p < 0.05 | `a|b`<br>", {"name": "N | M"}, [Column("accuracy", "a")], frame)
    title, _, heading, _, row, _, caption = table.markdown().splitlines()
    assert title == "### T \\<b>"
    assert "N \\| M" in heading
    assert row.startswith("| a \\| b # c \\<script>x\\</script> |")
    assert caption == "p < 0.05 \\| `a|b`\\<br>"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"a \| b", r"a \\\| b"),  # an escaped backslash before an escaped bar, so that the cell goes on
        ("[x](javascript:alert(1))", r"[x\](javascript:alert(1))"),
        ("<javascript:alert(1)>", r"\<javascript:alert(1)>"),
        ("0.5 [-0.1, +0.1]", "0.5 [-0.1, +0.1]"),
    ],
)
def test_markdown_of_a_cell_stays_in_it_and_links_nowhere(text: str, expected: str) -> None:
    assert escape_markdown(text) == expected


def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    for write, name in ((TABLE.write, ".csv"), (lambda folder: placeholder_figure(folder / "f", "none"), "f.png")):
        with mock.patch.object(os, "fsync", side_effect=full), pytest.raises(OSError, match="No space left") as caught:
            write(tmp_path)
        assert caught.value.filename == str(tmp_path / name)
        full.filename = None
    assert list(tmp_path.iterdir()) == []
