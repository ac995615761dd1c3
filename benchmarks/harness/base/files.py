"""Write files so that nobody ever reads a part of one."""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json

from benchmarks.harness.base.errors import DataError

Model = TypeVar("Model")


def share(path: Path) -> None:
    """Give a file the permissions that the umask allows. SQLite and safetensors let only the owner read."""
    os.umask(umask := os.umask(0))  # the only way to read it
    path.chmod(0o666 & ~umask)


def _sync(path: Path) -> None:
    """Flush a file to the disk, so that it is complete after a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A place to write to, which takes the path's place at the end: a reader sees the old file or the new one, after a power cut too.

    Its name is unique, also among processes on other machines that share the folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        yield temporary
        share(temporary)
        _sync(temporary)
        temporary.replace(path)
    except OSError as error:
        if error.filename in (None, str(temporary)):  # a full disk names no file
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text, all of it or nothing."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: object) -> None:
    """Write JSON, all of it or nothing."""
    text = json.dumps(content, indent=1, sort_keys=True, allow_nan=False)
    # a list of numbers on one line
    text = re.sub(r"\[\n[\s\d.,eE+-]*\]", lambda found: "".join(found[0].split()).replace(",", ", "), text)
    write_text(path, text + "\n")


def read_json(path: Path, model: type[Model], advice: str = "") -> Model:
    """Read a JSON file and validate its content.

    Args:
        path: The path of the file.
        model: The pydantic model of the content, or a type such as ``dict[str, float]``.
        advice: The end of the message of an error, such as "delete it".

    Raises:
        DataError: The file is missing, unreadable, no JSON, or its content does not fit the model. Names file and key.
    """
    try:
        return TypeAdapter(model).validate_python(from_json(path.read_bytes(), allow_inf_nan=False))
    except OSError as error:
        problem = f"cannot be read: {error.strerror}"
    except ValidationError as error:
        problem = f"is damaged: {first_problem(error)}"
    except ValueError as error:
        problem = f"is damaged: {error}"
    raise DataError(f"{path} {problem}" + (f"; {advice}" if advice else ""))


def first_problem(error: ValidationError) -> str:
    """Describe the first problem that pydantic has with a content."""
    first = error.errors(include_url=False)[0]
    return f"'{'.'.join(map(str, first['loc'])) or 'the file'}': {first['msg']}"
