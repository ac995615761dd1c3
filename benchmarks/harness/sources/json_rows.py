"""Rows of JSON: one list, or one value a line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.harness.base import DataError


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; which of two values of one key is meant nobody knows."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"'{next(key for key in keys if keys.count(key) > 1)}' stands twice in an object")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


@dataclass(frozen=True)
class Damaged:
    """Stands in the place of a value that cannot be read, and says why."""

    reason: str


def json_lines(lines: Iterable[str]) -> Iterator[tuple[int, Any]]:
    """Each value with its line, one at a time; a line that is no JSON gives :class:`Damaged`, a blank one nothing."""
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield number, _DECODER.decode(line)
            except (ValueError, RecursionError) as error:
                yield number, Damaged(_reason(error))


def json_list(text: str, where: str) -> Iterator[tuple[int, Any]]:
    """Each value of a text that is one list and nothing else, with the line on which it begins.

    Raises:
        DataError: it is no list, is empty or damaged, or goes on after the list; names the line.
    """

    def fail(place: int, problem: str) -> DataError:
        return DataError(f"{where}, line {1 + text.count(chr(10), 0, place)}: {problem}")

    place = _after_blanks(text, 0)
    if not text.startswith("[", place):
        encoded = not "\ud800" <= text[place : place + 1] <= "\udfff"  # else a byte that is no UTF-8
        wanted = "a .json file is one list of objects; name it .jsonl where every line is an object"
        raise fail(place, wanted if encoded else "is not UTF-8")
    place, line, counted = _after_blanks(text, place + 1), 1, 0
    if text.startswith("]", place):
        raise fail(place, "the list is empty")
    another = True
    while another:
        try:
            value, end = _DECODER.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            at = error.pos if isinstance(error, json.JSONDecodeError) else place
            raise fail(at, f"the list {_reason(error)}") from error
        line, counted = line + text.count("\n", counted, place), place
        yield line, value
        place = _after_blanks(text, end)
        if another := text.startswith(",", place):
            place = _after_blanks(text, place + 1)
    if not text.startswith("]", place):
        raise fail(place, "the list is not JSON (Expecting ',' delimiter)")
    if (rest := _after_blanks(text, place + 1)) < len(text):
        raise fail(rest, f"something stands after the list: {text[rest : rest + 40]!r}")


def _after_blanks(text: str, place: int) -> int:
    while place < len(text) and text[place] in " \t\r\n":
        place += 1
    return place


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "is nested too deeply"
    return f"is not JSON ({error.msg if isinstance(error, json.JSONDecodeError) else error})"
