"""List the paper's tables and figures, with our version of each and its files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.config.suite import Suite
from benchmarks.harness.report.paper_items import (
    PaperItem,
    item_benchmarks,
    load_paper,
    paper_files,
)
from benchmarks.harness.report.placeholders import is_drawn


def paper_index(suite: Suite) -> list[dict[str, Any]]:
    """List the paper's tables and figures, and our version of each in a suite.

    Returns:
        One row per item, which is a table or figure of the paper. ``item`` is its name, ``title``
        its title, and ``naacl`` its number in the NAACL version. ``command`` makes our version, and
        is empty if there is none. ``files`` are the files of our version to show, and ``status``
        says whether they exist, or why not.
    """
    rows: list[dict[str, Any]] = []
    for name, item in load_paper().items.items():
        command = ""
        if not item.missing:
            command = f"snakemake --cores all {name} --config suite={suite.name}"
        files = paper_files(suite, name)
        shown, status = _shown_files(item, files)
        row = {
            "item": name,
            "title": item.title,
            "naacl": item.naacl,
            "command": command,
            "files": shown,
            "status": status,
        }
        rows.append(row)
    return rows


def _shown_files(item: PaperItem, files: Sequence[str]) -> tuple[list[str], str]:
    """Return one file per table and figure to show for an item, and the status of the item.

    ``files`` are all files that the suite makes for the item, in all formats.
    """
    if item.missing:
        return [], f"not made: {item.missing}"
    if not files:
        benchmarks = ", ".join(item_benchmarks(item))
        return [], f"not in this suite (benchmark {benchmarks})"

    # a table is shown as Markdown and a figure as PNG; their files in other formats are not shown
    shown = [file for file in files if file.endswith((".md", ".png"))]
    num_existing = sum(Path(file).exists() for file in files)
    if num_existing < len(files):
        return shown, f"{num_existing} of {len(files)} files"

    # a table is always shown, but a figure only if it is not a placeholder
    without_placeholders = []
    for file in shown:
        is_table = file.endswith(".md")
        if is_table or is_drawn(Path(file)):
            without_placeholders.append(file)
    if not without_placeholders:
        return [], "this suite has no data for it"
    return without_placeholders, "made"
