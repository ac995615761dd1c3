"""Validate the content of YAML files. Every error names the file, the key and the nearest valid value."""

from __future__ import annotations

import csv
import re
import reprlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from benchmarks.harness.base import DefinitionError, read_yaml
from emoe.errors import did_you_mean

Model = TypeVar("Model", bound="Strict")


def key_path(keys: Iterable[str | int]) -> str:
    """Join keys to the path of a value in a file.

    >>> key_path(["benchmarks", "glue", "grid", 0])
    'benchmarks.glue.grid[0]'
    """
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys).removeprefix(
        "."
    )


@dataclass(frozen=True)
class Location:
    """The place of a value in a file, for messages.

    >>> grid = Location("config/mini.yaml", "benchmarks.glue.grid")
    >>> str(grid.at(0, "model"))
    "config/mini.yaml: 'benchmarks.glue.grid[0].model'"

    Attributes:
        file: The path of the file, or other words that name the source.
        key: The key path of the value in the file.
    """

    file: Path | str
    key: str

    def at(self, *keys: str | int) -> Location:
        """Return the location of a value inside this one."""
        return Location(self.file, key_path([self.key, *keys]))

    def __str__(self) -> str:
        return f"{self.file}: '{self.key}'"


def _explain(error: ValidationError, content: object, at: Sequence[str | int]) -> str:
    """Describe the first mistake that pydantic reports: key, value, pydantic's message and the nearest valid value."""
    problems = error.errors(include_url=False)
    first, keys = problems[0], _keys(problems[0], content)
    key = key_path([*at, *keys]) or "the file"
    # pydantic reports a problem for each branch of a union
    messages = " or ".join(
        problem["msg"] for problem in problems if _keys(problem, content) == keys
    )
    if first["type"] in ("missing", "refusal"):
        return f"'{key}': {messages}"
    given = first["input"]
    value = f"{reprlib.repr(given):.100}"  # short, also if aliases of aliases make the value huge
    if first["type"] == "literal_error":
        options = re.findall("'([^']+)'", first["ctx"]["expected"])
        return (
            f"'{key}' is {value}{did_you_mean(given if isinstance(given, str) else value, options)}"
        )
    return f"'{key}' is {value}: {messages}"


def _keys(problem: Mapping[str, Any], content: Any) -> list[str | int]:
    """Return the key path of a problem, without the names of union branches in pydantic's location."""
    keys: list[str | int] = []
    for step in problem["loc"]:
        if isinstance(content, list | dict) and step in (
            content if isinstance(content, dict) else range(len(content))
        ):
            keys.append(step)
            content = content[step]
    return [*keys, problem["loc"][-1]] if problem["type"] == "missing" else keys


class Strict(BaseModel):
    """Hold the data of a file: reject unknown keys, never convert values, be immutable.

    A field's docstring is its description in an editor.
    """

    exactly_one_of: ClassVar[tuple[str, ...]] = ()  # exactly one of these keys must have a value
    together: ClassVar[
        tuple[tuple[str, str], ...]
    ] = ()  # pairs of a key and another key that it requires
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @model_validator(mode="before")
    @classmethod
    def _check_keys(cls, content: Any) -> Any:
        for key in content if isinstance(content, dict) else ():
            if key not in cls.model_fields:
                raise refusal(f"unknown key '{key}'{did_you_mean(key, cls.model_fields)}")
        return content

    def given(self) -> dict[str, Any]:
        """Return the values that the file gives, without defaults."""
        return {
            name: getattr(self, name)
            for name in type(self).model_fields
            if name in self.model_fields_set
        }

    def model_post_init(self, _context: Any, /) -> None:
        if self.exactly_one_of:
            named = [key for key in self.exactly_one_of if getattr(self, key) is not None]
            if len(named) != 1:
                raise refusal(
                    f"it needs one of {', '.join(self.exactly_one_of)}, but has {' and '.join(named) or 'none'}"
                )
        for key, other in self.together:
            if getattr(self, key) is not None and getattr(self, other) is None:
                raise refusal(f"'{key}' needs the key '{other}'")


class ExplicitNulls(Strict):
    """Hold data in which null differs from a missing key. Only explicit nulls are dumped."""

    @model_serializer(mode="wrap")
    def _dump(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {
            name: value
            for name, value in dump(self).items()
            if value is not None or name in self.model_fields_set
        }


def refusal(message: str) -> PydanticCustomError:
    """Return a validation error for a model's own validator; pydantic adds the keys."""
    return PydanticCustomError("refusal", "{message}", {"message": message})


NUMBER_COLUMNS = ("value", "status", "source")  # last columns of every CSV of published numbers


def optional() -> Any:
    """Return the default of an optional key, which a run's spec omits."""
    return Field(default=None, exclude_if=lambda value: value is None)


def optional_zero() -> Any:
    """Return the default of an optional number; a run's spec omits None and 0."""
    return Field(default=None, exclude_if=lambda value: not value)


def _keep_integer(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    """Validate a number without converting int to float: 1 and 1.0 would hash to different run ids."""
    check(value)
    return value


def _check_unique(values: list[Any]) -> list[Any]:
    if twice := [value for number, value in enumerate(values) if value in values[:number]]:
        raise refusal(f"{twice[0]!r} occurs twice")
    return values


def registered(names: Collection[str], beside: Collection[str] = ()) -> AfterValidator:
    """Require a string to be a registered name at reading time.

    Args:
        names: The registered names.
        beside: Further valid names.
    """

    def check(name: str) -> str:
        if name not in names and name not in beside:
            raise refusal(f"there is no '{name}'{did_you_mean(name, [*beside, *names])}")
        return name

    return AfterValidator(check)


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
Text = Annotated[str, _NotEmpty]
Names = Annotated[list[str], _NotEmpty]
Counts = Annotated[list[Count], _NotEmpty]
Wholes = Annotated[list[Whole], _NotEmpty]
Positives = Annotated[list[Positive], _NotEmpty]
Shares = Annotated[list[Share], _NotEmpty]
Key = Annotated[str, Field(pattern="^[a-z][a-z0-9_]*$")]


def parse(content: object, model: type[Model], where: str, *at: str | int) -> Model:
    """Validate the content of a file.

    Args:
        content: The content from YAML or JSON.
        model: The model of the content.
        where: The file, for messages.
        at: The key path of ``content`` in the file.

    Raises:
        DefinitionError: Names the file, the key and the nearest valid value.
    """
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise DefinitionError(f"{where}: {_explain(error, content, at)}") from error


def read(path: Path, model: type[Model]) -> Model:
    """Read a YAML file and validate it, see :func:`parse`."""
    return parse(read_yaml(path), model, str(path))


def check_names(location: Location, names: Iterable[str], valid: Collection[str]) -> None:
    """Check the names that a file gives at one place.

    Args:
        location: The file, and the key of the names.
        names: The names to check.
        valid: The valid names.

    Raises:
        DefinitionError: A name is not valid; the error names the location and the nearest valid name.
    """
    for name in names:
        if name not in valid:
            near = did_you_mean(name, valid)
            raise DefinitionError(f"{location} is '{name[:100]}', which does not exist{near}")


def check_file(location: Location, name: str, folder: Path, columns: Sequence[str] = ()) -> None:
    """Check that a CSV exists and has the columns of published numbers.

    Args:
        location: The file that names the CSV, and the key there.
        name: The name of the CSV.
        folder: The folder of the CSV.
        columns: The columns before value, status and source.
    """
    known = [str(path.relative_to(folder)) for path in folder.glob("**/*.csv")]
    check_names(location, [name], known)
    if columns:
        with (folder / name).open(encoding="utf-8-sig", errors="replace", newline="") as rows:
            header, wanted = next(csv.reader(rows), []), [*columns, *NUMBER_COLUMNS]
        if header != wanted:
            raise DefinitionError(
                f"{folder / name}: the columns are {header}, but must be {wanted}"
            )
