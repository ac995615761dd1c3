"""Validate the content of YAML files.

Every error names the file, the key and the nearest valid value.
"""

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
    path = ""
    for key in keys:
        if isinstance(key, int):
            path += f"[{key}]"
        else:
            path += f".{key}"
    return path.removeprefix(".")


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


def _describe_first_mistake(
    error: ValidationError, content: object, path_of_content: Sequence[str | int]
) -> str:
    """Describe the first mistake that pydantic reports, in one line.

    The line names the key, the value, and pydantic's message or the nearest valid value.

    Args:
        error: The error of pydantic.
        content: The content that pydantic refused.
        path_of_content: The keys that lead to ``content`` in its file; empty for the whole file.
    """
    problems = error.errors(include_url=False)
    first = problems[0]
    keys = _keys(first, content)
    path = key_path([*path_of_content, *keys])
    # without a path, the whole file is wrong, such as a list instead of a dictionary
    key = path or "the file"
    # for a union, pydantic reports a problem with each of its types
    messages = [problem["msg"] for problem in problems if _keys(problem, content) == keys]
    message = " or ".join(messages)
    # a missing key has no value, and the message of a refusal() already describes the value
    if first["type"] in ("missing", "refusal"):
        return f"'{key}': {message}"

    given = first["input"]
    # cut to 100 characters, because aliases of aliases can make a value huge
    shown = reprlib.repr(given)[:100]
    valid_values = _valid_texts(first)
    if valid_values:
        # did_you_mean needs text
        wrong_value = given if isinstance(given, str) else shown
        return f"'{key}' is {shown}{did_you_mean(wrong_value, valid_values)}"
    return f"'{key}' is {shown}: {message}"


def _valid_texts(problem: Mapping[str, Any]) -> list[str]:
    """Return the valid values of a key that takes one of a few texts; empty for other problems."""
    if problem["type"] != "literal_error":
        return []
    # pydantic lists the valid values, with quotation marks around each text
    return re.findall("'([^']+)'", problem["ctx"]["expected"])


def _keys(problem: Mapping[str, Any], content: Any) -> list[str | int]:
    """Return the keys that lead from the content to the value with a problem."""
    keys: list[str | int] = []
    value = content
    for step in problem["loc"]:
        # pydantic's location also has the names of a union's types, which are not in the content
        if _has_key_or_index(value, step):
            keys.append(step)
            value = value[step]
    # the last step is the missing key itself, which the content does not have
    if problem["type"] == "missing":
        keys.append(problem["loc"][-1])
    return keys


def _has_key_or_index(content: Any, key: str | int) -> bool:
    """Return True if the content is a dictionary with this key, or a list with this index."""
    if isinstance(content, dict):
        return key in content
    if isinstance(content, list):
        return key in range(len(content))
    return False


class Strict(BaseModel):
    """A model of data in a file: it rejects unknown keys, never converts values, and is immutable.

    A field's docstring is its description in an editor.

    Attributes:
        exactly_one_of: Keys of which exactly one must have a value.
        key_requirements: Pairs of a key and another key. If the first has a value, the second must
            have one.
    """

    exactly_one_of: ClassVar[tuple[str, ...]] = ()
    key_requirements: ClassVar[tuple[tuple[str, str], ...]] = ()
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @model_validator(mode="before")
    @classmethod
    def _check_keys(cls, content: Any) -> Any:
        """Refuse unknown keys. pydantic's own message would not name the nearest valid key."""
        if not isinstance(content, dict):
            return content
        for key in content:
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
        """Refuse the model if its keys do not fit together.

        Exactly one key of ``exactly_one_of`` must have a value. For each pair in
        ``key_requirements``, a value of the first key requires a value of the second.
        """
        if self.exactly_one_of:
            self._check_exactly_one()
        for key, required in self.key_requirements:
            if getattr(self, key) is not None and getattr(self, required) is None:
                raise refusal(f"'{key}' needs the key '{required}'")

    def _check_exactly_one(self) -> None:
        """Refuse the model unless exactly one key of ``exactly_one_of`` has a value."""
        with_value = [key for key in self.exactly_one_of if getattr(self, key) is not None]
        if len(with_value) != 1:
            choices = ", ".join(self.exactly_one_of)
            found = " and ".join(with_value) or "none"
            raise refusal(f"it needs one of {choices}, but has {found}")


class ExplicitNulls(Strict):
    """A model in which null differs from a missing key.

    A dump of the model contains a null only if the file gives this null.
    """

    @model_serializer(mode="wrap")
    def _dump(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Dump all values, without the nulls that are only defaults."""
        dumped = {}
        for name, value in dump(self).items():
            is_explicit = name in self.model_fields_set
            if value is not None or is_explicit:
                dumped[name] = value
        return dumped


def refusal(message: str) -> PydanticCustomError:
    """Return an error for a validator of a model to raise. :func:`parse` names the key."""
    # the second argument is a template; the message itself may contain braces
    return PydanticCustomError("refusal", "{message}", {"message": message})


NUMBER_COLUMNS = ("value", "status", "source")  # last columns of every CSV of published numbers


def optional() -> Any:
    """Return a pydantic field for an optional key.

    The default is None. A run's spec omits the key if its value is None.
    """
    return Field(default=None, exclude_if=lambda value: value is None)


def optional_zero() -> Any:
    """Return a pydantic field for an optional number.

    The default is None. A run's spec omits the key if its value is None or 0.
    """
    return Field(default=None, exclude_if=lambda value: not value)


def _keep_integer(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    """Validate a number without converting int to float.

    1 and 1.0 would hash to different run ids.
    """
    check(value)  # its result would be a float
    return value


def _check_unique(values: list[Any]) -> list[Any]:
    """Refuse a list that has a value twice."""
    for number, value in enumerate(values):
        if value in values[:number]:
            raise refusal(f"{value!r} occurs twice")
    return values


def registered(names: Collection[str], beside: Collection[str] = ()) -> AfterValidator:
    """Return a validator that refuses names that are not registered.

    It looks up a name when a file is read, because plugins may have registered it by then.

    Args:
        names: The registered names.
        beside: Further valid names.
    """

    def check(name: str) -> str:
        # plugins may have added names since the model was defined
        if name not in names and name not in beside:
            raise refusal(f"there is no '{name}'{did_you_mean(name, [*beside, *names])}")
        return name

    return AfterValidator(check)


# types of values
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
        raise DefinitionError(f"{where}: {_describe_first_mistake(error, content, at)}") from error


def read(path: Path, model: type[Model]) -> Model:
    """Read a YAML file, and validate its content with a model.

    Raises:
        DefinitionError: The file cannot be read, or its content is wrong. The error names the file.
    """
    return parse(read_yaml(path), model, str(path))


def check_names(location: Location, names: Iterable[str], valid: Collection[str]) -> None:
    """Check the names that a file gives at one place.

    Args:
        location: The file, and the key of the names.
        names: The names to check.
        valid: The valid names.

    Raises:
        DefinitionError: A name is not valid. The error names the location and the nearest valid
            name.
    """
    for name in names:
        if name not in valid:
            near = did_you_mean(name, valid)
            raise DefinitionError(f"{location} is '{name[:100]}', which does not exist{near}")


def check_csv(location: Location, name: str, folder: Path, columns: Sequence[str] = ()) -> None:
    """Check that a CSV exists and is a table with the columns of published numbers.

    Args:
        location: The file that names the CSV, and the key of the name.
        name: The name of the CSV.
        folder: The folder of the CSV.
        columns: The columns before value, status and source. Empty if any columns are allowed.

    Raises:
        DefinitionError: The CSV does not exist, is not UTF-8 text, or has other columns or a row
            with another number of cells.
    """
    known = [str(path.relative_to(folder)) for path in folder.glob("**/*.csv")]
    check_names(location, [name], known)
    if not columns:
        return
    file = folder / name
    # spreadsheets begin a file with a byte order mark, which utf-8-sig drops
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            rows = list(csv.reader(lines))
    except (UnicodeDecodeError, csv.Error) as error:
        raise DefinitionError(f"{file} cannot be read as a csv in UTF-8: {error}") from error
    header = rows[0] if rows else []
    wanted = [*columns, *NUMBER_COLUMNS]
    if header != wanted:
        raise DefinitionError(f"{file}: the columns are {header}, but must be {wanted}")
    for number, row in enumerate(rows, start=1):
        # blank lines are left out when the numbers are read
        if row and len(row) != len(wanted):
            raise DefinitionError(
                f"{file}: line {number} has {len(row)} cells, but must have {len(wanted)}"
            )
