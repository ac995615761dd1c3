"""Render a table as CSV, Markdown, LaTeX and HTML; numbers stay numbers until the last step."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import jinja2
import pandas as pd
from markupsafe import Markup, escape

from benchmarks.harness.base import DefinitionError, atomic_write, write_text
from benchmarks.harness.config.catalogue import load_metrics
from emoe.errors import did_you_mean

MISSING = "–"
RUNS = "runs"  # column with the folders of a row's runs, separated by blanks
_RANDOM_WEIGHTS = (
    "The models of this suite have random weights: it shows that everything works, and neither its scores nor its "
    "verdicts mean anything. "
)
_LONG = 28  # letters; LaTeX wraps a column with longer texts
_LATEX = r"""{comment}
% \usepackage[T1]{{fontenc}}
% \usepackage{{booktabs,longtable}}
% If it is wider than the page, put it between \begin{{landscape}} and \end{{landscape}} (package pdflscape).
\begingroup\scriptsize\setlength{{\tabcolsep}}{{2pt}}
{table}\endgroup
"""
_SIGNS = str.maketrans(
    {sign: f"\\{sign}" for sign in "&%$#_{}"}
    | {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "✓": r"\textbullet{}",
    }
    | {
        "−": "$-$",
        "Δ": r"$\Delta$",
        "→": r"$\to$",
        "≤": r"$\le$",
        "≥": r"$\ge$",
        "≈": r"$\approx$",
        "∞": r"$\infty$",
    }
)


@dataclass(frozen=True)
class Column:
    """Describe one printed column of numbers."""

    metric: str  # entry of metrics.yaml with scale, decimals and direction
    value: str  # column of the frame
    label: str = ""  # heading, by default the metric's label
    std: str | None = None  # column with the standard deviation, printed as "mean ± std"
    interval: tuple[str, str] | None = None  # columns with its ends, printed as "value [low, high]"
    signed: bool = False  # True to print a plus sign (differences)
    best: bool = False  # True to mark the best cell of each group
    decimals: int | None = None  # by default the metric's

    def __post_init__(self) -> None:
        if self.metric not in load_metrics():
            near = did_you_mean(self.metric, load_metrics())
            raise DefinitionError(
                f"a table has the metric '{self.metric}', which is not in metrics.yaml{near}"
            )

    @property
    def heading(self) -> str:
        """Return the label with its unit."""
        metric = load_metrics()[self.metric]
        label = self.label or metric.label
        return f"{label} ({metric.unit})" if metric.unit else label

    def text(self, row: pd.Series) -> str:
        """Format the cell of a row."""
        value = self._number(row[self.value], signed=self.signed)
        if self.std and not math.isnan(row[self.std]):
            return f"{value} ± {self._number(row[self.std], signed=False)}"
        if self.interval and not math.isnan(row[self.interval[0]]):
            low, high = (self._number(row[end], signed=self.signed) for end in self.interval)
            return f"{value} [{low}, {high}]"
        return value

    def _number(self, value: float, *, signed: bool) -> str:
        if pd.isna(value):
            return MISSING
        metric = load_metrics()[self.metric]
        decimals = metric.decimals if self.decimals is None else self.decimals
        return f"{value * metric.scale:{'+' if signed else ''}z.{decimals}f}"


@dataclass(frozen=True)
class Table:
    """Hold a table of names, numbers and notes."""

    title: str
    caption: str  # content, origin and limits of the numbers
    keys: dict[str, str]  # text columns that identify a row, with their headings
    columns: Sequence[Column]
    frame: pd.DataFrame
    group: Sequence[
        str
    ] = ()  # columns of the groups whose best number is marked, among rows with ``is_method``
    notes: dict[str, str] = field(
        default_factory=dict
    )  # text columns after the numbers, with their headings
    name: str = ""  # file name without ending
    wraps: bool = False  # True if cells hold sentences that a page must wrap
    origins: pd.DataFrame | None = None  # the runs behind the rows; None for all finished runs

    @property
    def printed(self) -> list[Column]:
        """Return the columns with at least one number."""
        return [
            column
            for column in self.columns
            if len(self.frame) and self.frame[column.value].notna().any()
        ]

    def texts(self) -> pd.DataFrame:
        """Format all cells."""
        cells = {heading: self.frame[key].astype(str) for key, heading in self.keys.items()}
        for column in self.printed:
            cells[column.heading] = self.frame.apply(column.text, axis=1)
        cells |= {heading: self.frame[key].astype(str) for key, heading in self.notes.items()}
        return pd.DataFrame(cells).reset_index(drop=True)

    def best(self) -> pd.DataFrame:
        """Return a boolean mask of the printed cells that hold the best number of their group."""
        frame, texts = self.frame.reset_index(drop=True), self.texts()
        mask = pd.DataFrame(False, index=texts.index, columns=texts.columns)
        keys = [frame[key] for key in self.group] or [pd.Series(0, frame.index)]
        for column in self.printed:
            direction = load_metrics()[column.metric].direction
            if column.best and direction != "none":
                values = frame[column.value]
                values = values.where(frame["is_method"]) if "is_method" in frame else values
                groups = values.groupby(keys)
                extreme = groups.transform("max" if direction == "higher" else "min")
                mask[column.heading] = (values == extreme) & (groups.transform("count") > 1)
        return mask

    def markdown(self) -> str:
        """Render title, table and caption, with the best numbers in bold."""
        cells = self.texts().map(escape_markdown).rename(columns=escape_markdown)
        cells = cells.where(~self.best().to_numpy(), lambda texts: "**" + texts + "**")
        table = cells.to_markdown(index=False, disable_numparse=True)
        return f"### {escape_markdown(self.title)}\n\n{table}\n\n{escape_markdown(self.caption)}\n"

    def latex(self) -> str:
        """Render a ``longtable`` with the best numbers in bold; the caption becomes a comment."""
        texts, sentence = self._drop_constant_columns()
        numbers = {column.heading for column in self.printed}
        long = {
            heading for heading in texts if len(texts) and texts[heading].map(len).max() > _LONG
        }
        cells = texts.map(escape_latex)
        cells = cells.where(~self.best()[texts.columns], r"\textbf{" + cells + "}")
        table = cells.rename(columns=_latex_heading).to_latex(
            index=False,
            escape=False,
            longtable=True,
            column_format="".join(
                "r" if name in numbers else "p{3cm}" if name in long else "l" for name in texts
            ),
            caption=escape_latex(f"{self.title}. {sentence}"),
            label=f"tab:{self.name.replace('_', '-')}",
        )
        comment = textwrap.fill(
            f"How to read it: {self.caption}", 110, initial_indent="% ", subsequent_indent="% "
        )
        return _LATEX.format(comment=comment, table=table)

    def html(self) -> str:
        """Render an unstyled ``<figure>`` with a sort value for each number and the folders of each row's runs."""
        texts, sentence = self._drop_constant_columns()
        sort_values = {
            column.heading: [
                "" if pd.isna(value) else f"{value:.9g}" for value in self.frame[column.value]
            ]
            for column in self.printed
        }
        text = TEMPLATES.get_template("table.html.j2").render(
            table=self,
            headings=list(texts),
            rows=texts.to_dict("records"),
            best=self.best().to_dict("records"),
            sort_values=sort_values,
            runs=list(self.frame[RUNS]) if RUNS in self.frame else [],
            sentence=sentence,
        )
        return text + "\n"

    def _drop_constant_columns(self) -> tuple[pd.DataFrame, str]:
        """Drop columns with equal texts in all rows, except the last key; list their texts in a sentence."""
        texts, names = self.texts(), list(self.keys.values())
        headings = (*names, *self.notes.values())
        shared = [
            heading for heading in headings if len(texts) > 1 and texts[heading].nunique() == 1
        ]
        if set(names) <= set(shared):
            shared.remove(names[-1])
        values = {heading: texts[heading].iloc[0] for heading in shared}
        listed = "; ".join(
            f"{heading} {text}" for heading, text in values.items() if text not in ("", MISSING)
        )
        return texts.drop(columns=shared), f"In all rows: {listed}." if listed else ""

    def with_random_weights_note(self) -> Table:
        """Remove verdicts and marks, if any, and state in the caption that weights are random."""
        if "verdict" not in self.notes and not any(column.best for column in self.columns):
            return self
        columns = [replace(column, best=False) for column in self.columns]
        frame = self.frame.assign(verdict=MISSING) if "verdict" in self.frame else self.frame
        return replace(self, caption=_RANDOM_WEIGHTS + self.caption, columns=columns, frame=frame)

    def write(self, folder: Path) -> None:
        """Write ``<name>.csv`` (unformatted numbers), ``.md``, ``.tex`` and ``.html``."""
        with atomic_write(folder / f"{self.name}.csv") as path:
            self.frame.to_csv(path, index=False)
        write_text(folder / f"{self.name}.md", self.markdown())
        write_text(folder / f"{self.name}.tex", self.latex())
        write_text(folder / f"{self.name}.html", self.html())


def code_as_html(text: str) -> Markup:
    """Escape a text for HTML, and turn backticks into ``<code>``."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))  # noqa: S704 -- it is escaped


TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
)
TEMPLATES.filters["code"] = code_as_html


def escape_markdown(text: str) -> str:
    """Escape cell borders, tags and links in a text, and join its lines, for Markdown."""
    return re.sub(
        r"\s*\n\s*", " ", re.sub(r"[\\|]|<(?=[A-Za-z/!?])|\](?=[(\[:])", r"\\\g<0>", text)
    )


def escape_latex(text: str) -> str:
    """Escape a text for pdflatex, and replace the signs that it lacks."""
    return " ".join(text.split()).translate(_SIGNS)


def _latex_heading(text: str) -> str:
    lines = textwrap.wrap(text, 12, break_long_words=False, break_on_hyphens=False)
    return r"\shortstack[l]{" + r"\\".join(map(escape_latex, lines)) + "}"
