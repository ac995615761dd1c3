"""Finished runs in one file, to be put beside those of another machine.

A bundle is a zip: ``bundle.json`` and, for every run, ``<benchmark>/<run>/run.json``, ``metrics.json`` and ``log.txt``. ``bundle.json`` has the
sha256 of each. Weights are not in it. Nothing of a bundle is taken before all of it was read and found right.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from filelock import Timeout
from pydantic import Field, TypeAdapter, ValidationError

from benchmarks.harness.base.errors import DataError, DefinitionError
from benchmarks.harness.base.files import atomic_write, write_json
from benchmarks.harness.base.locks import hold
from benchmarks.harness.base.paths import LOCK, LOG, ORIGIN, RUNS
from benchmarks.harness.config.definition import load_benchmark
from benchmarks.harness.config.runs import Run, parse_run
from benchmarks.harness.config.schema import Strict, parse
from benchmarks.harness.results.records import parse_metrics, read_metrics_file, repeatable
from benchmarks.harness.sources.packages import sha256

_MANIFEST = "bundle.json"
# metrics.json comes last: where it is, a run is finished
_FILES = ("run.json", LOG, "metrics.json")
_NEEDED = ("run.json", "metrics.json")
_LARGEST = {"run.json": 1 << 24, LOG: 1 << 26, "metrics.json": 1 << 26, _MANIFEST: 1 << 26}  # bytes of one file
_LARGEST_OF_ALL = 1 << 33
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_UNREADABLE = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError, OSError)
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the same runs make the same bytes

Folder = Annotated[str, Field(max_length=160, pattern=r"^[a-z][a-z0-9_]*/[A-Za-z0-9._+-]+-[0-9a-f]{8}$")]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, Field(min_length=1, max_length=80, pattern=r"^[^\x00-\x1f\x7f]+$")]


class _Entry(Strict):
    origin: Name
    files: dict[Literal["run.json", "log.txt", "metrics.json"], Digest]


class _Manifest(Strict):
    version: Literal[1]
    runs: dict[Folder, _Entry]


@dataclass
class Merged:
    """What became of the runs of a bundle, by their folders."""

    added: list[str] = field(default_factory=list)
    there: list[str] = field(default_factory=list)
    """With the same numbers."""
    different: list[str] = field(default_factory=list)
    """There with other numbers, which were kept."""
    begun: list[str] = field(default_factory=list)
    """Being run here, or begun: their checkpoints or weights are of another training, so they are left alone."""


def write_bundle(file: Path, runs: Iterable[Run], name: str, *, logs: bool = True, root: Path = RUNS) -> int:
    """Pack finished runs.

    Args:
        file: the zip to write.
        runs: which; those that are not finished are left out.
        name: of who ran them, for those who read the tables. A run that came from elsewhere keeps the name that it came with.
        logs: pack what the runs said, too.
        root: the folder of the runs.

    Returns:
        How many runs are in it.

    Raises:
        DefinitionError: a run's file is damaged, or the name has control characters or more than 80 letters.
        DataError: none of the runs is finished.
    """
    try:
        TypeAdapter(Name).validate_python(name)
    except ValidationError as error:
        raise DefinitionError(f"the name {name!r} has to have 1 to 80 letters, and no control characters") from error
    finished = [run for run in runs if (root / run.folder / "metrics.json").exists()]
    if not finished:
        raise DataError("none of these runs is finished: there is nothing to pack")
    entries: dict[str, Any] = {}
    with atomic_write(file) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        for run in sorted(finished, key=lambda run: run.folder):
            folder = root / run.folder
            metrics = (folder / "metrics.json").read_bytes()
            parse_metrics(metrics, run, str(folder / "metrics.json"))
            packed: dict[str, str] = {}
            contents = {"run.json": (run.to_json() + "\n").encode()}
            if logs and (folder / LOG).exists():
                contents[LOG] = (folder / LOG).read_bytes()
            contents["metrics.json"] = metrics
            for part, content in contents.items():
                archive.writestr(zipfile.ZipInfo(f"{run.folder}/{part}", _EPOCH), content, zipfile.ZIP_DEFLATED)
                packed[part] = hashlib.sha256(content).hexdigest()
            entries[run.folder] = {"origin": origin_of(run.folder, root) or name, "files": packed}
        manifest = {"version": 1, "runs": entries}
        parse(manifest, _Manifest, str(file))
        archive.writestr(
            zipfile.ZipInfo(_MANIFEST, _EPOCH), json.dumps(manifest, indent=1, sort_keys=True), zipfile.ZIP_DEFLATED
        )
    return len(finished)


def merge_bundle(file: Path, root: Path = RUNS) -> Merged:
    """Put the runs of a bundle beside one's own. A run that is there keeps its numbers.

    Args:
        file: what :func:`write_bundle` wrote.
        root: the folder of the runs.

    Raises:
        DataError: it is no bundle, is damaged, or has files that none has.
        DefinitionError: a run in it is no run of this version of the suite, or its numbers are not what such a run records.
    """
    if not file.is_file():
        raise DataError(f"{file} does not exist")
    with _reading(file):
        opened = zipfile.ZipFile(file)
    with opened as archive:
        _check_sizes(archive, file)
        manifest = _manifest(archive, file)
        # all of it, before anything is taken
        runs = [_checked(archive, folder, entry, file) for folder, entry in manifest.runs.items()]
        return _take(archive, manifest, runs, file, root)


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    try:
        yield
    except _UNREADABLE as error:
        raise DataError(f"{file} is no bundle, or is damaged: {error}") from error


def origin_of(folder: str, root: Path = RUNS) -> str | None:
    """Who ran a finished run that was merged, given its folder; None for one that was run here."""
    file = root / folder / ORIGIN
    try:
        return str(json.loads(file.read_text())["name"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} is damaged ({error!r}); delete the run's folder and merge it again") from error


def _manifest(archive: zipfile.ZipFile, file: Path) -> _Manifest:
    if _MANIFEST not in archive.namelist():
        raise DataError(f"{file} is no bundle: it has no {_MANIFEST}; `python -m benchmarks bundle` writes one")
    try:
        content = json.loads(_read(archive, _MANIFEST))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: its {_MANIFEST} is damaged ({error})") from error
    manifest = parse(content, _Manifest, f"{file}, {_MANIFEST}")
    said = [f"{folder}/{part}" for folder, entry in manifest.runs.items() for part in entry.files]
    if odd := sorted({*archive.namelist()} ^ {*said, _MANIFEST}):
        raise DataError(f"{file}: its {_MANIFEST} and its files differ in '{odd[0]}'")
    for folder, entry in manifest.runs.items():
        if missing := [part for part in _NEEDED if part not in entry.files]:
            raise DataError(f"{file}: {folder} has no {missing[0]}")
    return manifest


def _check_sizes(archive: zipfile.ZipFile, file: Path) -> None:
    for member in archive.infolist():
        most = _LARGEST.get(member.filename.rpartition("/")[2], _LARGEST[LOG])
        if member.file_size > most or member.compress_type not in _METHODS:
            raise DataError(
                f"{file}: '{member.filename}' has {member.file_size:,} bytes, of {most:,} at most, or is compressed otherwise than bundles are"
            )
    if sum(member.file_size for member in archive.infolist()) > _LARGEST_OF_ALL:
        raise DataError(f"{file} unpacks to more than {_LARGEST_OF_ALL:,} bytes; pack fewer runs, or no logs")


def _read(archive: zipfile.ZipFile, name: str) -> bytes:
    with _reading(Path(str(archive.filename))):
        return archive.read(name)  # never more than the size that was checked


def _checked(archive: zipfile.ZipFile, folder: str, entry: _Entry, file: Path) -> Run:
    """A run whose files are those that the bundle names, and which is a finished run as it would be made here."""
    contents, where = dict(_contents(archive, folder, entry, file)), f"{file}: {folder}"
    run = parse_run(contents["run.json"], f"{where}/run.json")
    if run.folder != folder:
        raise DataError(f"{where} has the run.json of {run.folder}")
    parse_metrics(contents["metrics.json"], run, f"{where}/metrics.json")
    definition = load_benchmark(run.benchmark).definition
    for key, ours in (("version", definition.version), ("pipeline", definition.pipeline)):
        if run.spec[key] != ours:
            raise DefinitionError(f"{where} is of {key} {run.spec[key]!r} of its benchmark, which has {ours!r} here")
    return run


def _contents(archive: zipfile.ZipFile, folder: str, entry: _Entry, file: Path) -> Iterator[tuple[str, bytes]]:
    files = {str(part): digest for part, digest in entry.files.items()}
    for part in _FILES:
        if part in files:
            content = _read(archive, f"{folder}/{part}")
            if hashlib.sha256(content).hexdigest() != files[part]:
                raise DataError(f"{file}: '{folder}/{part}' is not what was packed: its sha256 differs")
            yield part, content


def _take(archive: zipfile.ZipFile, manifest: _Manifest, runs: Iterable[Run], file: Path, root: Path) -> Merged:
    merged, new = Merged(), list[str]()
    for run in runs:  # before anything is written: one's own files may be damaged
        ours = root / run.folder / "metrics.json"
        if ours.exists():
            theirs = json.loads(_read(archive, f"{run.folder}/metrics.json"))
            same = repeatable(read_metrics_file(ours, run)) == repeatable(theirs)
            (merged.there if same else merged.different).append(run.folder)
        elif any((ours.parent / name).exists() for name in ("model", "checkpoints")):
            merged.begun.append(run.folder)
        else:
            new.append(run.folder)
    digest, now = sha256(file), datetime.now(UTC).isoformat(timespec="seconds")
    for folder in new:
        place, entry = root / folder, manifest.runs[folder]
        place.mkdir(parents=True, exist_ok=True)
        try:
            with hold(place / LOCK, blocking=False):
                write_json(place / ORIGIN, {"name": entry.origin, "bundle": digest, "merged": now})
                for part, content in _contents(archive, folder, entry, file):
                    with atomic_write(place / part) as temporary:
                        temporary.write_bytes(content)
                merged.added.append(folder)
        except Timeout:
            merged.begun.append(folder)
    return merged
