"""Numbers are blessed where they are finished, repeat, and come from a clean tree."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness.base.errors import DefinitionError
from benchmarks.harness.base.paths import RUNS
from benchmarks.harness.config.runs import Run
from benchmarks.harness.results.regression import compare
from benchmarks.harness.run import blessing, environment, verification
from benchmarks.harness.run.blessing import bless, clean_commit, refuse_what_does_not_repeat
from benchmarks.harness.run.repetition import Repetition, repeat
from benchmarks.harness.run.spread import sample
from tests import fake_runs
from tests.fake_runs import edit


@pytest.fixture
def runs(here: Path) -> list[Run]:
    """Finished runs of text and measurements, in an empty working directory."""
    return fake_runs.text_and_measurements()


def checkout(folder: Path) -> Path:
    folder.mkdir()
    for command in ("init -q", "config user.email a@b", "config user.name a", "commit -q --allow-empty -m first"):
        subprocess.run(["git", *command.split()], cwd=folder, check=True)
    return folder


def test_bless_refuses_a_tree_with_changes_but_for_blessed_numbers(tmp_path: Path) -> None:
    root = checkout(tmp_path / "checkout")
    (root / "results/reference").mkdir(parents=True)
    (root / "results/reference/mini.csv").write_text("new")
    assert len(clean_commit(root)) == 40
    (root / "code.py").write_text("x = 1")
    with pytest.raises(DefinitionError, match=r"1 files are not committed, among them code\.py: commit or remove them"):
        clean_commit(root)
    with pytest.raises(DefinitionError, match="is no git checkout"):
        clean_commit(tmp_path)


def test_bless_refuses_what_is_not_finished_or_does_not_say_its_machine(runs: list[Run], tmp_path: Path) -> None:
    root, said = checkout(tmp_path / "checkout"), list[str]()
    edit(runs[0], lambda content: content["environment"].pop("fingerprint"))
    with pytest.raises(DefinitionError, match="do not say on what they ran: they were made by older code"):
        bless(runs, "mini", tmp_path / "ref", said.append, root)
    (RUNS / runs[1].folder / "metrics.json").unlink()
    with pytest.raises(DefinitionError, match=f"1 of {len(runs)} runs are not finished, the first is {runs[1].id}"):
        bless(runs, "mini", tmp_path / "ref", said.append, root)
    assert not said
    assert not (tmp_path / "ref").exists()


def test_bless_runs_the_cheapest_of_every_benchmark_again(
    runs: list[Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, asked = checkout(tmp_path / "checkout"), list[Run]()
    cheap = [next(run for run in runs if run.benchmark == name) for name in ("glue", "speed")]
    for run in cheap:
        edit(run, lambda content: content["cost"].update(job_seconds=0.5))
    monkeypatch.setattr(blessing, "refuse_what_does_not_repeat", lambda runs, say: asked.extend(runs))
    path = bless(runs, "mini", tmp_path / "ref", print, root)
    assert asked == cheap
    assert compare(runs, "mini", path.parent).passed


def fake_repeat(change: Callable[[dict[str, Any]], object]) -> Callable[..., list[Repetition]]:
    """What runs nothing, but gives the numbers of before, changed."""

    def again(repetitions: list[Repetition], *, jobs: int = 1) -> list[Repetition]:
        for repetition in repetitions:
            content = json.loads((RUNS / repetition.run.folder / "metrics.json").read_text())
            change(content)
            path = repetition.folder / RUNS / repetition.run.folder / "metrics.json"
            path.parent.mkdir(parents=True)
            path.write_text(json.dumps(content))
        return []

    return again


def test_numbers_that_do_not_repeat_or_are_of_another_machine_are_not_blessed(
    runs: list[Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = list[str]()
    monkeypatch.setattr(verification, "repeat", fake_repeat(lambda content: None))
    refuse_what_does_not_repeat(runs[:1], said.append)
    assert said == ["running 1 runs again, about 0:02"]

    losses = ["0.25"] * 8
    monkeypatch.setattr(verification, "repeat", fake_repeat(lambda content: content["probe"].update(losses=losses)))
    with pytest.raises(DefinitionError, match=r"numbers do not repeat, so they cannot be blessed:\nchanged"):
        refuse_what_does_not_repeat(runs[:1], said.append)

    def elsewhere(content: dict[str, Any]) -> None:
        content["environment"]["fingerprint"]["threads"] = "2"
        content["probe"]["losses"] = losses

    monkeypatch.setattr(verification, "repeat", fake_repeat(elsewhere))
    with pytest.raises(DefinitionError, match="another machine than the one that the runs were made on"):
        refuse_what_does_not_repeat(runs[:1], said.append)


def test_a_run_that_fails_when_it_is_run_again_is_named(runs: list[Run], tmp_path: Path) -> None:
    spec = {**runs[0].spec, "pipeline": "tests.no_pipeline"}
    with pytest.raises(ModuleNotFoundError):
        repeat([Repetition(Run(runs[0].id, spec), tmp_path / "again")])


def test_samples_of_runs(runs: list[Run]) -> None:
    edit(runs[3], lambda content: content["cost"].update(job_seconds=0.1))
    assert sample(runs, "all") == runs
    assert runs[3] in sample(runs, "cheapest")
    assert len(sample(runs, "cheapest")) == 2
    seeds = [run for run in sample(runs, "seeds") if run.benchmark == "glue"]
    assert len({(run.spec["task"]["name"], run.spec["method"]["name"]) for run in seeds}) == len(seeds)


def test_a_fingerprint_has_what_chooses_between_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    found = environment.fingerprint({"torch": "2"}, ["GPU"])
    assert {"processor", "processor flags", "torch build", "CPU capability", "threads", "package torch"} <= set(found)
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    assert environment.fingerprint({"torch": "2"}, ["GPU"]) == found | {"variable MKL_CBWR": "COMPATIBLE"}
    assert all(isinstance(value, str) for value in found.values())
