"""Paths, files, locks, seeds and errors for all other modules."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import subprocess
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from emoe.errors import EMoEError, did_you_mean

if TYPE_CHECKING:
    from yaml import SafeLoader
else:  # libyaml (in PyYAML's wheels) saves half a second per command
    SafeLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

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


_DAY = 24 * 60 * 60


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary file that replaces the path at the end, so that readers see the old file or the new one.

    The temporary name is unique on all machines. The content is flushed before the rename, to survive a power cut.

    Raises:
        OSError: The file cannot be written; names the path.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        if error.filename is not None:
            raise
        # a full disk fails a write, and the system then names no file
        raise OSError(
            error.errno or errno.EIO, error.strerror or first_line(error), str(path)
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _remove_leftovers(path: Path) -> None:
    """Remove temporary files of a path that no writer has changed for a day: a killed writer leaves its file."""
    yesterday = time.time() - _DAY
    name = re.compile(re.escape(f".{path.name}.") + "[0-9a-f]{32}")
    leftovers = [file for file in path.parent.iterdir() if name.fullmatch(file.name)]
    for leftover in leftovers:
        try:
            changed = leftover.stat().st_mtime
        except FileNotFoundError:  # its writer has finished
            continue
        if changed < yesterday:
            leftover.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: object) -> None:
    """Write JSON atomically; see :func:`format_json`."""
    write_text(path, format_json(content))


def format_json(content: object) -> str:
    """Format JSON with sorted keys, and lists of numbers on one line each."""
    text = json.dumps(content, indent=1, sort_keys=True, allow_nan=False)
    text = re.sub(
        r"\[\n[\s\d.,eE+-]*\]", lambda numbers: "".join(numbers[0].split()).replace(",", ", "), text
    )
    return text + "\n"


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write lines of text atomically, one after the other."""
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for line in lines:
            file.write(line + "\n")


def read_bytes(path: Path, advice: str = "") -> bytes:
    """Read a file.

    Args:
        path: The path of the file.
        advice: What the user should do, such as "delete it"; the end of the message of an error.

    Raises:
        DataError: The file cannot be read.
    """
    try:
        check_is_file(path)
        return path.read_bytes()
    except OSError as error:
        raise DataError(_with_advice(f"{path} cannot be read: {error.strerror}", advice)) from None


def read_json(path: Path, model: type[Model], advice: str = "") -> Model:
    """Read a JSON file and validate its content.

    Args:
        path: The path of the file.
        model: The pydantic model of the content, or a type such as ``dict[str, float]``.
        advice: What the user should do, such as "delete it"; the end of the message of an error.

    Raises:
        DataError: The file cannot be read, or its content does not fit the model; names file and key.
    """
    content = read_bytes(path, advice)
    try:
        return TypeAdapter(model).validate_json(content)
    except ValidationError as error:
        raise DataError(
            _with_advice(f"{path} is damaged: {first_problem(error)}", advice)
        ) from None


def _with_advice(problem: str, advice: str) -> str:
    return f"{problem}; {advice}" if advice else problem


def check_is_file(path: Path) -> None:
    """Raise an :class:`OSError` if a path exists but is not a file: opening a named pipe would wait for ever."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is not a file", str(path))


class _Loader(SafeLoader):
    """Load safe YAML with ``5e-5`` as a number. A duplicate key is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        given = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        names = [self.construct_object(key, deep=True) for key in given]
        for key, name in zip(given, names, strict=True):
            if names.count(name) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{name}' is given twice", key.start_mark
                )
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+[eE][-+]?\d+$"), list("-+0123456789")
)


def read_yaml(path: Path) -> Any:
    """Parse one YAML file, which may have no tags.

    Raises:
        DefinitionError: The file cannot be read, or is not valid YAML; names the file.
    """
    try:
        check_is_file(path)
        text = path.read_text(encoding="utf-8")
        events: Iterable[Any] = yaml.parse(text, SafeLoader)
        for event in events:
            if getattr(event, "tag", None):
                raise yaml.MarkedYAMLError(
                    problem=f"the tag '{event.tag}' is not allowed", problem_mark=event.start_mark
                )
        return yaml.load(text, _Loader)  # noqa: S506  (a SafeLoader)
    except FileNotFoundError as error:
        near = did_you_mean(path.name, sorted(file.name for file in path.parent.glob("*.yaml")))
        raise DefinitionError(f"{path}: {error.strerror}{near}") from error
    except OSError as error:
        raise DefinitionError(f"{path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # such as an impossible date
        problem = str(error).replace('in "<unicode string>", ', "at ")
        raise DefinitionError(f"{path} is not valid YAML: {problem}") from error


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
    return subprocess.run(
        ["git", *arguments], cwd=root, capture_output=True, text=True, check=True
    ).stdout.strip()


def derive_seed(*parts: object) -> int:
    """Hash named parts to a seed below 2**31, so that seeds of different uses are independent."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % 2**31


# keys of a query or of a database's connection text whose value is secret
_SECRETS = r"(?:password|passwd|pwd|pw|token|secret|api[_-]?key)"


def hide_passwords(text: str) -> str:
    """Replace the passwords and tokens of URLs in a text by ``***``.

    A password may have any character: what could be part of one is hidden. If the text begins with a URL, all of it
    is one URL.

    >>> hide_passwords("postgresql://lab:secret@db/mlflow?sslmode=require")
    'postgresql://lab:***@db/mlflow?sslmode=require'
    >>> hide_passwords("the store is postgresql://lab:my @ secret@db/mlflow")
    'the store is postgresql://lab:***@db/mlflow'
    >>> hide_passwords("https://lab.org?password=my secret&team=a")
    'https://lab.org?password=***&team=a'
    >>> hide_passwords("https://token@lab.org:5000/api_key=1/a@b")
    'https://***@lab.org:5000/api_key=***'
    >>> hide_passwords("no connection: host=db passwd='my secret' user=lab")
    'no connection: host=db passwd=*** user=lab'
    >>> hide_passwords("see http://lab.org:5000 and sqlite:///results/mlflow.db")
    'see http://lab.org:5000 and sqlite:///results/mlflow.db'
    """
    # up to the last "@" before another URL, because a password may have an "@" and a blank
    text = re.sub(r"(://[^:/@\s]*:)(?:(?!://).)*@", r"\1***@", text)
    # a name without a password is a token on a web server, but a user of a database
    text = re.sub(r"(?i)(https?://)[^:/?#@\s]+@", r"\1***@", text)
    is_url = re.match(r"[\w+.-]+://", text) is not None
    unquoted = "[^&]*" if is_url else r"[^&\s'\"]*"
    value = f"""(?:'[^']*'|"[^"]*"|{unquoted})"""
    return re.sub(rf"(?i)(\b\w*{_SECRETS}=){value}", r"\1***", text)
