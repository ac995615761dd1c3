"""Read instructions in Alpaca's form from the hub, a JSON or JSON-lines file, or a package."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any, cast

from benchmarks.harness.base import DATA_ROOT, DataError, first_line
from benchmarks.harness.sources.hub import commit_of, hub_name
from benchmarks.harness.sources.local import USER_SUFFIXES, user_file
from benchmarks.harness.sources.packages import find_package
from benchmarks.llama.definition import InstructionSource

ALPACA_DEMO = "llamafactory"  # the package that contains a set
_SHOWN = 5
_FIELDS = ("instruction", "input", "output")


@dataclass(frozen=True)
class Instruction:
    """Hold one row: instruction, input (often empty), output, and its position for messages (``line 7``)."""

    place: str
    instruction: str
    input: str
    output: str


@dataclass(frozen=True)
class Instructions:
    """Hold the usable rows of a set, messages on the broken ones, and the source (file, package or hub id)."""

    rows: list[Instruction]
    broken: list[str]
    source: str


def load_instructions(name: str, source: InstructionSource) -> Instructions:
    """Read a set of instructions.

    A file ``<name>.json`` or ``<name>.jsonl`` below the data root (``EMOE_DATA_ROOT``) has precedence.

    Raises:
        DataError: The set is missing, or is not a list of rows.
    """
    if file := user_file(name):
        return parse(file.read_bytes(), str(file), lines=file.suffix == ".jsonl")
    if source.package:
        package = find_package(ALPACA_DEMO)
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
    return _split_usable(_number_rows("row", loaded), hub_name(hub, revision, commit_of(loaded)))


def parse(content: bytes, where: str, *, lines: bool) -> Instructions:
    """Read rows from the content of a file.

    Args:
        content: The bytes; a row that is not UTF-8 is broken.
        where: The name of the file, for messages.
        lines: True for JSON lines, False for one JSON list.

    Raises:
        DataError: The content is not a list, or is empty.
    """
    text = content.decode("utf-8-sig", errors="surrogateescape")
    if lines:
        numbered = _number_rows("line", text.split("\n"))
        return _split_usable(((place, _decode(line)) for place, line in numbered if line.strip()), where)
    values = _decode(text)
    if isinstance(values, ValueError):
        raise DataError(f"{where} is not JSON: {values}; name it .jsonl if every line is an object")
    if not isinstance(values, list) or not values:
        raise DataError(f"{where} is not a list of objects, or is empty; name it .jsonl if every line is an object")
    return _split_usable(_number_rows("row", values), where)


def _number_rows(noun: str, values: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    return ((f"{noun} {number}", value) for number, value in enumerate(values, start=1))


def _decode(text: str) -> Any:
    """Decode JSON; return the error if the text is not JSON."""
    try:
        return json.loads(text)
    except ValueError as error:
        return error


def _split_usable(rows: Iterable[tuple[str, Any]], source: str) -> Instructions:
    usable, broken = [], []
    for place, value in rows:
        if reason := _problem(value):
            broken.append(f"{place} {reason}")
        else:
            usable.append(Instruction(place, *(value.get(field) or "" for field in _FIELDS)))
    return Instructions(usable, broken, source)


def _problem(value: Any) -> str | None:
    """Return the problem of an unusable row; None for a usable one."""
    if isinstance(value, ValueError):
        return f"is not JSON ({value})"
    if not isinstance(value, Mapping):
        return f"is {type(value).__name__}, not an object with {', '.join(_FIELDS)}"
    for field in _FIELDS:
        text = value.get(field)
        if text is None and field == "input":
            continue
        if field not in value:
            return f"lacks '{field}'"
        if not isinstance(text, str):
            return f"'{field}' is {type(text).__name__}, not text"
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            return f"'{field}' is not UTF-8"
        if field != "input" and not text.strip():
            return f"'{field}' is empty"
    return None


def refuse_broken(broken: list[str], source: str) -> None:
    """Raise :class:`DataError` if there are broken rows."""
    if broken:
        more = f"; and {len(broken) - _SHOWN} more" if len(broken) > _SHOWN else ""
        raise DataError(
            f"{source} has {len(broken)} broken rows: {'; '.join(broken[:_SHOWN])}{more}. "
            "Fix them, or skip them with data.broken_rows: skip"
        )
