"""YAML files, read into models; every error names the file, the key and the nearest valid value."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
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
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from benchmarks.harness.base import DefinitionError
from emoe.errors import did_you_mean

_AT_MOST = 5  # mistakes in one message
_LONGEST = 100  # characters of a value in a message
_LARGEST, _DEEPEST = 1_000_000, 50  # characters and levels of a file, each alias replaced by its value
KeyPath = tuple[str | int, ...]


def explain(
    error: ValidationError, content: object, at: KeyPath = (), origin: Callable[[KeyPath], KeyPath] = tuple
) -> str:
    """Describe the mistakes that pydantic reports: key, value, pydantic's message and the nearest valid value.

    Args:
        error: The error of pydantic.
        content: The validated content.
        at: The keys that lead to ``content`` in its file.
        origin: A function from keys in ``content`` to the keys in the file that gave the value.
    """
    problems: dict[KeyPath, dict[str, Mapping[str, Any]]] = {}
    for problem in error.errors(include_url=False):
        problems.setdefault(origin(_path(problem, content)), {})[problem["msg"]] = problem
    # a value that fits no branch of a union is described by the branch that it fits best
    deepest = [path for path in problems if not any(path == other[: len(path)] != other for other in problems)]
    texts = [_describe((*at, *path), list(problems[path].values())) for path in sorted(deepest, key=len)]
    return "; ".join(texts[:_AT_MOST])


def _path(problem: Mapping[str, Any], content: Any) -> KeyPath:
    """Return the keys that lead to a problem; other steps of pydantic's location name the branches of unions."""
    path: list[str | int] = []
    for step in problem["loc"]:
        if isinstance(content, dict | list) and step in (content if isinstance(content, dict) else range(len(content))):
            path.append(step)
            content = content[step]
    if problem["type"] == "missing":
        path.append(problem["loc"][-1])
    elif problem["type"] == "unknown_key":
        path.append(problem["ctx"]["key"])
    return tuple(path)


def _describe(path: KeyPath, problems: Sequence[Mapping[str, Any]]) -> str:
    first = problems[0]
    key = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).removeprefix(".")
    context, value = first.get("ctx", {}), first["input"]
    if first["type"] == "missing":
        return f"'{key.rpartition('.')[0] or 'the file'}' needs the key '{path[-1]}'"
    if first["type"] == "unknown_key":
        return f"unknown key '{key}'{did_you_mean(path[-1], context['options'])}"
    messages = " or ".join(problem["msg"] for problem in problems)
    if first["type"] == "refusal":
        return f"'{key or 'the file'}': {messages}"
    shown = repr(value) if len(repr(value)) <= _LONGEST else f"{repr(value)[:_LONGEST]}…"
    if options := context.get("options") or re.findall("'([^']+)'", context.get("expected", "")):
        return f"'{key}' is {shown}{did_you_mean(value, options)}"
    return f"'{key or 'the file'}' is {shown}: {messages}{_float_hint(value)}"


def _float_hint(value: object) -> str:
    """Return a hint on writing ``2e-5``, which YAML 1.1 reads as text."""
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+[eE][+-]?\d+", value):
        return f" (YAML reads {value} as text; write {float(value):.1e})"
    return ""


Model = TypeVar("Model", bound="Strict")


if TYPE_CHECKING:
    from yaml import SafeLoader
else:  # libyaml, which PyYAML's wheels have, saves every command half a second
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
    """Parse one YAML file without tags.

    Raises:
        DefinitionError: The file is missing, cannot be read or is not valid YAML; names the line.
    """
    try:
        text = path.read_text(encoding="utf-8")
        _check_events(text)
        return yaml.load(text, _Loader)  # noqa: S506  (a SafeLoader)
    except FileNotFoundError as error:
        near = sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise DefinitionError(f"{path} does not exist{did_you_mean(path.name, near)}") from error
    except OSError as error:
        raise DefinitionError(f"{path} cannot be read: {error.strerror}") from error
    # numbers and dates beyond Python's range raise ValueError or OverflowError
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        problem = str(error).replace('in "<unicode string>", ', "at ")
        raise DefinitionError(f"{path} is not valid YAML: {problem}") from error


def _check_events(text: str) -> None:
    """Reject tags, and aliases that make the content much larger than the file."""
    sizes: dict[str | None, int] = {}  # the characters of each anchor's value
    anchors, lengths = list[str | None](), [0]  # of the collections that enclose an event
    events: Iterable[Any] = yaml.parse(text, SafeLoader)
    for event in events:
        anchor, size = getattr(event, "anchor", None), 0
        if getattr(event, "tag", None):
            raise yaml.MarkedYAMLError(problem=f"the tag '{event.tag}' is not allowed", problem_mark=event.start_mark)
        if isinstance(event, yaml.CollectionStartEvent):
            anchors.append(anchor)
            lengths.append(1)
            continue
        if isinstance(event, yaml.CollectionEndEvent):
            anchor, size = anchors.pop(), lengths.pop()
        elif isinstance(event, yaml.ScalarEvent):
            size = len(event.value) + 1
        elif isinstance(event, yaml.AliasEvent):
            size = _LARGEST + 1 if anchor in anchors else sizes.get(anchor, 0)  # an alias in its own value is endless
        sizes[anchor] = size
        lengths[-1] += size
        if lengths[-1] > _LARGEST or len(lengths) > _DEEPEST:
            raise yaml.MarkedYAMLError(problem="it is too large or too deep", problem_mark=event.start_mark)


class Strict(BaseModel):
    """Hold the data of a file: no unknown key, no conversion of a value, no change afterwards.

    A field's docstring is its description in an editor.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @model_validator(mode="before")
    @classmethod
    def _check_keys(cls, content: Any) -> Any:
        for key in content if isinstance(content, dict) else ():
            if key not in cls.model_fields:
                raise PydanticCustomError("unknown_key", "unknown key", {"key": key, "options": list(cls.model_fields)})
        return content

    def given(self) -> dict[str, Any]:
        """Return the values that the file gives, without defaults."""
        return {name: getattr(self, name) for name in type(self).model_fields if name in self.model_fields_set}

    def need_one_of(self, *keys: str) -> None:
        """Raise unless exactly one of these keys has a value; for a model's own validator."""
        named = [key for key in keys if getattr(self, key) is not None]
        if len(named) != 1:
            raise refusal(f"it needs one of {', '.join(keys)}, but has {' and '.join(named) or 'none'}")

    def need_together(self, key: str, other: str) -> None:
        """Raise if a key has a value and the other, which it needs, has none."""
        if getattr(self, key) is not None and getattr(self, other) is None:
            raise refusal(f"'{key}' needs the key '{other}'")


class ExplicitNulls(Strict):
    """Hold data in which null differs from a missing key: the dump has given keys and defaults other than null."""

    @model_serializer(mode="wrap")
    def _dump(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in dump(self).items() if value is not None or name in self.model_fields_set}


def refusal(message: str) -> PydanticCustomError:
    """Make the error of a model's own validator; pydantic adds the keys."""
    return PydanticCustomError("refusal", "{message}", {"message": message})


NUMBER_COLUMNS = ("value", "status", "source")  # last columns of every CSV of published numbers


def optional() -> Any:
    """Return the default of an optional key, which a run's spec omits."""
    return Field(default=None, exclude_if=lambda value: value is None)


def optional_zero() -> Any:
    """Return the default of an optional number; a run's spec omits it, and a 0 too."""
    return Field(default=None, exclude_if=lambda value: not value)


def _keep_integer(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    """Keep an integer an integer if any number is allowed: a run's id is a hash of JSON, where 1 is not 1.0."""
    check(value)
    return value


def _check_unique(values: list[Any]) -> list[Any]:
    if twice := [value for number, value in enumerate(values) if value in values[:number]]:
        raise refusal(f"{twice[0]!r} occurs twice")
    return values


class Registered:
    """Require a string to be a registered name when it is read. Editors propose the project's names and accept
    others.

    Args:
        names: The registry.
        beside: Valid names besides those of the registry.
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


KEEP_INTEGER = WrapValidator(_keep_integer)
UNIQUE = AfterValidator(_check_unique)
_NotEmpty = Field(min_length=1)
Number = Annotated[float, KEEP_INTEGER]
Positive = Annotated[float, Field(gt=0), KEEP_INTEGER]
NotNegative = Annotated[float, Field(ge=0), KEEP_INTEGER]
Rate = Annotated[float, Field(ge=0, lt=1), KEEP_INTEGER]
Share = Annotated[float, Field(gt=0, le=1), KEEP_INTEGER]
Count = Annotated[int, Field(ge=1)]
Whole = Annotated[int, Field(ge=0)]
Names = Annotated[list[str], _NotEmpty]
Counts = Annotated[list[Count], _NotEmpty]
Wholes = Annotated[list[Whole], _NotEmpty]
Positives = Annotated[list[Positive], _NotEmpty]
Shares = Annotated[list[Share], _NotEmpty]
Key = Annotated[str, Field(pattern="^[a-z][a-z0-9_]*$")]


def parse(
    content: object,
    model: type[Model],
    where: str,
    *at: str | int,
    origin: Callable[[KeyPath], KeyPath] = tuple,
) -> Model:
    """Validate the content of a file.

    Args:
        content: The content from YAML or JSON.
        model: The model of the content.
        where: The file, for messages.
        at: The keys that lead to ``content`` in it.
        origin: See :func:`explain`.

    Raises:
        DefinitionError: Names the file, the keys and the nearest valid values, up to five at once.
    """
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise DefinitionError(f"{where}: {explain(error, content, at, origin)}") from error


def read(path: Path, model: type[Model]) -> Model:
    """Read a YAML file and validate it, see :func:`parse`."""
    return parse(read_yaml(path), model, str(path))


def check_names(where: str, key: str, names: Iterable[str], valid: Collection[str]) -> None:
    """Check the names that a file gives under a key.

    Args:
        where: The beginning of the message: the file, a quotation mark, and the keys before this one.
        key: The key.
        names: The names under the key.
        valid: The valid names.

    Raises:
        DefinitionError: A name is not valid; names the nearest.
    """
    for name in names:
        if name not in valid:
            at = f"{where}.{key}" if not where.endswith("'") else f"{where}{key}"
            raise DefinitionError(f"{at}' is '{name[:_LONGEST]}', which does not exist{did_you_mean(name, valid)}")


def check_file(where: str, key: str, name: str, folder: Path, columns: Sequence[str] = ()) -> None:
    """Check that a CSV that a file names exists, and has the columns of published numbers.

    Args:
        where: See :func:`check_names`.
        key: The key.
        name: The name of the CSV.
        folder: The folder of the CSV.
        columns: The columns before value, status and source.

    Raises:
        DefinitionError: The CSV is missing or has other columns; names the nearest CSV.
    """
    known = [str(path.relative_to(folder)) for path in folder.glob("**/*.csv")]
    check_names(where, key, [name], known)
    if columns:
        with (folder / name).open(encoding="utf-8-sig", errors="replace", newline="") as rows:
            header, wanted = next(csv.reader(rows), []), [*columns, *NUMBER_COLUMNS]
        if header != wanted:
            raise DefinitionError(f"{folder / name}: the columns are {header}, but must be {wanted}")
