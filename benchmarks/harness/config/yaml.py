"""YAML files, read into models; every error names the file, the key and the nearest valid value."""

from __future__ import annotations

import csv
import functools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_serializer,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from benchmarks.harness.base import DefinitionError
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
KeyPath = tuple[str | int, ...]


def explain(error: ValidationError, content: object, described: Mapping[str, Any], at: KeyPath = ()) -> str:
    """Describe the errors that pydantic found in one line.

    Args:
        error: The errors that pydantic found.
        content: The validated content.
        described: The JSON Schema of the model, which has the valid keys and values.
        at: The keys that lead to ``content`` in its file.
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
    """Hold one error: its place in the content, and pydantic's words."""

    kind: str
    path: KeyPath
    of_union: bool
    value: object
    context: Mapping[str, Any]
    message: str

    @property
    def shown(self) -> str:
        """Return the value as text, shortened if it is long."""
        text = repr(self.value)
        return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"

    @property
    def is_type(self) -> bool:
        return self.kind.removesuffix("_type") in _TYPES

    def is_nearer(self, other: _Mistake) -> bool:
        """Return True if this error is at a deeper place than the other, or says more of the same place."""
        if len(self.path) == len(other.path):
            return self.path == other.path and other.is_type and not self.is_type
        return self.path[: len(other.path)] == other.path

    def text(self, described: Mapping[str, Any], at: KeyPath) -> str:
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
    """Locate an error in the content. Other steps of pydantic's location name branches of unions, or mark a key."""
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


def _allowed(described: Mapping[str, Any], path: KeyPath) -> list[Mapping[str, Any]]:
    """Return the JSON Schemas that describe a place: one for each branch."""
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


def _dotted(path: KeyPath) -> str:
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _float_hint(value: object) -> str:
    """Say how to write ``2e-5``, which YAML 1.1 reads as text."""
    try:
        return f" (YAML reads {value} as text; write {float(value):.1e})" if isinstance(value, str) else ""
    except ValueError:
        return ""


Model = TypeVar("Model", bound="Strict")


if TYPE_CHECKING:
    from yaml import SafeLoader
else:  # libyaml, which PyYAML's wheels have, takes a tenth of the time, of which every command had half a second
    SafeLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(SafeLoader):
    """Load safe YAML, and refuse a key that is given twice instead of keeping the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        given = [key_node for key_node, _ in node.value if key_node.tag != "tag:yaml.org,2002:merge"]
        mapping = super().construct_mapping(node, deep)
        seen = set()
        for key_node in given:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key}' is given twice", key_node.start_mark
                )
            seen.add(key)
        return mapping


def read_yaml(path: Path) -> Any:
    """Parse one YAML file.

    Raises:
        DefinitionError: The file is missing, cannot be read or is not valid YAML; names the line.
    """
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _Loader)  # noqa: S506  (a SafeLoader)
    except FileNotFoundError as error:
        near = sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise DefinitionError(f"{path} does not exist{did_you_mean(path.name, near)}") from error
    except OSError as error:
        raise DefinitionError(f"{path} cannot be read: {error.strerror}") from error
    # a number or date beyond what Python reads is a ValueError
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise DefinitionError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error


class Strict(BaseModel):
    """Hold the data of a file: no unknown key, no conversion of a value, no change afterwards.

    A field's docstring is its description in an editor.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    def given(self) -> dict[str, Any]:
        """Return the values that the file gives, without defaults."""
        return {name: getattr(self, name) for name in type(self).model_fields if name in self.model_fields_set}

    def need_one_of(self, *keys: str) -> None:
        """Refuse several of these keys, and none of them; for a model's own validator."""
        named = [key for key in keys if getattr(self, key) is not None]
        if len(named) != 1:
            raise refusal(f"it needs one of {', '.join(keys)}, but has {' and '.join(named) or 'none'}")

    def need_together(self, key: str, other: str) -> None:
        """Refuse a key without the other that it needs."""
        if getattr(self, key) is not None and getattr(self, other) is None:
            raise refusal(f"'{key}' needs the key '{other}'")


class AsGiven(Strict):
    """Hold data in which null differs from a missing key: the dump has the given keys, and defaults that are not null."""

    @model_serializer(mode="wrap")
    def _dump(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in dump(self).items() if value is not None or name in self.model_fields_set}


def refusal(message: str) -> PydanticCustomError:
    """Make the error of a model's own validator; pydantic adds the place."""
    return PydanticCustomError("refusal", "{message}", {"message": message})


NUMBER_COLUMNS = ("value", "status", "source")  # columns of every published number, behind those that say what it is of


def left_out() -> Any:
    """Return the default of an optional key, which is then in no run's spec."""
    return Field(default=None, exclude_if=lambda value: value is None)


def zero_left_out() -> Any:
    """Return the default of an optional number; 0 means the same, and neither is in a run's spec."""
    return Field(default=None, exclude_if=lambda value: not value)


def _as_given(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    """Keep an integer an integer where any number is allowed: a run's id is a hash of JSON, where 1 is not 1.0."""
    check(value)
    return value


def _unique(values: list[Any]) -> list[Any]:
    if twice := [value for number, value in enumerate(values) if value in values[:number]]:
        raise refusal(f"{twice[0]!r} stands there twice")
    return values


class Registered:
    """Mark a text as one of the names that are registered when it is read. Editors propose those of the project and
    take others.

    Args:
        names: The registry.
        beside: Further names beside the registry.
    """

    def __init__(self, names: Collection[str], beside: Collection[str] = ()) -> None:
        self._names, self._beside = names, beside

    @property
    def options(self) -> list[str]:
        return [*self._beside, *self._names]

    def _check(self, name: str) -> str:
        if name not in self.options:
            raise PydanticCustomError("unknown_name", "no such name", {"options": self.options})
        return name

    def __get_pydantic_core_schema__(self, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"anyOf": [{"enum": self.options, "type": "string"}, handler(schema)]}


AS_GIVEN = WrapValidator(_as_given)
UNIQUE = AfterValidator(_unique)
_NotEmpty = Field(min_length=1)
Number = Annotated[float, AS_GIVEN]
Positive = Annotated[float, Field(gt=0), AS_GIVEN]
NotNegative = Annotated[float, Field(ge=0), AS_GIVEN]
Rate = Annotated[float, Field(ge=0, lt=1), AS_GIVEN]
Share = Annotated[float, Field(gt=0, le=1), AS_GIVEN]
Count = Annotated[int, Field(ge=1)]
Whole = Annotated[int, Field(ge=0)]
Names = Annotated[list[str], _NotEmpty]
Counts = Annotated[list[Count], _NotEmpty]
Wholes = Annotated[list[Whole], _NotEmpty]
Positives = Annotated[list[Positive], _NotEmpty]
Shares = Annotated[list[Share], _NotEmpty]
Key = Annotated[str, Field(pattern="^[a-z][a-z0-9_]*$")]


@functools.cache
def json_schema(model: type[Strict]) -> dict[str, Any]:
    """Describe a model as a JSON Schema, with the docstrings of its fields as descriptions."""
    return model.model_json_schema()


def parse(content: object, model: type[Model], where: str, *at: str | int) -> Model:
    """Validate the content of a file.

    Args:
        content: The content from YAML or JSON.
        model: The model of the content.
        where: The file, for messages.
        at: The keys that lead to ``content`` in it.

    Raises:
        DefinitionError: Names the file, the keys and the nearest valid values, up to five at once.
    """
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise DefinitionError(f"{where}: {explain(error, content, json_schema(model), at)}") from error


def read(path: Path, model: type[Model]) -> Model:
    """Read a YAML file and validate it, see :func:`parse`."""
    return parse(read_yaml(path), model, str(path))


def check_names(where: str, key: str, names: Iterable[str], known: Collection[str]) -> None:
    """Check the names that a file gives under a key.

    Args:
        where: The file, a quotation mark, and the keys before this one.
        key: The key.
        names: The names under the key.
        known: The valid names.

    Raises:
        DefinitionError: A name is not valid; names the nearest.
    """
    for name in names:
        if name not in known:
            at = f"{where}.{key}" if not where.endswith("'") else f"{where}{key}"
            raise DefinitionError(f"{at}' is '{name}', which does not exist{did_you_mean(name, known)}")


def check_file(where: str, key: str, name: str, folder: Path, columns: Sequence[str] = ()) -> None:
    """Check that a CSV that a file names exists, and has the columns of published numbers.

    Args:
        where: The place, see :func:`check_names`.
        key: The key.
        name: The name of the CSV.
        folder: The folder of the CSV.
        columns: The columns before value, status and source.

    Raises:
        DefinitionError: The CSV is missing or has other columns; names the nearest CSV.
    """
    known = [str(path.relative_to(folder)) for path in folder.glob("**/*.csv")]
    check_names(where, key, () if (folder / name).is_file() else [name], known)
    if columns:
        with (folder / name).open(encoding="utf-8-sig", errors="replace", newline="") as rows:
            found, wanted = next(csv.reader(rows), []), [*columns, *NUMBER_COLUMNS]
        if found != wanted:
            raise DefinitionError(f"{folder / name}: the columns are {found}, but must be {wanted}")
