"""Read instructions in Alpaca's form from the hub, a JSON or JSON-lines file, or a package."""

from __future__ import annotations

import json
import os
import tarfile
from codecs import BOM_UTF8
from collections.abc import Iterable
from dataclasses import dataclass
from typing import IO, Any, cast

from pydantic import ValidationError

from benchmarks.harness.base import DATA_ROOT, DataError, first_line, first_problem
from benchmarks.harness.config.sets import ALL, SetPart
from benchmarks.harness.sources.hub import commit_of, hub_name
from benchmarks.harness.sources.local import USER_SUFFIXES, user_file
from benchmarks.harness.sources.packages import find_package
from benchmarks.llama.definition import Instruction, InstructionSource

_SHOWN = 5


@dataclass(frozen=True)
class Instructions:
    """Hold the usable rows of a set, messages on the broken ones, and the source (file, package or hub id)."""

    rows: list[Instruction]
    broken: list[str]
    source: str

    def describe(self, name: str, expected: int | None) -> SetPart:
        """Describe the set, whose makers count ``expected`` rows; broken rows count as dropped."""
        inputs = f"{sum(bool(row.input) for row in self.rows):,} with an input"
        return SetPart(name, ALL, len(self.rows), len(self.broken), expected, inputs, self.source)


def load_instructions(name: str, source: InstructionSource) -> Instructions:
    """Read a set of instructions.

    A file ``<name>.json`` or ``<name>.jsonl`` below the data root (``EMOE_DATA_ROOT``) has precedence.

    Raises:
        DataError: The set is missing, or is not a list of rows.
    """
    if file := user_file(name):
        return parse(file.read_bytes(), str(file), lines=file.suffix == ".jsonl")
    if source.package:
        package = find_package("llamafactory")
        with tarfile.open(package.check()) as archive:
            content = cast(IO[bytes], archive.extractfile(source.package)).read()
        return parse(content, f"package {package.package} {package.version}", lines=False)
    if source.hub:
        return _read_hub(source.hub, source.revision)
    root = os.environ.get(DATA_ROOT) or "<data_root>"
    files = " or ".join(f"{root}/{name}{suffix}" for suffix in USER_SUFFIXES)
    raise DataError(f"the set '{name}' needs your own file: {files}")


def _read_hub(hub: str, revision: str | None) -> Instructions:
    import datasets

    try:
        loaded = datasets.load_dataset(hub, split="train", revision=revision)
    except Exception as error:  # the hub, the network and parsers raise many types
        raise DataError(
            f"could not load {hub} from the hub: {first_line(error)}; "
            "without the hub, put its rows below data_root (config/README.md)"
        ) from error
    return _split_usable("row", loaded, hub_name(hub, revision, commit_of(loaded)))


def parse(content: bytes, where: str, *, lines: bool) -> Instructions:
    """Read rows from the content of a file.

    Args:
        content: The bytes. A line that is not UTF-8 counts as broken.
        where: The name of the file, for messages.
        lines: True for JSON lines, False for one JSON list.

    Raises:
        DataError: The content is not a list in UTF-8, or is empty.
    """
    if lines:
        return _split_usable("line", content.removeprefix(BOM_UTF8).split(b"\n"), where)
    try:
        values = json.loads(content.decode("utf-8-sig"))
    except ValueError as error:
        raise DataError(
            f"{where} is not JSON: {error}; name it .jsonl if every line is an object"
        ) from error
    if not isinstance(values, list) or not values:
        raise DataError(
            f"{where} is not a list of objects, or is empty; name it .jsonl if every line is an object"
        )
    return _split_usable("row", values, where)


def _split_usable(noun: str, rows: Iterable[Any], source: str) -> Instructions:
    """Check rows, which are values or lines of JSON; skip empty lines."""
    usable, broken = [], []
    for number, row in enumerate(rows, start=1):
        position = f"{noun} {number}"
        try:
            if not isinstance(row, bytes):
                checked = Instruction.model_validate(row)
            elif row.strip():
                checked = Instruction.model_validate_json(row)
            else:
                continue
            usable.append(checked.model_copy(update={"position": position}))
        except ValidationError as error:
            problem = first_problem(error).removeprefix("'the file': ")
            broken.append(f"{position}: {problem}")
    return Instructions(usable, broken, source)


def refuse_broken(broken: list[str], source: str) -> None:
    """Raise :class:`DataError` if there are broken rows."""
    if broken:
        raise DataError(
            f"{source} has {len(broken)} broken rows, the first: {'; '.join(broken[:_SHOWN])}. "
            "Fix them, or skip them with data.broken_rows: skip"
        )
