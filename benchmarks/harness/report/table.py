"""Render a table as CSV, Markdown, LaTeX and HTML; numbers stay numbers until the last step."""

from __future__ import annotations

import html
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from benchmarks.harness.base import atomic_write, write_text
from benchmarks.harness.config.catalogue import load_metrics

MISSING = "–"
RUNS = "runs"  # column of a frame: the folders of the runs that a row is made of, separated by blanks
_LONG = 28  # a column with longer texts has lines in LaTeX
_LATEX = r"""{comment}
% \usepackage[T1]{{fontenc}}
% \usepackage{{booktabs,longtable}}
% Is it wider than the page? Put it between \begin{{landscape}} and \end{{landscape}} of the package pdflscape.
\begingroup\scriptsize\setlength{{\tabcolsep}}{{2pt}}
{table}\endgroup
"""
_SIGNS = {sign: f"\\{sign}" for sign in "&%$#_{}"}
_SIGNS |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "°": r"\textdegree{}"}
_SIGNS |= {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", "✓": r"\textbullet{}", "−": "$-$"}
_SIGNS |= {"±": r"$\pm$", "÷": r"$\div$", "×": r"$\times$", "·": r"$\cdot$", "²": "$^2$", "Δ": r"$\Delta$"}
_SIGNS |= {"→": r"$\to$", "≤": r"$\le$", "≥": r"$\ge$", "≈": r"$\approx$", "∞": r"$\infty$"}
_T1 = {*map(chr, range(0x20, 0x7F)), *map(chr, range(0xA1, 0x17F)), *"–—‘’“”…†‡•€™"} - {*"\xadĦħĸĿŀŉŦŧ"}


@dataclass(frozen=True)
class Column:
    """Describe one printed column of numbers.

    Attributes:
        metric: The entry of ``metrics.yaml`` with scale, decimals and direction.
        value: The column of the frame.
        label: The heading, by default the metric's label.
        std: The column with the standard deviation, printed as ``mean ± std``.
        interval: The columns with the ends of a confidence interval, printed as ``value [low, high]``.
        signed: True to print a plus sign (differences).
        best: The column by which the best cell of each group is marked; None marks nothing.
        decimals: The number of decimals, by default the metric's.
    """

    metric: str
    value: str
    label: str = ""
    std: str | None = None
    interval: tuple[str, str] | None = None
    signed: bool = False
    best: str | None = None
    decimals: int | None = None

    @property
    def heading(self) -> str:
        """Return label and unit."""
        metric = load_metrics()[self.metric]
        label = self.label or metric.label
        return f"{label} ({metric.unit})" if metric.unit else label

    def text(self, row: pd.Series) -> str:
        """Print the cell of a row."""
        value = self._number(row[self.value], signed=self.signed)
        if self.std and not math.isnan(row[self.std]):
            return f"{value} ± {self._number(row[self.std], signed=False)}"
        if self.interval and not math.isnan(row[self.interval[0]]):
            low, high = (self._number(row[end], signed=self.signed) for end in self.interval)
            return f"{value} [{low}, {high}]"
        return value

    def _number(self, value: float, *, signed: bool) -> str:
        if value is None or math.isnan(value):
            return MISSING
        metric = load_metrics()[self.metric]
        decimals = metric.decimals if self.decimals is None else self.decimals
        return f"{value * metric.scale:{'+' if signed else ''}z.{decimals}f}"


@dataclass(frozen=True)
class Table:
    """Hold a table of names, numbers and notes.

    Attributes:
        title: The heading.
        caption: The explanation: content, origin, and how much the numbers may be trusted.
        keys: The text columns of the frame that name a row, with their headings.
        columns: The columns of numbers.
        frame: The numbers.
        group: The text columns within which ``best`` compares.
        compare: The Boolean column of the rows that are compared; None compares all.
        notes: The text columns after the numbers, with their headings.
        name: The name of its files, without ending.
        wraps: True if cells are sentences, which a page breaks into lines.
    """

    title: str
    caption: str
    keys: dict[str, str]
    columns: Sequence[Column]
    frame: pd.DataFrame
    group: Sequence[str] = field(default_factory=tuple)
    compare: str | None = None
    notes: dict[str, str] = field(default_factory=dict)
    name: str = ""
    wraps: bool = False

    @property
    def printed(self) -> list[Column]:
        """Return the columns with at least one number, or all columns of an empty table."""
        return [column for column in self.columns if self.frame.empty or self.frame[column.value].notna().any()]

    def texts(self) -> pd.DataFrame:
        """Print all cells."""
        cells = {heading: self.frame[key].astype(str) for key, heading in self.keys.items()}
        for column in self.printed:
            cells[column.heading] = self.frame.apply(column.text, axis=1) if len(self.frame) else pd.Series(dtype=str)
        cells |= {heading: self.frame[key].astype(str) for key, heading in self.notes.items()}
        return pd.DataFrame(cells).reset_index(drop=True)

    def best(self) -> pd.DataFrame:
        """Mark the printed cells with the best number of their group, compared as numbers."""
        frame = self.frame.reset_index(drop=True)
        headings = [*self.keys.values(), *(column.heading for column in self.printed), *self.notes.values()]
        mask = pd.DataFrame(False, index=frame.index, columns=headings)
        compared = frame[self.compare] if self.compare else pd.Series(True, index=frame.index)
        for column in self.printed:
            direction = load_metrics()[column.metric].direction
            if column.best is None or direction == "none" or frame.empty:
                continue
            values = frame[column.best].where(compared)
            groups = values.groupby([frame[key] for key in self.group]) if self.group else values.groupby(lambda _: 0)
            extreme = groups.transform("max" if direction == "higher" else "min")
            mask[column.heading] = (values == extreme) & (groups.transform("count") > 1)
        return mask

    def markdown(self) -> str:
        """Render title, table and caption, with the best numbers in bold."""
        cells = self.texts().map(escape_markdown).rename(columns=escape_markdown)
        cells = cells.where(~self.best().to_numpy(), lambda texts: "**" + texts + "**")
        parts = re.split(r"(`[^`]+`)", self.caption)  # every second part is code
        caption = "".join(part if number % 2 else escape_markdown(part) for number, part in enumerate(parts))
        table = cells.to_markdown(index=False, disable_numparse=True)
        return f"### {escape_markdown(self.title)}\n\n{table}\n\n{caption}\n"

    def latex(self) -> str:
        """Render a ``longtable`` with the best numbers in bold; the caption becomes a comment."""
        texts = self.texts()
        shared = self._shared_texts(texts)
        texts = texts.drop(columns=list(shared))
        numbers = {column.heading for column in self.printed}
        long = {heading for heading in texts if len(texts) and texts[heading].map(len).max() > _LONG}
        cells = texts.map(escape_latex)
        cells = cells.where(~self.best()[texts.columns], r"\textbf{" + cells + "}")
        table = cells.rename(columns=_latex_heading).to_latex(
            index=False,
            escape=False,
            longtable=True,
            column_format="".join("r" if name in numbers else "p{3cm}" if name in long else "l" for name in texts),
            caption=" ".join(filter(None, (f"{escape_latex(self.title)}.", escape_latex(_in_all_rows(shared))))),
            label=f"tab:{self.name.replace('_', '-')}",
        )
        comment = textwrap.fill(f"How to read it: {self.caption}", 110, initial_indent="% ", subsequent_indent="% ")
        return _LATEX.format(comment=comment, table=table)

    def html(self) -> str:
        """Render an unstyled ``<figure>``; numbers have their value to sort by, rows the names of their runs."""
        texts, best, sorts = self.texts(), self.best(), self._sort_values()
        shared = self._shared_texts(texts)
        columns = [number for number, heading in enumerate(texts.columns) if heading not in shared]
        headings = [*texts.columns[columns], *(["Runs"] if RUNS in self.frame else [])]
        rows = []
        for row in range(len(texts)):
            cells = [
                _html_cell(texts.iat[row, n], sorts[row][n], is_best=best.iat[row, n], is_head=n == columns[0])
                for n in columns
            ]
            if RUNS in self.frame:
                folders = str(self.frame[RUNS].iloc[row])
                cells.append(f'<td data-runs="{html.escape(folders)}">{len(folders.split()) or MISSING}</td>')
            rows.append(f"<tr>{''.join(cells)}</tr>")
        head = "".join(f'<th scope="col">{html.escape(heading)}</th>' for heading in headings)
        sentence = _in_all_rows(shared)
        body = "\n".join(rows)
        return (
            f'<figure id="{html.escape(self.name)}">\n<figcaption><b>{html.escape(self.title)}.</b> '
            "<details><summary>How to read "
            f"it</summary>{code_as_html(self.caption)}</details>{f'<p>{html.escape(sentence)}</p>' if sentence else ''}</figcaption>\n"
            f'<div class="wide"><table class="{"sentences" if self.wraps else "numbers"}">\n'
            f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>\n</figure>\n"
        )

    def _shared_texts(self, texts: pd.DataFrame) -> dict[str, str]:
        """Return the texts that all rows share, by heading; at least one column of names is left out."""
        names = list(self.keys.values())
        headings = (*names, *self.notes.values())
        shared = [heading for heading in headings if len(texts) > 1 and texts[heading].nunique() == 1]
        if set(names) <= set(shared):
            shared.remove(names[-1])
        return {heading: str(texts[heading].iloc[0]) for heading in shared}

    def _sort_values(self) -> list[list[float | None]]:
        """Return the number of each printed cell, None if it has none."""
        numbers = self.frame[[column.value for column in self.printed]].astype(float).to_numpy().tolist()
        before, after = [None] * len(self.keys), [None] * len(self.notes)
        return [[*before, *(None if math.isnan(value) else value for value in row), *after] for row in numbers]

    def write(self, folder: Path) -> None:
        """Write ``<name>.csv`` (plain numbers), ``.md``, ``.tex`` and ``.html``."""
        with atomic_write(folder / f"{self.name}.csv") as path:
            self.frame.to_csv(path, index=False)
        write_text(folder / f"{self.name}.md", self.markdown())
        write_text(folder / f"{self.name}.tex", self.latex())
        write_text(folder / f"{self.name}.html", self.html())


def code_as_html(text: str) -> str:
    """Escape a text for HTML and mark the words between backticks as code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))


def escape_markdown(text: str) -> str:
    """Escape a text for one line of Markdown: it ends no cell, begins no tag, and is no link."""
    return re.sub(r"\s*\n\s*", " ", re.sub(r"[\\|]|<(?=[A-Za-z/!?])|\](?=[(\[:])", r"\\\g<0>", text))


def escape_latex(text: str) -> str:
    """Escape a text for pdflatex; a character that its T1 fonts lack becomes its code point."""
    characters = " ".join(text.split())
    return "".join(_SIGNS.get(c, c if c in _T1 else rf"\texttt{{U+{ord(c):04X}}}") for c in characters)


def _latex_heading(text: str) -> str:
    lines = textwrap.wrap(text, 12, break_long_words=False, break_on_hyphens=False)
    return r"\shortstack[l]{" + r"\\".join(map(escape_latex, lines)) + "}"


def _in_all_rows(shared: Mapping[str, str]) -> str:
    """Name the texts that all rows of a table share, in a sentence; empty if there are none."""
    parts = "; ".join(f"{heading} {text}" for heading, text in shared.items() if text not in ("", MISSING))
    return f"In all rows: {parts}." if parts else ""


def _html_cell(text: str, number: float | None, *, is_best: bool, is_head: bool) -> str:
    text = f"<strong>{html.escape(text)}</strong>" if is_best else html.escape(text)
    if is_head and text:  # an empty cell heads nothing
        return f'<th scope="row">{text}</th>'
    return f"<td>{text}</td>" if number is None else f'<td data-sort="{number:.9g}">{text}</td>'
