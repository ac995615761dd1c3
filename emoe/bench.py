"""``emoe-bench``: the commands of the benchmark suite, which a checkout has beside the library."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path


def main() -> None:
    """Run ``python -m benchmarks``; say in one line where that is, if it is not here."""
    sys.path.append(str(Path(__file__).resolve().parents[1]))  # the checkout's folder, if this is in one
    try:
        program = importlib.import_module("benchmarks.__main__")
    except ModuleNotFoundError as error:
        sys.exit(
            f"error: the benchmarks run in a checkout of the suite, installed by `pip install -e '.[suite]'` ({error})"
        )
    program.main()
