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

from benchmarks.harness.base import DATA_ROOT, DataError, first_line, first_problem_in_row
from benchmarks.harness.config.sets import ALL, SetPart
from benchmarks.harness.sources.hub import commit_of, hub_name
from benchmarks.harness.sources.local import USER_SUFFIXES, user_file
from benchmarks.harness.sources.packages import find_package
from benchmarks.llama.definition import Instruction, InstructionSource

_SHOWN = 5  # broken rows that an error message names


@dataclass(frozen=True)
class Instructions:
    """The rows of a set of instructions.

    Attributes:
        rows: The usable rows.
        broken: A message for each unusable row, with its place and the reason.
        source: The file, package or repository on the hub that the rows come from.
    """

    rows: list[Instruction]
    broken: list[str]
    source: str

    def describe(self, name: str, expected: int | None) -> SetPart:
        """Describe the set for the list of data sets.

        Args:
            name: The name of the set.
            expected: The row count according to the set's makers, if known.
        """
        with_input = [row for row in self.rows if row.input]
        return SetPart(
            name=name,
            part=ALL,
            rows=len(self.rows),
            dropped=len(self.broken),
            expected=expected,
            labels=f"{len(with_input):,} with an input",
            source=self.source,
        )


def load_instructions(name: str, source: InstructionSource) -> Instructions:
    """Read a set of instructions.

    A file ``<name>.json`` or ``<name>.jsonl`` below the data root (``EMOE_DATA_ROOT``) has
    precedence.

    Raises:
        DataError: The set is missing, or is not a list of rows.
    """
    file = user_file(name)
    if file:
        return parse_instructions(file.read_bytes(), str(file), lines=file.suffix == ".jsonl")
    if source.package:
        return _read_package(source.package)
    if source.hub:
        return _read_hub(source.hub, source.revision)
    root = os.environ.get(DATA_ROOT) or "<data_root>"
    files = " or ".join(f"{root}/{name}{suffix}" for suffix in USER_SUFFIXES)
    raise DataError(f"the set '{name}' needs your own file: {files}")


def _read_package(member: str) -> Instructions:
    """Read a file of instructions inside the package ``llamafactory``, which ships some.

    Args:
        member: The path of the file in the package's archive.
    """
    package = find_package("llamafactory")
    with tarfile.open(package.check()) as archive:
        file = cast(IO[bytes], archive.extractfile(member))
        content = file.read()
    return parse_instructions(content, f"package {package.package} {package.version}", lines=False)


def _read_hub(hub: str, revision: str | None) -> Instructions:
    """Read the training split of a repository on the hub."""
    import datasets  # takes seconds, and planning does not need it

    try:
        loaded = datasets.load_dataset(hub, split="train", revision=revision)
    except Exception as error:  # the hub, the network and parsers raise many types
        raise DataError(
            f"could not load {hub} from the hub: {first_line(error)}; "
            "without the hub, put its rows below data_root (config/README.md)"
        ) from error
    source = hub_name(hub, revision, commit_of(loaded))
    return _split_usable("row", loaded, source)


def parse_instructions(content: bytes, where: str, *, lines: bool) -> Instructions:
    """Parse the content of a file of instructions.

    Args:
        content: The bytes of the file. In JSON lines, a line that is not UTF-8 is a broken row.
        where: The name of the file, for messages.
        lines: True for JSON lines, False for one JSON list.

    Raises:
        DataError: A JSON list is expected, but the content is something else, is not UTF-8, or is
            an empty list.
    """
    if lines:
        # bytes, because a line that is not UTF-8 must not break the others
        encoded_lines = content.removeprefix(BOM_UTF8).split(b"\n")
        return _split_usable("line", encoded_lines, where)
    try:
        # utf-8-sig removes a byte order mark
        values = json.loads(content.decode("utf-8-sig"))
    except ValueError as error:
        raise DataError(
            f"{where} is not JSON: {error}; name it .jsonl if every line is an object"
        ) from error
    if not isinstance(values, list) or not values:
        raise DataError(
            f"{where} is not a list of objects, or is empty; "
            "name it .jsonl if every line is an object"
        )
    return _split_usable("row", values, where)


def _split_usable(noun: str, rows: Iterable[Any], source: str) -> Instructions:
    """Validate rows, and separate usable rows from broken rows. Empty lines are skipped.

    Args:
        noun: The word for a row in messages: ``row`` or ``line``.
        rows: The rows, as values or as encoded lines of JSON.
        source: The file, package or repository of the rows.
    """
    usable = []
    broken = []
    for number, row in enumerate(rows, start=1):
        is_empty_line = isinstance(row, bytes) and not row.strip()
        if is_empty_line:
            continue
        position = f"{noun} {number}"
        try:
            instruction = _check_row(row)
        except ValidationError as error:
            problem = first_problem_in_row(error)
            broken.append(f"{position}: {problem}")
        else:
            usable.append(instruction.model_copy(update={"position": position}))
    return Instructions(usable, broken, source)


def _check_row(row: Any) -> Instruction:
    """Validate a row, which is a value or an encoded line of JSON.

    Raises:
        ValidationError: The row is broken.
    """
    if isinstance(row, bytes):
        return Instruction.model_validate_json(row)
    return Instruction.model_validate(row)


def refuse_broken(broken: list[str], source: str) -> None:
    """Raise :class:`DataError` if there are broken rows; ``broken`` has a message for each."""
    if broken:
        first = "; ".join(broken[:_SHOWN])
        raise DataError(
            f"{source} has {len(broken)} broken rows, the first: {first}. "
            "Fix them, or skip them with data.broken_rows: skip"
        )
