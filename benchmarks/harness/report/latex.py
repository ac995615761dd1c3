"""A table as LaTeX that fits a page and can be read there; a document that takes it needs the package booktabs."""

from __future__ import annotations

import itertools
import string
import textwrap
from collections.abc import Collection, Iterator, Sequence

import pandas as pd

_LINES = 40  # that stand on a page; longer tables come in parts
_ACROSS = 106  # letters that stand beside each other in its type, 7 points; wider tables come in parts of their columns
_BETWEEN = 2  # letters between two columns
_LETTERS, _HEADING = 28, 14  # after so many, or less, a column of texts goes on in another line; and a heading
_NAMES = 0.6  # of a line that the names of rows may take
_LETTER = 0.115  # centimetres
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
    keys: Sequence[str],
    numbers: Collection[str],
    said: str,
) -> str:
    """Lay a table out as one ``table`` environment, or as several where it is longer or wider than a page.

    Names that several rows share in turn stand once above these rows. Long notes, such as sources, become letters in the table and stand below it. A table
    that is too wide comes in parts of its columns, each with the names of the rows.

    Args:
        name: of its files; the label is ``tab:<name>``.
        title: the caption that is printed.
        caption: how to read it; a comment, for whoever writes the paper.
        texts: the printed cells, without what is said once.
        best: which of them are bold.
        keys: headings of the columns that name a row, the widest group first.
        numbers: headings of the columns of numbers.
        said: what all rows share, a sentence.
    """
    texts, below = _with_letters(texts, [heading for heading in texts if heading not in (*keys, *numbers)])
    above = _shared_in_turn(texts, keys)
    groups = [", ".join(text for text in row if text.strip("–")) for row in texts[above].to_numpy().tolist()]
    texts = texts.drop(columns=above)
    cells = texts.map(escape).where(~best.drop(columns=above), lambda found: r"\textbf{" + found + "}")
    letters = _letters(texts, keys)
    parts = list(itertools.product(_column_parts(texts, keys, letters), _row_parts(texts, groups, letters)))
    printed = " ".join(filter(None, (f"{escape(title)}.", escape(said))))
    lines = [f"% {line}" for line in textwrap.wrap(f"How to read it: {caption}", 110)]
    lines += ["% \\usepackage{booktabs}"]
    for number, (headings, places) in enumerate(parts, 1):
        of = f" Part {number} of {len(parts)}." if len(parts) > 1 else ""
        label = f"tab:{name.replace('_', '-')}{f'-{number}' if number > 1 else ''}"
        lines += [r"\begin{table}", r"\centering", r"\scriptsize", r"\setlength{\tabcolsep}{3pt}"]
        lines += [f"\\caption{{{printed}{of}}}", f"\\label{{{label}}}"]
        layout, of_rows = "".join(_layout(texts[headings], numbers, letters)), [groups[place] for place in places]
        lines += [*_tabular(cells.iloc[places][headings], of_rows, layout)]
        shown = {mark: text for mark, text in below.items() if texts.iloc[places][headings].eq(mark).any(axis=None)}
        if shown:
            told = "; ".join(f"{mark}: {escape(text)}" for mark, text in shown.items())
            lines += [rf"\par\smallskip\parbox{{\linewidth}}{{\raggedright {told}.}}"]
        lines += [r"\end{table}", ""]
    return "\n".join(lines)


def _with_letters(texts: pd.DataFrame, notes: Sequence[str]) -> tuple[pd.DataFrame, dict[str, str]]:
    """The cells with a letter in the place of every long note, and what the letters stand for."""
    found: dict[str, str] = {}
    marks = ("".join(letters) for size in (1, 2) for letters in itertools.product(string.ascii_lowercase, repeat=size))
    for heading in notes:
        if len(texts) and texts[heading].map(len).max() > _LETTERS:
            for text in texts[heading].unique():
                if len(text) > _HEADING and text not in found:
                    found[text] = next(marks)
            texts = texts.assign(**{heading: texts[heading].replace(found)})
    return texts, {mark: text for text, mark in found.items()}


def _shared_in_turn(texts: pd.DataFrame, keys: Sequence[str]) -> list[str]:
    """The first names of rows that at least two rows after each other share, on average; one name always stays with its row."""
    found: list[str] = []
    for heading in [key for key in keys if key in texts][:-1]:
        names = texts[[*found, heading]].agg("\n".join, axis=1) if len(texts) else pd.Series(dtype=str)
        if 2 * sum(1 for _ in itertools.groupby(names)) > len(texts):
            break
        found.append(heading)
    return found


def _letters(texts: pd.DataFrame, keys: Collection[str]) -> int:
    """After how many letters a column of texts goes on in another line: fewer where there are many names, but no word is longer."""
    named, wanted = [heading for heading in texts if heading in keys], _NAMES * _ACROSS
    words = (len(word) for heading in texts for text in texts[heading] for word in text.split())
    least = min(max(words, default=0) + _BETWEEN, _LETTERS)
    fits = (
        number for number in range(_LETTERS, least, -1) if sum(_width(texts, key, number) for key in named) <= wanted
    )
    return next(fits, least)


def _column_parts(texts: pd.DataFrame, keys: Collection[str], letters: int) -> list[list[str]]:
    """Headings of each part: the names of the rows, and as many other columns as stand beside them."""
    named = [heading for heading in texts if heading in keys]
    room = _ACROSS - sum(_width(texts, heading, letters) for heading in named)
    parts, left = [list(named)], room
    for heading in texts:
        if heading in keys:
            continue
        wide = _width(texts, heading, letters)
        if wide > left and len(parts[-1]) > len(named):
            parts.append(list(named))
            left = room
        parts[-1].append(heading)
        left -= wide
    return parts


def _width(texts: pd.DataFrame, heading: str, letters: int) -> int:
    longest = int(texts[heading].map(len).max()) if len(texts) else 0
    return max(min(longest, letters), *map(len, _broken(heading))) + _BETWEEN


def _row_parts(texts: pd.DataFrame, groups: Sequence[str], letters: int) -> list[list[int]]:
    """Places of the rows of each part, as many as a page has lines for."""
    parts: list[list[int]] = [[]]
    left = _LINES
    for place, row in enumerate(texts.itertuples(index=False)):
        lines = max((-(-len(text) // letters) for text in row), default=1)
        lines += not place or groups[place] != groups[place - 1]
        if lines > left and parts[-1]:
            parts.append([])
            left = _LINES
        parts[-1].append(place)
        left -= lines
    return parts


def _tabular(cells: pd.DataFrame, groups: Sequence[str], layout: str) -> Iterator[str]:
    yield f"\\begin{{tabular}}{{{layout}}}"
    yield r"\toprule"
    yield " & ".join(map(_heading, cells.columns)) + r" \\"
    yield r"\midrule"
    before = ""
    for group, row in zip(groups, cells.itertuples(index=False), strict=True):
        if group != before:
            yield rf"\multicolumn{{{cells.shape[1]}}}{{l}}{{\textit{{{escape(group)}}}}} \\"
        before = group
        yield " & ".join(row) + r" \\"
    yield r"\bottomrule"
    yield r"\end{tabular}"


def _layout(texts: pd.DataFrame, numbers: Collection[str], letters: int) -> Iterator[str]:
    """A column's letter: numbers stand at the right, long texts in lines."""
    for heading in texts.columns:
        longest = int(texts[heading].map(len).max()) if len(texts) else 0
        yield "r" if heading in numbers else rf"p{{{_LETTER * letters:.1f}cm}}" if longest > letters else "l"


def _broken(heading: str) -> list[str]:
    return textwrap.wrap(heading, _HEADING, break_long_words=False, break_on_hyphens=False) or [heading]


def _heading(text: str) -> str:
    lines = _broken(text)
    return escape(text) if len(lines) < 2 else r"\shortstack[l]{" + r"\\".join(map(escape, lines)) + "}"
