"""Remove the lock of a Snakemake that was killed; refuse where one is still at work in this folder."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path

import psutil


def working_here(folder: Path) -> list[int]:
    """Process ids of Snakemake main processes whose working directory is ``folder``."""
    found = []
    for process in psutil.process_iter():
        try:
            if any(Path(word).name == "snakemake" for word in process.cmdline()[:3]) and Path(process.cwd()) == folder:
                found.append(process.pid)
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
    return found


def last_host(folder: Path) -> str | None:
    """The machine that began the newest work in ``folder``; None where nobody says."""
    plans = sorted(folder.glob("results/*/plan.json"), key=lambda path: path.stat().st_mtime)
    try:
        return str(json.loads(plans[-1].read_text())["host"]) if plans else None
    except (ValueError, LookupError, TypeError):  # damaged, or of an older version
        return None


def main() -> None:
    """Unlock the current folder if nobody works in it."""
    folder = Path.cwd()
    if not any((folder / ".snakemake" / "locks").glob("*")):
        return
    if alive := working_here(folder):
        sys.exit(f"error: another snakemake (process {alive[0]}) works in this folder; wait for it or stop it first")
    host = last_host(folder)
    if host not in (None, platform.node()):
        sys.exit(
            f"error: {host} worked in this folder last, and its processes are not seen from here. Where snakemake has ended there: snakemake --unlock"
        )
    sys.stderr.write(
        "The last run was killed and left its lock; removing it. Finished runs are kept, the others go on.\n"
    )
    subprocess.run([Path(sys.executable).with_name("snakemake"), "--unlock", "--quiet", "all"], check=True)


if __name__ == "__main__":
    main()
