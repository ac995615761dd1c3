"""A table as LaTeX that fits a page; a document that takes it needs the packages booktabs and graphicx."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Iterator

import pandas as pd

_LINES = 42  # that stand on a page; longer tables come in parts
_LETTERS, _HEADING = 28, 14  # after so many a column of texts, or a heading, goes on in another line
_WIDTH = "4.5cm"  # of such a column
_SIGNS = {"\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}"}
_SIGNS |= {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "°": r"\textdegree{}", "✓": r"\textbullet{}"}
_SIGNS |= {"–": "--", "±": r"$\pm$", "÷": r"$\div$", "Δ": r"$\Delta$", "→": r"$\to$", "−": "$-$", "²": "$^2$"}
_SIGNS |= {"≤": r"$\le$", "≥": r"$\ge$", "×": r"$\times$", "·": r"$\cdot$", "≈": r"$\approx$", "∞": r"$\infty$"}


def escape(text: str) -> str:
    """A text as LaTeX prints it."""
    return "".join(_SIGNS.get(character, character) for character in text)


def latex_table(
    name: str,
    title: str,
    caption: str,
    texts: pd.DataFrame,
    best: pd.DataFrame,
    numbers: Collection[str],
    said: str,
) -> str:
    """Lay a table out as one ``table`` environment, or as several where it is longer than a page.

    Args:
        name: of its files; the label is ``tab:<name>``.
        title: the caption that is printed.
        caption: how to read it; a comment, for whoever writes the paper.
        texts: the printed cells, without what is said once.
        best: which of them are bold.
        numbers: headings of the columns of numbers.
        said: what all rows share, a sentence.

    Returns:
        LaTeX; where the table is wider than the text, it is made smaller.
    """
    cells = texts.map(escape).where(~best, lambda found: r"\textbf{" + found + "}")
    parts = [cells.iloc[places] for places in _parts(texts)]
    printed = " ".join(filter(None, (f"{escape(title)}.", escape(said))))
    lines = [f"% {line}" for line in textwrap.wrap(f"How to read it: {caption}", 110)]
    lines += ["% \\usepackage{booktabs,graphicx}"]
    for number, part in enumerate(parts, 1):
        of = f" Part {number} of {len(parts)}." if len(parts) > 1 else ""
        label = f"tab:{name.replace('_', '-')}{f'-{number}' if number > 1 else ''}"
        lines += [r"\begin{table}", r"\centering", r"\small", f"\\caption{{{printed}{of}}}", f"\\label{{{label}}}"]
        lines += [r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%"]
        lines += [*_tabular(part, "".join(_layout(texts, numbers))), "}", r"\end{table}", ""]
    return "\n".join(lines)


def _parts(texts: pd.DataFrame) -> list[list[int]]:
    """Places of the rows of each part, as many as a page has lines for."""
    parts: list[list[int]] = [[]]
    left = _LINES
    for place, row in enumerate(texts.itertuples(index=False)):
        lines = max((-(-len(text) // _LETTERS) for text in row), default=1)
        if lines > left and parts[-1]:
            parts.append([])
            left = _LINES
        parts[-1].append(place)
        left -= lines
    return parts


def _tabular(cells: pd.DataFrame, layout: str) -> Iterator[str]:
    yield f"\\begin{{tabular}}{{{layout}}}"
    yield r"\toprule"
    yield " & ".join(map(_heading, cells.columns)) + r" \\"
    yield r"\midrule"
    for row in cells.itertuples(index=False):
        yield " & ".join(row) + r" \\"
    yield r"\bottomrule"
    yield r"\end{tabular}"


def _layout(texts: pd.DataFrame, numbers: Collection[str]) -> Iterator[str]:
    """A column's letter: numbers stand at the right, long texts in lines."""
    for heading in texts.columns:
        longest = int(texts[heading].map(len).max()) if len(texts) else 0
        yield "r" if heading in numbers else rf"p{{{_WIDTH}}}" if longest > _LETTERS else "l"


def _heading(text: str) -> str:
    lines = textwrap.wrap(text, _HEADING, break_long_words=False, break_on_hyphens=False)
    return escape(text) if len(lines) < 2 else r"\shortstack[l]{" + r"\\".join(map(escape, lines)) + "}"
