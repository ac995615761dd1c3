"""Paths, files, locks, seeds and errors for all other modules."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from emoe.errors import EMoEError

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
SCHEMAS = BENCHMARKS / "schemas"
CONFIG = ROOT / "config"
REFERENCE = ROOT / "results" / "reference"

# outputs, relative to the working directory
RESULTS = Path("results")
RUNS = RESULTS / "runs"
LOCK, LOG, WEIGHTS = ".lock", "log.txt", "model/trained.safetensors"  # in the folder of a run
PARTITIONS = Path("resources/partitions")
PACKAGES = Path("resources/packages")
MODELS = Path("resources/models")
IMAGES = Path("resources/images")
PREFIXES = Path("resources/prefixes")
QUESTIONS = Path("resources/questions")

# environment variables, set by the workflow from the configuration, or by hand
DATA_ROOT = "EMOE_DATA_ROOT"
MODEL_ROOT = "EMOE_MODEL_ROOT"
OVERRIDES = "EMOE_OVERRIDES"
TRACKING_URI = "MLFLOW_TRACKING_URI"

Model = TypeVar("Model")


class DefinitionError(EMoEError):
    """Raised if a configuration or benchmark file is wrong. Line breaks in the message become spaces."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class DataError(EMoEError):
    """Raised if data or weights are missing, damaged, or not as defined."""


class RunError(EMoEError):
    """Raised if a run cannot continue."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its name if it has none."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def first_problem(error: ValidationError) -> str:
    """Describe the first problem that pydantic found."""
    first = error.errors(include_url=False)[0]
    return f"'{'.'.join(map(str, first['loc'])) or 'the file'}': {first['msg']}"


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary file that replaces the path at the end, so that readers see the old file or the new one.

    The temporary name is unique on all machines. The content is flushed before the rename, to survive a power cut.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: object) -> None:
    """Write JSON atomically, lists of numbers on one line each."""
    text = json.dumps(content, indent=1, sort_keys=True, allow_nan=False)
    text = re.sub(r"\[\n[\s\d.,eE+-]*\]", lambda numbers: "".join(numbers[0].split()).replace(",", ", "), text)
    write_text(path, text + "\n")


def read_json(path: Path, model: type[Model], advice: str = "") -> Model:
    """Read a JSON file and validate its content.

    Args:
        path: The path of the file.
        model: The pydantic model of the content, or a type such as ``dict[str, float]``.
        advice: The end of the message of an error, such as "delete it".

    Raises:
        DataError: The file cannot be read, or its content does not fit the model; names file and key.
    """
    try:
        return TypeAdapter(model).validate_json(path.read_bytes())
    except OSError as error:
        problem = f"cannot be read: {error.strerror}"
    except ValidationError as error:
        problem = f"is damaged: {first_problem(error)}"
    raise DataError(f"{path} {problem}" + (f"; {advice}" if advice else ""))


def is_held(path: Path) -> bool:
    """Return True if a process holds a :class:`filelock.FileLock`; works in folders without write permission."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def git(root: Path, *arguments: str) -> str:
    """Return the output of git in a checkout.

    Raises:
        OSError: Git is not installed.
        CalledProcessError: The folder is not a checkout.
    """
    return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout.strip()


def derive_seed(*parts: object) -> int:
    """Hash named parts to a seed below 2**31, so that seeds of different uses are independent."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % 2**31


def hide_passwords(text: str) -> str:
    """Replace the passwords of URLs in a text by ``***``.

    >>> hide_passwords("postgresql://lab:secret@db/mlflow?sslmode=require")
    'postgresql://lab:***@db/mlflow?sslmode=require'
    >>> hide_passwords("https://lab.org?password=secret&team=a")
    'https://lab.org?password=***&team=a'
    """
    text = re.sub(r"(://[^:/@\s]*:)[^\s]*@", r"\1***@", text)
    return re.sub(r"(?i)(\b\w*(?:password|token|secret)=)[^&\s'\"]*", r"\1***", text)
