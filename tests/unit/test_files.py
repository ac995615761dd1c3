"""Test atomic writes, readers of damaged files, hidden passwords, and locks."""

from __future__ import annotations

import errno
import json
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from filelock import FileLock
from pydantic import BaseModel

from benchmarks.harness.base import (
    DataError,
    DefinitionError,
    atomic_write,
    first_line,
    hide_passwords,
    is_held,
    read_json,
    read_yaml,
    write_json,
    write_text,
)
from benchmarks.harness.sources.packages import PackageFile, read_packages
from tests.checkout import wait_for
from tests.forked import start as start_fork


class Receipt(BaseModel):
    """What a file of these tests must hold."""

    rows: int


DAMAGE = {
    "invalid UTF-8": b'{"rows": "\xff"}',
    "truncated": b'{"rows": ',
    "a missing key": b"{}",
}


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    write_json(path, {"loss": 0.5})
    with suppress(ZeroDivisionError), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"loss": float("nan")})
    assert json.loads(path.read_text()) == {"loss": 0.5}
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_names_the_file_that_was_to_be_written(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    with pytest.raises(OSError, match="No space left on device") as full, atomic_write(path):
        Path("/dev/full").write_text("rows")
    assert full.value.errno == errno.ENOSPC
    assert full.value.filename == str(path)
    # a library's own error has no number
    with pytest.raises(OSError, match=r"encoder error.*table\.csv"), atomic_write(path):
        raise OSError("encoder error")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("no such set\nand more", "no such set"),
        # as transformers writes it if a package is missing
        ("\nT5Tokenizer requires SentencePiece\nand more", "T5Tokenizer requires SentencePiece"),
        ("", "OSError"),
        ("\n \n", "OSError"),
    ],
)
def test_an_error_is_described_by_its_first_line_with_text(message: str, line: str) -> None:
    assert first_line(OSError(message)) == line


def test_files_of_killed_writers_are_removed_after_a_day(tmp_path: Path) -> None:
    path = tmp_path / "forest[1].pdf"
    # a writer's temporary file has the name of its file and 32 random digits
    old = tmp_path / f".forest[1].pdf.{'0a' * 16}"
    new = tmp_path / f".forest[1].pdf.{'1b' * 16}"
    of_another_file = tmp_path / f".forest.pdf.{'0a' * 16}"
    for file in (old, new, of_another_file):
        file.touch()
    more_than_a_day_ago = time.time() - 90_000
    for file in (old, of_another_file):
        os.utime(file, (more_than_a_day_ago, more_than_a_day_ago))
    write_text(path, "whole")
    assert set(tmp_path.iterdir()) == {path, new, of_another_file}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("mysql://lab:my secret@db/mlflow", "mysql://lab:***@db/mlflow"),
        ("postgresql://lab:a@b:c/d@db", "postgresql://lab:***@db"),
        ("postgresql://lab:p@ss://w@h/db", "postgresql://lab:***@h/db"),
        (
            "failed: postgresql://lab:p@ss://w@h/db and sqlite:///a@b",
            "failed: postgresql://lab:***@h/db and sqlite:///a@b",
        ),
        ("https://SECRET@lab.org/mlflow", "https://***@lab.org/mlflow"),
        ("postgresql://lab@db/mlflow", "postgresql://lab@db/mlflow"),
        (
            "https://lab.org?passwd=a&pwd=b&pw=c&api_key=d&team=e",
            "https://lab.org?passwd=***&pwd=***&pw=***&api_key=***&team=e",
        ),
        (
            "failed: postgresql://lab:a@db, then postgresql://lab:a@db",
            "failed: postgresql://lab:***@db, then postgresql://lab:***@db",
        ),
        ("host=db password='two words' user=lab", "host=db password=*** user=lab"),
    ],
)
def test_passwords_and_tokens_are_hidden(text: str, shown: str) -> None:
    assert hide_passwords(text) == shown


def make_pipe(path: Path) -> None:
    """Make a named pipe, on which a reader would wait for ever."""
    os.mkfifo(path)


@pytest.mark.parametrize("make", [make_pipe, Path.mkdir], ids=["a named pipe", "a folder"])
def test_what_is_not_a_file_is_one_line_without_a_wait(
    make: Callable[[Path], None], here: Path
) -> None:
    package = PackageFile("wheel", "demo", "1.0", "0" * 64)
    package.path.parent.mkdir(parents=True)
    for path in (here / "metrics.json", here / "mini.yaml", package.path):
        make(path)
    with pytest.raises(
        DataError, match=r"metrics\.json cannot be read: it is not a file; delete it$"
    ):
        read_json(here / "metrics.json", Receipt, "delete it")
    with pytest.raises(DefinitionError, match=r"mini\.yaml cannot be read: it is not a file$"):
        read_yaml(here / "mini.yaml")
    with pytest.raises(
        DataError, match=rf"{package.name} is not a file; delete it and .*fetch {package.name}`$"
    ):
        package.check()


def test_a_damaged_package_file_names_the_command_that_fetches_it_again(here: Path) -> None:
    package = PackageFile("wheel", "demo", "1.0", "0" * 64)
    package.path.parent.mkdir(parents=True)
    package.path.write_bytes(b"half")
    way_out = rf"delete it and fetch it again: `python -m benchmarks fetch {package.name}`$"
    with pytest.raises(
        DataError, match=rf"{package.path} is damaged or another version: .*; {way_out}"
    ):
        package.check()


@pytest.mark.parametrize("content", [*DAMAGE.values(), None], ids=[*DAMAGE, "a folder"])
def test_a_damaged_file_is_one_line_that_names_it(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "receipt.json"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    with pytest.raises(DataError) as error:
        read_json(path, Receipt, "delete it")
    assert str(error.value).startswith(f"{path} ")
    assert str(error.value).endswith("; delete it")
    assert "\n" not in str(error.value)


def hold_for_ever(file: Path) -> None:
    """Hold a lock until this process is killed. Write the file `holds` once it is held."""
    with FileLock(file):
        file.with_name("holds").touch()
        time.sleep(600)


def test_a_lock_is_held_by_one_process_until_it_ends(tmp_path: Path) -> None:
    file = tmp_path / ".lock"
    assert not is_held(file)
    with FileLock(file):
        assert is_held(file)
    assert not is_held(file)
    other = start_fork(hold_for_ever, file)
    wait_for(file.with_name("holds").exists, 60)
    assert is_held(file)
    assert other.pid
    os.kill(other.pid, signal.SIGKILL)
    other.join()
    assert not is_held(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "demo: {kind: wheel, version: 1.0, sha256: x}",
            "'demo.version': Input should be a valid string",
        ),
        (
            "demo: {kind: egg, version: '1', sha256: x}",
            "'demo.kind': Input should be 'sdist' or 'wheel'",
        ),
        ("demo: {kind: wheel, version: '1', sha256: x}", "'demo.sha256': String should match"),
        ("demo: {kind: wheel, version: '1', sha: x}", "'demo.sha256': Field required"),
        ("demo: 3", "'demo': Input should be"),
        ("[demo]", "'the file': Input should be a valid dictionary"),
        ("", "'the file': Input should be a valid dictionary"),
        ("3: {}", "'3.*': Input should be a valid string"),
    ],
)
def test_a_mistake_in_the_list_of_packages_is_one_line(
    content: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "packages.yaml"
    path.write_text(content)
    with pytest.raises(DefinitionError, match=message) as error:
        read_packages(path)
    assert str(error.value).startswith(f"{path}: ")
    assert str(error.value).endswith(
        "a package has the keys kind (sdist or wheel), version and sha256"
    )
    assert "\n" not in str(error.value)
