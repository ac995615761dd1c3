"""One renderer for every table: numbers stay numbers until the last step."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from benchmarks.harness.config.catalogue import load_metrics
from benchmarks.harness.report.latex import latex_table

MISSING = "–"
RUNS = "runs"  # column of a frame: the folders of the runs that a row is made of, blanks between them


@dataclass(frozen=True)
class Column:
    """One printed column of numbers.

    Attributes:
        label: heading; the metric's own where empty.
        metric: entry of ``metrics.yaml`` that says scale, decimals and direction.
        value: column of the frame.
        std: column with the standard deviation, printed as ``mean ± std``.
        interval: columns with the ends of a confidence interval, printed as ``value [low, high]``.
        signed: print a plus sign (differences).
        best: column of the frame by which the best cell of every group is marked; None marks nothing.
        decimals: other than the metric's.
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
        metric = load_metrics()[self.metric]
        label = self.label or metric.label
        return f"{label} ({metric.unit})" if metric.unit else label

    def text(self, row: pd.Series) -> str:
        """The cell of one row."""
        value = self._number(row[self.value])
        if self.std and not math.isnan(row[self.std]):
            return f"{value} ± {self._number(row[self.std], signed=False)}"
        if self.interval and not math.isnan(row[self.interval[0]]):
            return f"{value} [{self._number(row[self.interval[0]])}, {self._number(row[self.interval[1]])}]"
        return value

    def _number(self, value: float, *, signed: bool | None = None) -> str:
        if value is None or math.isnan(value):
            return MISSING
        metric = load_metrics()[self.metric]
        decimals = metric.decimals if self.decimals is None else self.decimals
        sign = "+" if (self.signed if signed is None else signed) else ""
        return f"{value * metric.scale:{sign}z.{decimals}f}"


@dataclass(frozen=True)
class Table:
    """A table, from numbers to every format.

    Attributes:
        title: heading.
        caption: what stands in it, how it was made, and how much it may be trusted.
        keys: text columns of the frame, with their headings.
        columns: columns of numbers.
        frame: the numbers.
        group: text columns within which ``best`` compares.
        compare: rows that take part in the comparison, a Boolean column of the frame; all where None.
        notes: text columns that stand after the numbers, with their headings.
        name: of its files, without ending.
        wraps: whether cells are sentences, which a page breaks into lines.
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
    def shown(self) -> list[Column]:
        """Columns that have a number somewhere; all of an empty table."""
        return [column for column in self.columns if self.frame.empty or self.frame[column.value].notna().any()]

    def texts(self) -> pd.DataFrame:
        """The printed cells."""
        cells = {heading: self.frame[key].astype(str) for key, heading in self.keys.items()}
        for column in self.shown:
            cells[column.heading] = self.frame.apply(column.text, axis=1) if len(self.frame) else pd.Series(dtype=str)
        cells |= {heading: self.frame[key].astype(str) for key, heading in self.notes.items()}
        return pd.DataFrame(cells).reset_index(drop=True)

    def best(self) -> pd.DataFrame:
        """Boolean mask of the printed cells that hold the best number of their group, by number, not by text."""
        frame = self.frame.reset_index(drop=True)
        mask = pd.DataFrame(
            False,
            index=frame.index,
            columns=[*self.keys.values(), *(c.heading for c in self.shown), *self.notes.values()],
        )
        taking_part = frame[self.compare] if self.compare else pd.Series(True, index=frame.index)
        for column in self.shown:
            direction = load_metrics()[column.metric].direction
            if column.best is None or direction == "none" or frame.empty:
                continue
            values = frame[column.best].where(taking_part)
            groups = values.groupby([frame[key] for key in self.group]) if self.group else values.groupby(lambda _: 0)
            extreme = groups.transform("max" if direction == "higher" else "min")
            several = groups.transform("count") > 1
            mask[column.heading] = (values == extreme) & several
        return mask

    def markdown(self) -> str:
        """Title, table and caption; the best numbers in bold."""
        texts = self.texts().map(_plain_markdown).rename(columns=_plain_markdown)
        marked = texts.where(~self.best().to_numpy(), lambda cells: "**" + cells + "**")
        title, caption = _plain_markdown(self.title), _outside_code(self.caption, _plain_markdown)
        return f"### {title}\n\n{marked.to_markdown(index=False, disable_numparse=True)}\n\n{caption}\n"

    def latex(self) -> str:
        """A booktabs table that fits a page, see :func:`~benchmarks.harness.report.latex.latex_table`."""
        texts = self.texts()
        same = self._said_once(texts)
        kept = [heading for heading in texts.columns if heading not in same]
        numbers = {column.heading for column in self.shown}
        keys = list(self.keys.values())
        return latex_table(
            self.name, self.title, self.caption, texts[kept], self.best()[kept], keys, numbers, _sentence(same)
        )

    def html(self) -> str:
        """A ``<table>`` without style of its own: a number's cell has its value to sort by, a row the runs it is made of."""
        texts, best, sorts = self.texts(), self.best(), self._sorts()
        same = self._said_once(texts)
        columns = [place for place, heading in enumerate(texts.columns) if heading not in same]
        traced = RUNS in self.frame
        rows = []
        for place in range(len(texts)):
            cells = [
                _cell(
                    texts.iat[place, column], best.iat[place, column], sorts[place][column], heads=column == columns[0]
                )
                for column in columns
            ]
            if traced:
                folders = str(self.frame[RUNS].iloc[place])
                cells.append(f'<td data-runs="{html.escape(folders)}">{len(folders.split()) or MISSING}</td>')
            rows.append(f"<tr>{''.join(cells)}</tr>")
        headings = [*texts.columns[columns], *(["Runs"] if traced else [])]
        head = "".join(f'<th scope="col">{html.escape(heading)}</th>' for heading in headings)
        once = _sentence(same)
        body = "\n".join(rows)
        return (
            f'<figure id="{html.escape(self.name)}">\n<figcaption><b>{html.escape(self.title)}.</b> '
            f"<details><summary>How to read it</summary>{with_code(self.caption)}</details>"
            f"{f'<p>{html.escape(once)}</p>' if once else ''}</figcaption>\n"
            f'<div class="wide"><table class="{"sentences" if self.wraps else "numbers"}">\n'
            f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>\n</figure>\n"
        )

    def _said_once(self, texts: pd.DataFrame) -> dict[str, str]:
        """Texts that all rows share, by heading; one column of names always stays."""
        names = list(self.keys.values())
        shared = [
            heading for heading in (*names, *self.notes.values()) if len(texts) > 1 and texts[heading].nunique() == 1
        ]
        if set(names) <= set(shared):
            shared.remove(names[-1])
        return {heading: str(texts[heading].iloc[0]) for heading in shared}

    def _sorts(self) -> list[list[float | None]]:
        """By row and printed cell, the number that is printed there."""
        numbers = self.frame[[column.value for column in self.shown]].astype(float).to_numpy().tolist()
        before, after = [None] * len(self.keys), [None] * len(self.notes)
        return [[*before, *(None if math.isnan(value) else value for value in row), *after] for row in numbers]

    def write(self, folder: Path) -> None:
        """Write ``<name>.csv`` (plain numbers), ``.md``, ``.tex`` and ``.html``."""
        folder.mkdir(parents=True, exist_ok=True)
        self.frame.to_csv(folder / f"{self.name}.csv", index=False)
        (folder / f"{self.name}.md").write_text(self.markdown())
        (folder / f"{self.name}.tex").write_text(self.latex())
        (folder / f"{self.name}.html").write_text(self.html())


def with_code(text: str) -> str:
    """A text as HTML: what stands between backticks is code, and nothing else is markup."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))


def _plain_markdown(text: str) -> str:
    """A text on one line of Markdown in which no tag begins and no cell of a table ends."""
    return re.sub(r"\s*\n\s*", " ", re.sub(r"\||<(?=[A-Za-z/!?])", r"\\\g<0>", text))


def _outside_code(text: str, change: Callable[[str], str]) -> str:
    return "".join(part if place % 2 else change(part) for place, part in enumerate(re.split(r"(`[^`]+`)", text)))


def _sentence(same: Mapping[str, str]) -> str:
    """What all rows of a table share; nothing where they share nothing, or that there is none of it."""
    once = "; ".join(f"{heading} {text}" for heading, text in same.items() if text not in ("", MISSING))
    return f"In all rows: {once}." if once else ""


def _cell(text: str, strong: bool, sort: float | None, *, heads: bool) -> str:
    text = f"<strong>{html.escape(text)}</strong>" if strong else html.escape(text)
    if heads and text:  # an empty cell heads nothing
        return f'<th scope="row">{text}</th>'
    return f"<td>{text}</td>" if sort is None else f'<td data-sort="{sort:.9g}">{text}</td>'
