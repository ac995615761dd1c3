"""Files that ship inside packages of the package index: fetched once, checked by sha256."""

from __future__ import annotations

import hashlib
import importlib.metadata
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from benchmarks.harness.files import whole_file
from emoe.errors import EMoEError


class DataError(EMoEError):
    """Data or weights that are missing, damaged, or not what the definition says."""


def sha256(path: Path) -> str:
    """Checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch_sdist(name: str, version: str, checksum: str, output: Path) -> None:
    """Download a source distribution with pip and put it at ``output``, checked.

    Raises:
        DataError: pip could not get it, or the file is not the expected one.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--no-binary", ":all:", "--dest", folder, f"{name}=={version}"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        files = list(Path(folder).glob("*.tar.gz"))
        if result.returncode or len(files) != 1:
            raise DataError(
                f"could not download the source package {name}=={version}: {result.stderr.strip()[-500:]}\n"
                f"Put it at {output} by hand (sha256 {checksum}) to go on without a network"
            )
        check_file(files[0], checksum)
        with whole_file(output) as temporary:
            temporary.write_bytes(files[0].read_bytes())


def check_file(path: Path, checksum: str) -> None:
    """Raise :class:`DataError` unless the file has that sha256."""
    if not path.exists():
        raise DataError(f"{path} does not exist")
    found = sha256(path)
    if found != checksum:
        raise DataError(f"{path} is damaged or another version: sha256 {found}, expected {checksum}")


def package_folder(package: str, path: str, checksums: Mapping[str, str]) -> Path:
    """A folder inside an installed distribution, its files checked.

    Raises:
        DataError: not installed, or a file is not the expected one.
    """
    try:
        folder = Path(str(importlib.metadata.distribution(package).locate_file(path)))
    except importlib.metadata.PackageNotFoundError as error:
        raise DataError(f"the package '{package}' is not installed; `pip install {package}` or `make setup`") from error
    for name, checksum in checksums.items():
        check_file(folder / name, checksum)
    return folder
