"""Remove the lock of a Snakemake that was killed; refuse if a run is active in this folder."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

from benchmarks.harness.base import DataError, read_json


def active_process(folder: Path) -> int | None:
    """Return the process id of a Snakemake whose working directory is ``folder``."""
    for process in psutil.process_iter():
        try:
            if any(Path(word).name == "snakemake" for word in process.cmdline()[:3]) and Path(process.cwd()) == folder:
                return process.pid
        except psutil.Error:  # it has ended, or is another user's
            continue
    return None


def last_host(folder: Path) -> object:
    """Return the machine that began the newest run in ``folder``, or None if its plan is missing or damaged."""
    plans = sorted(folder.glob("results/*/plan.json"), key=lambda path: path.stat().st_mtime)
    try:
        return read_json(plans[-1], dict[str, Any]).get("host") if plans else None
    except DataError:
        return None


def main() -> None:
    """Unlock the current folder if no run is active."""
    folder = Path.cwd()
    # before Snakemake has planned its jobs it holds no lock
    if process := active_process(folder):
        sys.exit(f"error: another run is active in this folder (process {process}); wait for it, or stop it")
    if not any((folder / ".snakemake" / "locks").glob("*")):
        return
    host = last_host(folder)
    if host not in (None, platform.node()):
        sys.exit(
            f"error: {host} worked in this folder last, and its processes are not visible from here. "
            "If its Snakemake has ended: snakemake --unlock"
        )
    sys.stderr.write("The last run was killed and left its lock; removing it. Finished runs are kept.\n")
    command = [Path(sys.executable).with_name("snakemake"), "--unlock", "--quiet", "all"]
    sys.exit(subprocess.run(command, check=False).returncode)


if __name__ == "__main__":
    main()
