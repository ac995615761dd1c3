"""What is wrong with a file, in words: which key, which value, and the nearest valid one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from emoe.errors import did_you_mean

_AT_MOST = 5
_LONGEST = 100  # characters of a value
# what pydantic appends to the place of a key that is wrong itself
_KEY = "[key]"
_TYPES = ("bool", "dict", "float", "int", "list", "model", "string")
_BOUNDS = {
    "greater_than_equal": ("ge", "is less than the minimum of"),
    "greater_than": ("gt", "is less than or equal to the minimum of"),
    "less_than_equal": ("le", "is greater than the maximum of"),
    "less_than": ("lt", "is greater than or equal to the maximum of"),
}
_LENGTHS = {"too_short": ("min_length", "at least"), "too_long": ("max_length", "at most")}

Path = tuple[str | int, ...]


def explain(error: ValidationError, content: object, described: Mapping[str, Any], at: Path = ()) -> str:
    """Put what pydantic found into one line.

    Args:
        error: what pydantic found.
        content: what was checked.
        described: the JSON Schema of what it should be, which knows the valid keys and values.
        at: keys that lead to ``content`` in its file.
    """
    found = [_read(one, content) for one in error.errors(include_url=False)]
    # a value that fits no branch of a union is told by the branch that it fits best
    deepest = [one for one in found if not (one.of_union and any(other.is_nearer(one) for other in found))]
    # the outermost first; an unknown key may be what is missing
    deepest.sort(key=lambda one: (len(one.path), one.kind == "missing", str(one.path)))
    texts = dict.fromkeys(one.text(described, at) for one in deepest)
    return "; ".join(list(texts)[:_AT_MOST])


@dataclass(frozen=True)
class _Mistake:
    """One error: where it is in the content, and what pydantic says of it."""

    kind: str
    path: Path
    of_union: bool
    value: object
    context: Mapping[str, Any]
    message: str

    @property
    def shown(self) -> str:
        """The value, of which a long one's beginning is enough."""
        text = repr(self.value)
        return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"

    @property
    def is_type(self) -> bool:
        return self.kind.removesuffix("_type") in _TYPES

    def is_nearer(self, other: _Mistake) -> bool:
        """Whether this tells of a deeper place than the other, or more of the same one."""
        if len(self.path) == len(other.path):
            return self.path == other.path and other.is_type and not self.is_type
        return self.path[: len(other.path)] == other.path

    def text(self, described: Mapping[str, Any], at: Path) -> str:
        allowed = _allowed(described, self.path)
        path, key = (*at, *self.path), _dotted((*at, *self.path)) or "the file"
        if self.kind == "extra_forbidden":
            known = [name for part in _allowed(described, self.path[:-1]) for name in part.get("properties", {})]
            return f"unknown key '{key}'{did_you_mean(path[-1], known)}"
        if self.kind == "missing":
            return f"'{_dotted(path[:-1]) or 'the file'}' needs the key '{path[-1]}'"
        if self.kind == "literal_error":
            options = [
                option for part in allowed for option in part.get("enum", [part["const"]] if "const" in part else [])
            ]
            return f"'{key}' is {self.shown}{did_you_mean(self.value, options)}"
        if self.kind == "unknown_name":
            return f"'{key}' is {self.shown}{did_you_mean(self.value, self.context['options'])}"
        if self.kind == _KEY:
            pattern = self.context.get("pattern")
            rule = f"does not match '{pattern}'" if pattern else "is no text; put it in quotation marks"
            return f"'{key}': the key {self.shown} {rule}"
        if self.kind == "string_pattern_mismatch":
            return f"'{key}': {self.shown} does not match '{self.context['pattern']}'"
        if self.is_type:
            wanted = dict.fromkeys(part["type"] for part in allowed if "type" in part)
            return f"'{key}' is {self.shown}, but must be {' or '.join(wanted)}{_float_hint(self.value) if 'number' in wanted else ''}"
        if self.kind in _BOUNDS:
            bound, words = _BOUNDS[self.kind]
            return f"'{key}': {self.shown} {words} {self.context[bound]:g}"
        if self.kind in _LENGTHS:
            bound, words = _LENGTHS[self.kind]
            return f"'{key}' is {self.shown}, but must have {words} {self.context[bound]}"
        return f"'{key}': {self.message}"


def _read(error: Mapping[str, Any], content: object) -> _Mistake:
    """Find an error's place in the content; other parts of pydantic's place name branches of unions, or say that a key is meant."""
    path: list[str | int] = []
    steps = [step for step in error["loc"] if step != _KEY]
    for step in steps:
        if _holds(content, step):
            path.append(step)
            content = content[step]  # type: ignore[index]
    kind = error["type"]
    if kind == "missing":
        path.append(steps[-1])
    elif _KEY in error["loc"]:
        kind, path = _KEY, path[:-1]
    of_union = kind not in ("missing", _KEY) and len(path) < len(steps)
    return _Mistake(kind, tuple(path), of_union, error["input"], error.get("ctx", {}), error["msg"])


def _holds(content: object, step: str | int) -> bool:
    if isinstance(content, list):
        return isinstance(step, int) and step < len(content)
    return isinstance(content, dict) and step in content


def _allowed(described: Mapping[str, Any], path: Path) -> list[Mapping[str, Any]]:
    """The parts of a JSON Schema that describe a place: one for each branch."""
    parts = [*_branches(described, described)]
    for step in path:
        below = [found for part in parts for found in _below(part, step)]
        parts = [branch for part in below for branch in _branches(part, described)]
    return parts


def _below(part: Mapping[str, Any], step: str | int) -> Iterator[Mapping[str, Any]]:
    if isinstance(step, int):
        candidates = [part.get("items")]
    else:
        candidates = [part.get("properties", {}).get(step) or part.get("additionalProperties")]
        candidates += part.get("patternProperties", {}).values()
    yield from (candidate for candidate in candidates if isinstance(candidate, Mapping))


def _branches(part: Mapping[str, Any], described: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    if "$ref" in part:
        part = described["$defs"][part["$ref"].removeprefix("#/$defs/")]
    below = [*part.get("anyOf", ()), *part.get("oneOf", ())]
    for branch in below:
        yield from _branches(branch, described)
    if not below:
        yield part


def _dotted(path: Path) -> str:
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _float_hint(value: object) -> str:
    """YAML 1.1 reads ``2e-5`` as text: say how to write it."""
    try:
        return f" (YAML reads {value} as text; write {float(value):.1e})" if isinstance(value, str) else ""
    except ValueError:
        return ""
