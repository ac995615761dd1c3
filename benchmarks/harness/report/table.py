"""Render a table as CSV, Markdown, LaTeX and HTML; numbers stay numbers until the last step."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import jinja2
import pandas as pd
from markupsafe import Markup, escape

from benchmarks.harness.base import DefinitionError, atomic_write, write_text
from benchmarks.harness.config.catalogue import load_metrics
from emoe.errors import did_you_mean

MISSING = "–"
RUNS_COLUMN = "runs"  # column with the folders of a row's runs, separated by blanks
_RANDOM_WEIGHTS = (
    "The models of this suite have random weights. It only tests that everything works: its scores "
    "and verdicts mean nothing. "
)
_LONG_TEXT = 28  # letters; LaTeX wraps a column with longer texts
_LATEX_PREAMBLE = (
    "% \\usepackage[T1]{fontenc}\n"
    "% \\usepackage{booktabs,longtable}\n"
    "% If it is wider than the page, put it between \\begin{landscape} and \\end{landscape} "
    "(package pdflscape).\n"
    "\\begingroup\\scriptsize\\setlength{\\tabcolsep}{2pt}\n"
)
# replaces signs that LaTeX reads as commands, and signs that pdflatex lacks
_LATEX_SIGNS = str.maketrans(
    {
        "&": r"\&",
        "%": r"\%",
        "$": r"\$",
        "#": r"\#",
        "_": r"\_",
        "{": r"\{",
        "}": r"\}",
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "✓": r"\textbullet{}",
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
    """One printed column of numbers.

    Attributes:
        metric: The entry of metrics.yaml with scale, decimals and direction.
        value: The column of the frame with the numbers.
        label: The heading, by default the metric's label.
        std: The column with the standard deviation, printed as "mean ± std".
        interval: The columns with the ends of the interval, printed as "value [low, high]".
        signed: True to print a plus sign, for differences.
        marks_best: True to mark the best cell of each group of rows.
        decimals: The number of decimals, by default the metric's.

    Raises:
        DefinitionError: metrics.yaml lacks the metric.
    """

    metric: str
    value: str
    label: str = ""
    std: str | None = None
    interval: tuple[str, str] | None = None
    signed: bool = False
    marks_best: bool = False
    decimals: int | None = None

    def __post_init__(self) -> None:
        if self.metric not in load_metrics():
            near = did_you_mean(self.metric, load_metrics())
            raise DefinitionError(
                f"a table has the metric '{self.metric}', which is not in metrics.yaml{near}"
            )

    @property
    def heading(self) -> str:
        """Return the label with its unit. The unit of a difference of percentages is points."""
        metric = load_metrics()[self.metric]
        label = self.label or metric.label
        if not metric.unit:
            return label
        unit = metric.unit
        if self.signed and unit == "%":
            unit = "points"
        return f"{label} ({unit})"

    def text(self, row: pd.Series) -> str:
        """Format the cell of a row: the number, with the deviation or the interval if known."""
        number = self._number_text(row[self.value], signed=self.signed)
        if self.std and not math.isnan(row[self.std]):
            deviation = self._number_text(row[self.std], signed=False)
            return f"{number} ± {deviation}"
        if self.interval is None:
            return number
        low_column, high_column = self.interval
        if math.isnan(row[low_column]):
            return number
        # an end of a difference that is rounded to 0 keeps its sign, which says if 0 lies inside
        low = self._number_text(row[low_column], signed=self.signed, keeps_sign=self.signed)
        high = self._number_text(row[high_column], signed=self.signed, keeps_sign=self.signed)
        return f"{number} [{low}, {high}]"

    def _number_text(self, value: float, *, signed: bool, keeps_sign: bool = False) -> str:
        """Format a number with the scale of the metric and the decimals; a dash for nan.

        With ``keeps_sign``, a negative number that is rounded to 0 has a minus sign.
        """
        if pd.isna(value):
            return MISSING
        metric = load_metrics()[self.metric]
        decimals = metric.decimals if self.decimals is None else self.decimals
        sign = "+" if signed else ""
        # z: no minus sign for a number that is rounded to 0
        zero = "" if keeps_sign else "z"
        return f"{value * metric.scale:{sign}{zero}.{decimals}f}"


@dataclass(frozen=True)
class Table:
    """A table of names, numbers and notes.

    Attributes:
        title: The title.
        caption: The content, origin and limits of the numbers.
        keys: The headings of the text columns that identify a row, by column of the frame.
        columns: The columns of numbers.
        frame: The rows with unformatted numbers. It may have columns that are not printed.
        group: The columns that define groups of rows. In each group the best number is marked.
            Controls (``is_method`` is False) are never marked. Without columns, all rows are one
            group.
        notes: The headings of the text columns after the numbers, by column of the frame.
        name: The file name without ending.
        wraps: True if cells have long texts that a page must wrap.
        origins: The ``run_id`` and names of the runs behind the rows, for
            :func:`.presentation.with_runs`. None stands for all finished runs.
    """

    title: str
    caption: str
    keys: dict[str, str]
    columns: Sequence[Column]
    frame: pd.DataFrame
    group: Sequence[str] = ()
    notes: dict[str, str] = field(default_factory=dict)
    name: str = ""
    wraps: bool = False
    origins: pd.DataFrame | None = None

    @property
    def printed(self) -> list[Column]:
        """Return the columns with at least one number."""
        if self.frame.empty:
            return []
        return [column for column in self.columns if self.frame[column.value].notna().any()]

    def texts(self) -> pd.DataFrame:
        """Format all cells as text. The columns of the result are the printed headings.

        Raises:
            DefinitionError: Two printed columns have the same heading, such as the title of a task.
        """
        columns: dict[str, pd.Series] = {}
        for heading, cells in self._printed_cells():
            if heading in columns:
                raise DefinitionError(
                    f"two columns of the table '{self.title}' have the heading '{heading}'; the "
                    "titles of tasks and the labels of metrics must differ"
                )
            columns[heading] = cells
        return pd.DataFrame(columns).reset_index(drop=True)

    def _printed_cells(self) -> Iterator[tuple[str, pd.Series]]:
        """Yield the heading and the texts of each printed column, from left to right."""
        for key, heading in self.keys.items():
            yield heading, self.frame[key].astype(str)
        for column in self.printed:
            yield column.heading, self.frame.apply(column.text, axis=1)
        for key, heading in self.notes.items():
            yield heading, self.frame[key].astype(str)

    def best_cells(self) -> pd.DataFrame:
        """Return a boolean mask of the printed cells that have the best number of their group."""
        texts = self.texts()
        mask = pd.DataFrame(False, index=texts.index, columns=texts.columns)
        for column in self.printed:
            direction = load_metrics()[column.metric].direction
            if column.marks_best and direction != "none":
                mask[column.heading] = self._has_best_number(column.value, direction)
        return mask

    def _has_best_number(self, name: str, direction: str) -> pd.Series[bool]:
        """Return True for the rows that have the best number of their group in a column."""
        frame = self.frame.reset_index(drop=True)
        candidates = frame[name]
        if "is_method" in frame:
            candidates = candidates.where(frame["is_method"])  # controls become nan

        groups = [frame[key] for key in self.group]
        if not groups:
            groups = [pd.Series(0, frame.index)]  # all rows are one group
        by_group = candidates.groupby(groups)
        # beside each row, the best number of its group, and the count of numbers
        best_function = "max" if direction == "higher" else "min"
        best_of_group = by_group.transform(best_function)
        count_of_group = by_group.transform("count")
        # a group with a single number has no best one
        return (candidates == best_of_group) & (count_of_group > 1)

    def markdown(self) -> str:
        """Render title, table and caption, with the best numbers in bold."""
        escaped = self.texts().map(escape_markdown).rename(columns=escape_markdown)
        in_bold = "**" + escaped + "**"
        is_best = self.best_cells().to_numpy()  # without headings, which differ after escaping
        cells = escaped.mask(is_best, in_bold)
        table = cells.to_markdown(index=False, disable_numparse=True)
        title = escape_markdown(self.title)
        caption = escape_markdown(self.caption)
        return f"### {title}\n\n{table}\n\n{caption}\n"

    def latex(self) -> str:
        """Render a ``longtable`` with the best numbers in bold; the caption becomes a comment."""
        texts = self.texts()
        constants = self._constant_texts(texts)
        varying = texts.drop(columns=list(constants))

        escaped = varying.map(escape_latex)
        in_bold = r"\textbf{" + escaped + "}"
        is_best = self.best_cells()[varying.columns]
        cells = escaped.mask(is_best, in_bold)
        table = cells.rename(columns=_latex_heading).to_latex(
            index=False,
            escape=False,
            longtable=True,
            column_format=self._latex_column_format(varying),
            caption=escape_latex(f"{self.title}. {_sentence_on(constants)}"),
            label=f"tab:{self.name.replace('_', '-')}",
        )
        comment = textwrap.fill(
            f"How to read it: {self.caption}", 110, initial_indent="% ", subsequent_indent="% "
        )
        return f"{comment}\n{_LATEX_PREAMBLE}{table}\\endgroup\n"

    def _latex_column_format(self, texts: pd.DataFrame) -> str:
        """Return LaTeX's column format: numbers to the right, long texts 3 cm wide."""
        numbers = {column.heading for column in self.printed}
        formats = []
        for heading in texts:
            if heading in numbers:
                formats.append("r")
            elif len(texts) and texts[heading].map(len).max() > _LONG_TEXT:
                formats.append("p{3cm}")
            else:
                formats.append("l")
        return "".join(formats)

    def html(self) -> str:
        """Render an unstyled HTML ``<figure>``.

        It also has data for the script of the page: the values that sort each column of numbers,
        and the folders of the runs behind each row.
        """
        texts = self.texts()
        constants = self._constant_texts(texts)
        varying = texts.drop(columns=list(constants))

        runs = []
        if RUNS_COLUMN in self.frame:
            runs = list(self.frame[RUNS_COLUMN])

        figure = TEMPLATES.get_template("table.html.j2").render(
            table=self,
            headings=list(varying),
            rows=self._html_rows(varying),
            runs=runs,
            sentence=_sentence_on(constants),
        )
        return figure + "\n"

    def _html_rows(self, texts: pd.DataFrame) -> list[list[_HtmlCell]]:
        """Return the cells of each row. ``texts`` has the printed texts by heading."""
        best_rows = self.best_cells().to_dict("records")
        sort_values_by_heading = self._sort_values()
        rows = []
        for number, texts_of_row in enumerate(texts.to_dict("records")):
            cells = []
            for heading, text in texts_of_row.items():
                sort_value = ""
                # columns of text have no values that sort them
                if heading in sort_values_by_heading:
                    sort_value = sort_values_by_heading[heading][number]
                is_best = best_rows[number][heading]
                cells.append(_HtmlCell(text=text, is_best=is_best, sort_value=sort_value))
            rows.append(cells)
        return rows

    def _sort_values(self) -> dict[str, list[str]]:
        """Map the heading of each column of numbers to the values that sort it, one per row."""
        values = {}
        for column in self.printed:
            values[column.heading] = [_sort_value(number) for number in self.frame[column.value]]
        return values

    def _constant_texts(self, texts: pd.DataFrame) -> dict[str, str]:
        """Return the texts that are the same in all rows, by heading, to print them only once.

        ``texts`` is the result of :meth:`texts`. Only the text columns ``keys`` and ``notes`` are
        compared. If all ``keys`` are constant, the last one is not returned.
        """
        if len(texts) < 2:
            return {}
        key_headings = list(self.keys.values())
        constants = {}
        for heading in (*key_headings, *self.notes.values()):
            if texts[heading].nunique() == 1:
                constants[heading] = texts[heading].iloc[0]
        # the table must keep a column that names its rows
        if all(heading in constants for heading in key_headings):
            del constants[key_headings[-1]]
        return constants

    def with_random_weights_note(self) -> Table:
        """Remove verdicts and bold numbers, and say in the caption that they would mean nothing.

        A table that has neither is returned as it is.
        """
        has_marks = any(column.marks_best for column in self.columns)
        if "verdict" not in self.notes and not has_marks:
            return self
        columns = [replace(column, marks_best=False) for column in self.columns]
        frame = self.frame
        if "verdict" in frame:
            frame = frame.assign(verdict=MISSING)
        return replace(self, caption=_RANDOM_WEIGHTS + self.caption, columns=columns, frame=frame)

    def write(self, folder: Path) -> None:
        """Write ``<name>.csv`` (unformatted numbers), ``.md``, ``.tex`` and ``.html``."""
        with atomic_write(folder / f"{self.name}.csv") as path:
            self.frame.to_csv(path, index=False)
        write_text(folder / f"{self.name}.md", self.markdown())
        write_text(folder / f"{self.name}.tex", self.latex())
        write_text(folder / f"{self.name}.html", self.html())


@dataclass(frozen=True)
class _HtmlCell:
    """A cell of a table in HTML.

    Attributes:
        text: The printed text.
        is_best: True if its number is the best of its group.
        sort_value: The number with all its digits, by which the page sorts the column. It is empty
            if the number is nan, and in columns of text.
    """

    text: str
    is_best: bool
    sort_value: str


def _sentence_on(constants: Mapping[str, str]) -> str:
    """Write a sentence with the texts that all rows share, without empty texts and dashes."""
    known = []
    for heading, text in constants.items():
        if text not in ("", MISSING):
            known.append(f"{heading} {text}")
    if not known:
        return ""
    return f"In all rows: {'; '.join(known)}."


def _sort_value(value: float) -> str:
    """Format a number for the script that sorts a table; empty for nan."""
    if pd.isna(value):
        return ""
    return f"{value:.9g}"


def code_as_html(text: str) -> Markup:
    """Escape a text for HTML, and turn backticks into ``<code>``."""
    escaped = str(escape(text))  # first, because later it would escape the tags, too
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", escaped))  # noqa: S704 -- it is escaped


TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
)
TEMPLATES.filters["code"] = code_as_html


def escape_markdown(text: str) -> str:
    """Escape cell borders, tags and links in a text, and join its lines, for Markdown."""
    backslash_or_border = r"[\\|]"
    begin_of_tag = r"<(?=[A-Za-z/!?])"  # the `<` of `<b>`, `</b>` or `<!--`, but not of `p < 5`
    end_of_link_text = r"\](?=[(\[:])"  # the first `]` of `[text](link)` or `[text][link]`
    special = f"{backslash_or_border}|{begin_of_tag}|{end_of_link_text}"
    escaped = re.sub(special, r"\\\g<0>", text)  # a backslash before each
    return re.sub(r"\s*\n\s*", " ", escaped)


def escape_latex(text: str) -> str:
    """Join the lines of a text, escape it for pdflatex, and replace signs that pdflatex lacks."""
    in_one_line = " ".join(text.split())
    return in_one_line.translate(_LATEX_SIGNS)


def _latex_heading(text: str) -> str:
    """Break a heading into short lines, and escape it for pdflatex."""
    lines = textwrap.wrap(text, 12, break_long_words=False, break_on_hyphens=False)
    escaped = [escape_latex(line) for line in lines]
    return r"\shortstack[l]{" + r"\\".join(escaped) + "}"
