"""Test that Snakemake's lock is removed after a kill, but not while its process is alive."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT


def unlock() -> str:
    script = ROOT / "workflow/scripts/unlock_stale.py"
    result = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert "Traceback" not in result.stderr
    return result.stderr


def test_a_second_run_names_the_first_before_it_has_a_lock(here: Path) -> None:
    script = here / "snakemake"
    script.write_text("import time\nprint('up', flush=True)\ntime.sleep(60)\n")
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE) as other:
        assert other.stdout
        assert other.stdout.readline() == b"up\n"
        message = unlock()
        other.kill()
    assert message == f"error: another run is active in this folder (process {other.pid}); wait for it, or stop it\n"


@pytest.mark.parametrize(
    ("plan", "message"),
    [('{"host": "node7"}', "node7 worked in this folder last"), ('{"host": "no', "was killed and left its lock")],
)
def test_a_lock_of_another_machine_is_kept_and_a_truncated_plan_is_no_error(
    here: Path, plan: str, message: str
) -> None:
    lock, path = here / ".snakemake/locks/0.input.lock", Path("results/mini/plan.json")
    for file, text in ((lock, ""), (path, plan)):
        file.parent.mkdir(parents=True)
        file.write_text(text)
    assert message in unlock()
    assert lock.exists()  # without a Snakefile nothing unlocks
