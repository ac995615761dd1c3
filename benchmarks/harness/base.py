"""Paths, files, locks, seeds and errors for all other modules."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import subprocess
import sys
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
# the trained tensors, in a checkpoint and in the folder of a trained model
TRAINED_FILE = "trained.safetensors"
# in the folder of a run
LOCK = ".lock"
LOG = "log.txt"
WEIGHTS = f"model/{TRAINED_FILE}"
# shared by all runs
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
    """Raised if a configuration or benchmark file is wrong, or if a command cannot start.

    A command cannot start, for example, if no run is finished or no numbers are blessed. Line
    breaks in the message become spaces.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class DataError(EMoEError):
    """Raised if data or weights are missing, damaged, or not as defined."""


class RunError(EMoEError):
    """Raised if a run, or another job such as the mirror to MLflow, cannot start or continue."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message that is not blank.

    If there is no such line, return the name of the error's class.
    """
    for line in str(error).splitlines():
        if line.strip():
            return line
    return type(error).__name__


def first_problem(error: ValidationError) -> str:
    """Describe the first problem that pydantic found: the key and pydantic's message.

    The key of a problem of the whole file is "the file".
    """
    first = error.errors(include_url=False)[0]
    key = _join_keys(first["loc"]) or "the file"
    return f"'{key}': {first['msg']}"


def first_problem_in_row(error: ValidationError) -> str:
    """Describe the first problem of one row of a file, like :func:`first_problem`.

    A problem of the whole row is described without a key, because it is not one of the file.
    """
    first = error.errors(include_url=False)[0]
    key = _join_keys(first["loc"])
    if not key:
        return first["msg"]
    return f"'{key}': {first['msg']}"


def _join_keys(keys: Iterable[str | int]) -> str:
    """Join the keys that lead to a value: "cost.seconds"; empty for the whole content."""
    return ".".join(str(key) for key in keys)


def with_noun(count: int, noun: str) -> str:
    """Format a count with its noun, such as ``1 seed`` or ``5 seeds``."""
    if count == 1:
        return f"{count} {noun}"
    return f"{count} {noun}s"


def distinct(texts: Iterable[str]) -> list[str]:
    """Return the distinct texts in order of first occurrence."""
    return list(dict.fromkeys(texts))


_SECONDS_OF_A_DAY = 24 * 60 * 60
_UUID = re.compile("[0-9a-f]{32}")


def print_warning(text: str) -> None:
    """Print a warning to standard error, which is the log during a run."""
    sys.stderr.write(f"warning: {text}\n")


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield the path of a temporary file to write. It replaces ``path`` when the block ends.

    After an error in the block, the old file stays. Readers see the old file or the new one, never
    half of one. The temporary name is unique on all machines. The content is flushed to disk before
    the rename, to survive a power cut.

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
        number = error.errno or errno.EIO
        problem = error.strerror or first_line(error)
        raise OSError(number, problem, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def _remove_leftovers(path: Path) -> None:
    """Remove the temporary files that killed writers of ``path`` have left.

    Only files older than a day are removed, because another writer may still need a newer one.
    """
    yesterday = time.time() - _SECONDS_OF_A_DAY
    for file in path.parent.iterdir():
        # atomic_write names temporary files ".<name of the path>.<uuid>"
        start, _, end = file.name.rpartition(".")
        if start != f".{path.name}" or not _UUID.fullmatch(end):
            continue
        try:
            last_change = file.stat().st_mtime
        except FileNotFoundError:  # its writer has finished since
            continue
        if last_change < yesterday:
            file.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: object) -> None:
    """Write JSON atomically, with sorted keys and each list of numbers on one line."""
    write_text(path, format_json(content))


def format_json(content: object) -> str:
    """Format JSON with sorted keys. Each list of numbers takes one line."""
    text = json.dumps(content, indent=1, sort_keys=True, allow_nan=False)
    compact = _NUMBER_LIST.sub(_join_number_list, text)
    return compact + "\n"


# matches a list of numbers in JSON with one item on each line, such as "[\n 1,\n 2.5e-05\n]"
_NUMBER_LIST = re.compile(r"\[\n[\s\d.,eE+-]*\]")


def _join_number_list(found: re.Match[str]) -> str:
    """Write the found list of numbers on one line."""
    without_blanks = "".join(found[0].split())
    return without_blanks.replace(",", ", ")


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write lines of text atomically, one after the other."""
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for line in lines:
            file.write(line + "\n")


def read_bytes(path: Path, advice: str = "") -> bytes:
    """Read a file.

    Args:
        path: The path of the file.
        advice: What the user should do, such as "delete it". It ends the error message.

    Raises:
        DataError: The file cannot be read.
    """
    try:
        check_is_file(path)
        return path.read_bytes()
    except OSError as error:
        problem = f"{path} cannot be read: {error.strerror}"
        raise DataError(_with_advice(problem, advice)) from None


def read_text(path: Path, advice: str = "") -> str:
    """Read a file as UTF-8.

    Args:
        path: The path of the file.
        advice: What the user should do, such as "delete it". It ends the error message.

    Raises:
        DataError: The file cannot be read, or is not UTF-8.
    """
    content = read_bytes(path, advice)
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        problem = f"{path} is damaged: {first_line(error)}"
        raise DataError(_with_advice(problem, advice)) from None


def read_json(path: Path, model: type[Model], advice: str = "") -> Model:
    """Read a JSON file and validate its content.

    Args:
        path: The path of the file.
        model: The pydantic model of the content, or a type such as ``dict[str, float]``.
        advice: What the user should do, such as "delete it". It ends the error message.

    Raises:
        DataError: The file cannot be read, or its content does not fit the model. The error names
            file and key.
    """
    content = read_bytes(path, advice)
    try:
        return TypeAdapter(model).validate_json(content)
    except ValidationError as error:
        problem = f"{path} is damaged: {first_problem(error)}"
        raise DataError(_with_advice(problem, advice)) from None


def _with_advice(problem: str, advice: str) -> str:
    """Append the advice, if any, to a problem."""
    return f"{problem}; {advice}" if advice else problem


def check_is_file(path: Path) -> None:
    """Raise an :class:`OSError` if a path exists but is not a file.

    For example, opening a named pipe would wait for ever.
    """
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is not a file", str(path))


_MERGE_TAG = "tag:yaml.org,2002:merge"
_FLOAT_TAG = "tag:yaml.org,2002:float"
_FLOAT_WITHOUT_POINT = re.compile(r"[-+]?\d+[eE][-+]?\d+$")


class _Loader(SafeLoader):
    """A loader of safe YAML that reads ``5e-5`` as a number and refuses duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Make a dictionary from a YAML mapping, and refuse a key that occurs twice."""
        # leave out the key "<<", which inserts another mapping and may occur several times
        key_nodes = [key for key, _ in node.value if key.tag != _MERGE_TAG]
        names = [self.construct_object(key, deep=True) for key in key_nodes]
        for key_node, name in zip(key_nodes, names, strict=True):
            if names.count(name) > 1:
                raise yaml.constructor.ConstructorError(
                    problem=f"the key '{name}' is given twice", problem_mark=key_node.start_mark
                )
        return super().construct_mapping(node, deep)


# PyYAML follows YAML 1.1, in which 5e-5 is a text because it has no point
_Loader.add_implicit_resolver(_FLOAT_TAG, _FLOAT_WITHOUT_POINT, list("-+0123456789"))


def read_yaml(path: Path) -> Any:
    """Parse one YAML file, which must not contain tags such as ``!!set``.

    Raises:
        DefinitionError: The file cannot be read, or is not valid YAML; names the file.
    """
    try:
        check_is_file(path)
        text = path.read_text(encoding="utf-8")
        _refuse_tags(text)
        return yaml.load(text, _Loader)  # noqa: S506  (a SafeLoader)
    except FileNotFoundError as error:
        files_there = sorted(file.name for file in path.parent.glob("*.yaml"))
        near = did_you_mean(path.name, files_there)
        raise DefinitionError(f"{path}: {error.strerror}{near}") from error
    except OSError as error:
        raise DefinitionError(f"{path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # such as an impossible date
        # the parser got a text, so it names no file: `in "<unicode string>", line 3`
        problem = str(error).replace('in "<unicode string>", ', "at ")
        raise DefinitionError(f"{path} is not valid YAML: {problem}") from error


def _refuse_tags(text: str) -> None:
    """Refuse YAML with a tag such as ``!!set``.

    A tag could make a value of a type that no YAML file of the suite needs.
    """
    events: Iterable[Any] = yaml.parse(text, SafeLoader)
    for event in events:
        if getattr(event, "tag", None):
            raise yaml.MarkedYAMLError(
                problem=f"the tag '{event.tag}' is not allowed", problem_mark=event.start_mark
            )


def is_held(path: Path) -> bool:
    """Return True if a process holds the :class:`filelock.FileLock` of this file.

    The check needs no write permission for the folder.
    """
    try:
        # a shared lock that does not wait fails only if another process has the exclusive one
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
    command = ["git", *arguments]
    finished = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    return finished.stdout.strip()


def short_digest(text: str, digits: int) -> str:
    """Return the first hex digits of the sha256 of a text.

    Args:
        text: The text.
        digits: The number of hex digits.
    """
    return hashlib.sha256(text.encode()).hexdigest()[:digits]


def derive_seed(*parts: object) -> int:
    """Derive a seed below 2**31 from values, such as the name of a purpose and a run's seed.

    Different values give independent seeds.
    """
    text = "\x1f".join(str(part) for part in parts)  # a separator that occurs in no part
    digest = hashlib.sha256(text.encode()).digest()
    number = int.from_bytes(digest[:4], "big")
    return number % 2**31


# Matches "://user:password@". A password may contain "@", "://" and blanks, so the match ends at
# the last "@" before the next URL. The next URL follows a blank.
_PASSWORD_OF_USER = re.compile(r"(://[^:/@\s]*:)(?:(?!\s\S*://).)*@")
# Matches "https://token@". A name without a password is a token only in the URL of a web server. In
# the URL of a database, it is the name of a user.
_TOKEN_OF_USER = re.compile(r"(?i)(https?://)[^:/?#@\s]+@")
# matches a key whose value is secret, such as "password=" in the query of a URL, or "passwd=" in a
# text that describes the connection to a database
_HIDDEN_KEY = r"\b\w*(?:password|passwd|pwd|pw|token|secret|api[_-]?key)="
_QUOTED = r"""'[^']*'|"[^"]*"|"""
# an unquoted value ends at "&"; in a text of several words also at a blank or quotation mark
_SECRET_IN_URL = re.compile(rf"(?i)({_HIDDEN_KEY})(?:{_QUOTED}[^&]*)")
_SECRET_IN_TEXT = re.compile(rf"(?i)({_HIDDEN_KEY})(?:{_QUOTED}[^&\s'\"]*)")


def hide_passwords(text: str) -> str:
    """Replace passwords and tokens in a text, such as those of URLs, by ``***``.

    A password may contain any character, so everything that could be a part of one is hidden. A
    text that begins with a URL is treated as a single URL.

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
    without_passwords = _PASSWORD_OF_USER.sub(r"\1***@", text)
    without_tokens = _TOKEN_OF_USER.sub(r"\1***@", without_passwords)
    # a secret value in a URL may contain blanks
    is_url = re.match(r"[\w+.-]+://", text) is not None
    key_and_secret = _SECRET_IN_URL if is_url else _SECRET_IN_TEXT
    return key_and_secret.sub(r"\1***", without_tokens)
