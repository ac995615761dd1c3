"""Run the workflow in a copy of the working tree, as a user does."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from benchmarks.harness.sources.packages import find_package
from tests.conftest import ROOT

SNAKEMAKE = Path(sys.executable).with_name("snakemake")


class Checkout:
    """Copy the working tree and run commands in the copy."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            check=True,
        )
        # a zero byte ends each name, so the last name is empty
        names = listed.stdout.decode().split("\0")
        for name in names[:-1]:
            source = ROOT / name
            target = folder / name
            # git still lists files that were deleted
            if source.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, target)

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "PYTHONPATH": str(self.folder)}

    def put(self, archive: Path) -> None:
        """Put the sentences into the folder of downloads."""
        path = self.folder / find_package("vaderSentiment").path
        path.parent.mkdir(parents=True)
        shutil.copy2(archive, path)

    def start(self, *command: object, stream: IO[str]) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [str(word) for word in command],
            cwd=self.folder,
            env=self.environment,
            stdout=stream,
            stderr=stream,
            text=True,
        )

    def run(self, *command: object, check: bool = True) -> subprocess.CompletedProcess[str]:
        result = subprocess.run(
            [str(word) for word in command],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if check:
            assert result.returncode == 0, result.stdout + result.stderr
        return result

    def snakemake(self, *words: object, check: bool = True) -> str:
        result = self.run(SNAKEMAKE, "--cores", 2, *words, check=check)
        return result.stdout + result.stderr

    def edit(self, file: str, old: str, new: str) -> None:
        path = self.folder / file
        text = path.read_text()
        assert text.count(old) >= 1
        path.write_text(text.replace(old, new))


def wait_for(condition: Callable[[], object], seconds: float = 120) -> None:
    """Wait until the condition holds; fail if it does not in time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition did not hold in time"
        time.sleep(0.05)


def seconds_of_children() -> float:
    """Return the processor seconds of all finished child processes; other work does not count."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
