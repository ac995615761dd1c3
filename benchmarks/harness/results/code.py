"""Hash the code that numbers depend on."""

from __future__ import annotations

import hashlib

from benchmarks.harness.base import BENCHMARKS, ROOT
from benchmarks.harness.config.benchmark import benchmark_names

# files that read, print or draw the numbers of runs, and change none
_PRESENTATION_FILES = (
    "ablations.py",
    "figures.py",
    "presentation.py",
    "ranks.py",
    "selection_gain.py",
    "tables.py",
)


def code_digest() -> str:
    """Hash the code that numbers depend on, without the files that only print or draw numbers."""
    harness = BENCHMARKS / "harness"
    folders = [
        ROOT / "emoe",
        harness / "models",
        harness / "sources",
        harness / "training",
        BENCHMARKS / "text",
    ]
    folders += [BENCHMARKS / name for name in benchmark_names()]
    files = [
        # the seeds
        harness / "base.py",
        harness / "run" / "execution.py",
        # the names of frozen parameters, and the parameters that are trained
        harness / "config" / "methods.py",
        harness / "config" / "method_specs.py",
        # the mean scores out of domain, and the information that experts carry
        harness / "results" / "records.py",
        harness / "results" / "statistics.py",
    ]
    for folder in folders:
        for file in sorted(folder.rglob("*")):
            is_code = file.suffix in (".py", ".cpp", ".h")
            is_presentation = file.name in _PRESENTATION_FILES
            if is_code and not is_presentation:
                files.append(file)

    digest = hashlib.sha256()
    for file in files:
        # the name is hashed too, so a renamed file counts as changed
        name = file.relative_to(ROOT).as_posix()
        digest.update(f"{name}\0".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()
