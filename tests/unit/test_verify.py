"""`verify` repeats blessed runs in temporary folders, and `bless` takes only numbers that repeat."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness.base import (
    DATA_ROOT,
    MODEL_ROOT,
    PARTITIONS,
    PREFIXES,
    RESULTS,
    RUNS,
    DataError,
    DefinitionError,
    RunError,
    write_json,
)
from benchmarks.harness.config.runs import Run
from benchmarks.harness.config.suite import Suite, load_suite, plain_suite
from benchmarks.harness.models.partitions import load_partition, save_partition
from benchmarks.harness.results import bless as blessing
from benchmarks.harness.results import reference, suite_check, verify
from benchmarks.harness.results.bless import bless, clean_commit
from benchmarks.harness.results.content import Metrics
from benchmarks.harness.results.records import Record
from benchmarks.harness.results.reference import reference_file, write_reference
from benchmarks.harness.results.verify import Rerun
from benchmarks.harness.sources.packages import PackageFile
from emoe.partitioning import Partition
from tests import fake_runs
from tests.executed import finish, prepare
from tests.fake_runs import edit
from tests.planned import plan
from tests.programs import call

pytestmark = pytest.mark.slow

VERIFY = ("verify", "--suite", "smoke")


@pytest.fixture
def own_reference(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Use an empty reference in a working directory without runs; return this directory."""
    (here / RESULTS).mkdir()  # else the commands would work in the checkout
    monkeypatch.setattr(reference, "REFERENCE", here / "reference")
    return here


def bless_runs(runs: Sequence[Run]) -> None:
    """Write the numbers of finished runs of smoke as the reference."""
    for name in dict.fromkeys(run.benchmark for run in runs):
        records = fake_runs.records(run for run in runs if run.benchmark == name)
        write_reference("smoke", name, records, "0" * 40)


def test_verify_repeats_a_blessed_run_that_is_not_finished_here(
    own_reference: Path, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DefinitionError, match="no numbers of the suite 'smoke' are blessed"):
        call(*VERIFY)
    run = next(
        run
        for run in plan(["modularity"], "smoke")
        if run.spec["method"]["name"] == "random_partition"
    )
    finish(prepare(run, str(RUNS)))
    bless_runs([run])
    shutil.rmtree(own_reference / RUNS)
    output = call(*VERIFY, "--runs", "5", "--seed", "1").splitlines()
    assert output[0] == "--seed 1 chooses 1 of 1 blessed runs"
    assert output[1] == f"running {run.name} (1 of 1)"
    assert output[2].endswith(" numbers exactly")
    assert output[3].endswith(" agree, 0 changed, 0 missing, 0 new")
    assert not RUNS.exists()

    csv = reference_file("smoke", "modularity", "csv")
    before = csv.read_text()
    csv.write_text(before.replace(',content,"', ',content,"edited ', 1))
    assert csv.read_text() != before
    output = call(*VERIFY, "--seed", "1", status=1).splitlines()
    assert output[2].startswith("changed modularity ")
    assert output[-1].endswith(" agree, 1 changed, 0 missing, 0 new")
    monkeypatch.setattr(sys, "executable", "false")
    output = call(*VERIFY, "--seed", "1", status=1).splitlines()
    assert "failed: no output" in output
    # the reason is printed once, when the run fails
    assert output[-2] == f"1 repeated run failed: {run.name}"


def shift_stored_partitions() -> None:
    """Give each expert of the stored partitions a neuron of its neighbour."""
    stored = list(PARTITIONS.glob("*.safetensors"))
    assert stored
    for file in stored:
        partition = load_partition(file)
        shifted = {layer: order.roll(1) for layer, order in partition.items()}
        save_partition(Partition(shifted, partition.explained, partition.seconds), file)


def test_verify_clusters_neurons_again(own_reference: Path, workdir: Path) -> None:
    """Stored partitions may have been made with other code."""
    run = next(run for run in plan(["modularity"], "smoke") if run.config.get("partition"))
    assert run.config["partition"] == "kmeans"
    finish(prepare(run, str(RUNS)))
    bless_runs([run])
    shift_stored_partitions()
    output = call(*VERIFY, "--seed", "1").splitlines()
    assert output[1].startswith(f"making {PARTITIONS}/")
    assert output[2] == f"running {run.name} (1 of 1)"
    assert output[-1].endswith(" agree, 0 changed, 0 missing, 0 new")


@pytest.mark.usefixtures("repeated")
def test_repeated_runs_share_packages_models_and_image_counts_only(
    own_reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (own_reference / PREFIXES).mkdir(parents=True)
    (own_reference / PARTITIONS).mkdir(parents=True)
    run_again = verify.run_again
    linked: set[Path] = set()

    def look(
        reruns: Sequence[Rerun], runs_folder: Path, directory: Path, say: Callable[[str], None]
    ) -> tuple[list[Record], list[Run]]:
        linked.update(path.resolve() for path in (directory / "resources").iterdir())
        return run_again(reruns, runs_folder, directory, say)

    monkeypatch.setattr(verify, "run_again", look)
    call(*VERIFY, "--seed", "1")
    resources = own_reference / "resources"
    assert linked == {resources / name for name in ("packages", "models", "images")}


def test_verify_trains_the_run_that_an_evaluation_needs(own_reference: Path, workdir: Path) -> None:
    evaluation = plan(["glue_ood"], "smoke")[0]
    (folder,) = evaluation.spec["candidates"]
    trained = plain_suite("smoke").runs_by_folder[folder]
    for run in (trained, evaluation):
        finish(prepare(run, str(RUNS)))
    bless_runs([evaluation])
    shutil.rmtree(own_reference / RUNS)
    output = call(*VERIFY, "--seed", "1").splitlines()
    assert output[:4] == [
        "--seed 1 chooses 1 of 1 blessed runs",
        f"also {trained.name}, because {evaluation.name} evaluates it",
        f"running {trained.name} (1 of 2)",
        f"running {evaluation.name} (2 of 2)",
    ]
    assert output[-1].endswith(" agree, 0 changed, 0 missing, 0 new")
    assert not RUNS.exists()


@pytest.fixture
def repeated(own_reference: Path, monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """Bless made-up numbers of smoke. `verify` then repeats no run, but lists it here and gives these numbers."""
    suite = plain_suite("smoke")
    fake_runs.write_runs(suite.runs)
    fake_runs.bless(suite)
    repeated: list[Run] = []

    def run_again(reruns: Sequence[Rerun], *_arguments: object) -> tuple[list[Record], list[Run]]:
        repeated[:] = [rerun.run for rerun in reruns]
        assert {rerun.threads for rerun in reruns} == {"1"}
        return fake_runs.records(repeated), []

    monkeypatch.setattr(verify, "run_again", run_again)
    monkeypatch.setattr(verify, "_make_shared_inputs", lambda runs, say: None)
    monkeypatch.setattr(verify, "_cluster_neurons", lambda runs, folder, say: None)
    return repeated


def test_a_seed_chooses_the_same_runs_whatever_the_order_of_the_plan(repeated: list[Run]) -> None:
    suite = plain_suite("smoke")
    backwards = replace(suite)
    backwards.__dict__["runs"] = suite.runs[::-1]

    def chosen(suite: Suite, seed: int) -> list[str]:
        assert verify.verify(suite, 6, seed, lambda line: None).passed
        return [run.folder for run in repeated]

    assert chosen(suite, 3) == chosen(backwards, 3)
    # a change of these names means that seeds in a reader's notes choose other runs
    assert len({tuple(chosen(suite, seed)) for seed in range(5)}) == 5


def test_every_run_is_repeated_once_after_the_one_it_evaluates_and_without_measurements(
    repeated: list[Run],
) -> None:
    lines: list[str] = []
    suite = plain_suite("smoke")
    result = verify.verify(suite, 1000, 0, lines.append)
    assert result.passed
    several = [run for run in suite.runs if len(run.spec.get("candidates", [])) > 1]
    assert several
    left_out = [*several, *suite.runs_of("speed")]
    assert sorted(run.folder for run in repeated) == sorted(
        run.folder for run in suite.runs if run not in left_out
    )
    assert not any(line.startswith("also") for line in lines)  # all are chosen themselves
    places = {run.folder: place for place, run in enumerate(repeated)}
    for run in suite.runs_of("glue_ood"):
        for folder in run.spec["candidates"]:
            assert run in several or places[folder] < places[run.folder]


def test_without_a_seed_one_is_drawn_and_printed_which_repeats_the_choice(
    repeated: list[Run],
) -> None:
    first = call(*VERIFY, "--runs", "4").splitlines()[0]
    runs = list(repeated)
    word, seed, *_ = first.split()
    assert word == "--seed"
    assert call(*VERIFY, "--runs", "4").splitlines()[0] != first
    call(*VERIFY, "--runs", "4", "--seed", seed)
    assert repeated == runs


def test_runs_that_cannot_be_repeated_alone_are_an_error(own_reference: Path) -> None:
    suite = load_suite({"suite": "mini", "benchmarks": ["glue_lora", "glue_ood"]})
    evaluations = suite.runs_of("glue_ood")
    fake_runs.write_runs(evaluations)
    write_reference("mini", "glue_ood", fake_runs.records(evaluations), "0" * 40)
    with pytest.raises(
        DefinitionError, match=f"^none of the {len(evaluations)} blessed runs .* 'mini' can be"
    ):
        verify.verify(suite, 3, 0, print)


@pytest.mark.parametrize("several", [{"processes": 2}, {"gpu": 2}])
def test_runs_with_several_processes_or_gpus_are_left_out(
    several: dict[str, int], repeated: list[Run]
) -> None:
    """The evaluation of such a run is left out too."""
    suite = plain_suite("smoke")
    evaluation = suite.runs_of("glue_ood")[0]
    (folder,) = evaluation.spec["candidates"]
    changed = replace(suite)
    runs = []
    for run in suite.runs:
        is_parallel = run.folder == folder
        runs.append(replace(run, resources=run.resources | several) if is_parallel else run)
    changed.__dict__["runs"] = runs

    verify.verify(suite, 1000, 0, lambda line: None)
    usual = {run.folder for run in repeated}
    verify.verify(changed, 1000, 0, lambda line: None)
    assert usual - {run.folder for run in repeated} == {folder, *evaluations_of(folder, suite)}


def test_a_trained_run_that_is_not_blessed_is_run_but_not_compared(repeated: list[Run]) -> None:
    suite = plain_suite("smoke")
    evaluation = suite.runs_of("glue_ood")[0]
    (folder,) = evaluation.spec["candidates"]
    trained = suite.runs_by_folder[folder]
    # the numbers of the other runs of its benchmark stay blessed
    fake_runs.bless(suite, leave_out=[trained])
    lines: list[str] = []
    result = verify.verify(suite, 1000, 0, lines.append)
    assert trained in repeated
    assert f"also {trained.name}, because {evaluation.name} evaluates it" in lines
    assert result.passed, str(result)


def evaluations_of(folder: str, suite: Suite) -> list[str]:
    """Return the folders of the runs that evaluate only this trained run."""
    return [run.folder for run in suite.runs if run.spec.get("candidates") == [folder]]


def test_a_json_without_the_number_of_threads_is_named(repeated: list[Run]) -> None:
    path = reference_file("smoke", "glue", "json")
    origin = json.loads(path.read_text())
    (machine,) = origin["machines"]
    del origin["machines"][machine]["threads"]
    write_json(path, origin)
    with pytest.raises(
        DataError, match=rf"^{path} lacks 'machines\.{machine}\.threads'; restore it "
    ):
        call(*VERIFY)


@pytest.mark.parametrize("variable", [DATA_ROOT, MODEL_ROOT])
def test_relative_folders_of_data_and_models_are_those_of_the_working_directory(
    variable: str, own_reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The program that is called instead of Python prints the folder as an error."""
    program = own_reference / "program"
    program.write_text(f'#!/bin/sh\necho "${variable}" >&2\nexit 1\n')
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setenv(variable, "folder")
    run = plan(["glue"], "smoke")[0]
    directory = own_reference / "elsewhere"
    directory.mkdir()
    lines: list[str] = []
    _, failed_runs = verify.run_again([Rerun(run, "1")], directory / RUNS, directory, lines.append)
    assert failed_runs == [run]
    assert lines[-1] == f"failed: {own_reference / 'folder'}"


def test_the_failure_of_a_run_without_blessed_numbers_is_printed(
    own_reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An evaluation may be blessed without the trained run that is repeated for it."""
    program = own_reference / "program"
    program.write_text("#!/bin/sh\necho 'the reason' >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    run = plan(["glue"], "smoke")[0]
    lines: list[str] = []
    verify.run_again([Rerun(run, "1")], own_reference / RUNS, own_reference, lines.append)
    assert lines[-1] == "failed: the reason"


@pytest.mark.usefixtures("own_reference")
def test_the_result_names_each_failed_run_of_a_benchmark_without_blessed_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An evaluation may be blessed without the benchmark of the trained run that it evaluates."""
    suite = plain_suite("smoke")
    evaluation = suite.runs_of("glue_ood")[0]
    (folder,) = evaluation.spec["candidates"]
    trained = suite.runs_by_folder[folder]
    fake_runs.write_runs([evaluation])
    bless_runs([evaluation])
    monkeypatch.setattr(verify, "make_inputs", lambda *_arguments: None)
    failed_runs = [trained]
    monkeypatch.setattr(
        verify, "run_again", lambda *_arguments: (fake_runs.records([evaluation]), failed_runs)
    )
    result = verify.verify(suite, 1, 0, lambda line: None)
    assert str(result).splitlines()[0] == f"an unblessed run failed: {trained.name}"
    assert not result.passed

    failed_runs.append(evaluation)
    lines = str(verify.verify(suite, 1, 0, lambda line: None)).splitlines()
    assert lines[0] == f"an unblessed run failed: {trained.name}"
    assert f"1 repeated run failed: {evaluation.name}" in lines


def test_missing_packages_and_partitions_are_made_first(
    own_reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = next(run for run in plan(["glue"], "smoke") if run.config.get("partition") == "kmeans")
    fake_runs.write_runs([run])
    bless_runs([run])
    fetched: list[str] = []
    monkeypatch.setattr(PackageFile, "fetch", lambda self: fetched.append(self.name))
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(RunError, match=r"^could not make resources/partitions/.*\.json: no output"):
        call(*VERIFY)
    assert fetched == ["vaderSentiment-3.3.2.tar.gz"]


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make an empty checkout."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for command in (
        "init -q",
        "config user.email a@b",
        "config user.name a",
        "commit -q --allow-empty -m first",
    ):
        subprocess.run(["git", *command.split()], cwd=folder, check=True)
    monkeypatch.setattr(blessing, "ROOT", folder)
    return folder


def test_bless_refuses_a_tree_with_changes_except_blessed_numbers(checkout: Path) -> None:
    write_json(checkout / "results/reference/mini/glue.json", {})
    assert len(clean_commit()) == 40
    (checkout / "code.py").write_text("x = 1")
    with pytest.raises(DefinitionError, match=r"^1 file is not committed: code\.py$"):
        clean_commit()
    (checkout / "other.py").write_text("x = 1")
    with pytest.raises(
        DefinitionError, match=r"^2 files are not committed, the first is code\.py$"
    ):
        clean_commit()


def test_bless_outside_a_checkout_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blessing, "ROOT", tmp_path)
    with pytest.raises(DefinitionError, match=rf"^{tmp_path} is not a checkout: fatal: not a git"):
        clean_commit()


def test_bless_names_a_changed_file_with_a_blank_in_its_path(checkout: Path) -> None:
    (checkout / "two words.py").write_text("x = 1")
    with pytest.raises(DefinitionError, match=r'^1 file is not committed: "two words\.py"$'):
        clean_commit()


@pytest.mark.usefixtures("checkout", "own_reference", "workdir")
def test_bless_clusters_neurons_again() -> None:
    """Stored partitions may have been made with other code."""
    suite = load_suite({"suite": "smoke", "benchmarks": ["modularity"]})
    for run in suite.runs:
        finish(prepare(run, str(RUNS)))
    (clustered,) = [run for run in suite.runs if run.config.get("partition") == "kmeans"]
    # the fastest run is repeated
    edit(clustered, lambda content: content["cost"].update(job_seconds=0.01))
    shift_stored_partitions()
    lines: list[str] = []
    assert bless(suite, ["modularity"], lines.append)
    assert lines[0].startswith(f"making {PARTITIONS}/")
    assert lines[1] == f"running {clustered.name} (1 of 1)"


Change = Callable[[dict[str, Any]], object]


@pytest.mark.usefixtures("checkout", "own_reference")
def test_only_numbers_that_repeat_are_blessed(monkeypatch: pytest.MonkeyPatch) -> None:
    suite = load_suite({"suite": "smoke", "benchmarks": ["glue", "speed"]})
    fake_runs.write_runs(suite.runs)
    repeated, failed_runs = list[str](), list[Run]()

    def bless_runs(
        change: Change = lambda content: None, benchmarks: Sequence[str] = ("glue", "speed")
    ) -> list[Path]:
        def run_again(
            reruns: Sequence[Rerun], *_arguments: object
        ) -> tuple[list[Record], list[Run]]:
            results = []
            for (run, _threads), record in zip(
                reruns, fake_runs.records(rerun.run for rerun in reruns), strict=True
            ):
                repeated.append(run.id)
                content = json.loads(run.metrics_file.read_text())
                change(content)
                results.append(replace(record, metrics=Metrics.model_validate(content)))
            return results, failed_runs

        monkeypatch.setattr(blessing, "make_inputs", lambda *_arguments: None)
        monkeypatch.setattr(blessing, "run_again", run_again)
        return bless(suite, benchmarks, print)

    fastest = [suite.runs_of(name)[-1] for name in ("glue", "speed")]
    for run in fastest:
        edit(run, lambda content: content["cost"].update(job_seconds=0.5))
    files = bless_runs()
    assert [file.name for file in files] == [
        f"{name}.{ending}" for name in ("glue", "speed") for ending in ("csv", "json", "jsonl.gz")
    ]
    assert suite_check.check(suite, ["glue", "speed"]).passed
    assert sorted(repeated) == sorted(run.id for run in fastest)
    for change in (
        lambda content: content.get("probe", {}).update(losses=["0.25"]),
        lambda content: content["environment"]["fingerprint"].update(threads="2"),
    ):
        with pytest.raises(
            DefinitionError, match="the repeated runs failed, were made on another machine, or have"
        ):
            bless_runs(change)
    failed_runs.append(fastest[0])
    with pytest.raises(
        DefinitionError, match="the repeated runs failed, were made on another machine, or have"
    ):
        bless_runs()
    failed_runs.clear()

    # a run of each code is repeated: of a recorded digest, or of the commit of older versions
    first, second, third, *_ = suite.runs_of("glue")
    edit(first, lambda content: content["environment"].update(code="0" * 64))
    for run in (second, third):
        edit(run, lambda content: content["environment"].pop("code"))
    edit(third, lambda content: content["cost"].update(job_seconds=0.7))
    repeated.clear()
    bless_runs()
    assert sorted(repeated) == sorted(run.id for run in (*fastest, first, third))

    # one benchmark can be blessed while another one is not finished
    suite.runs_of("speed")[0].metrics_file.unlink()
    with pytest.raises(DefinitionError, match=r"1 of \d+ runs .* is missing"):
        bless_runs()
    before = reference_file("smoke", "speed", "jsonl.gz").stat().st_mtime_ns
    assert [file.name for file in bless_runs(benchmarks=["glue"])] == [
        "glue.csv",
        "glue.json",
        "glue.jsonl.gz",
    ]
    assert reference_file("smoke", "speed", "jsonl.gz").stat().st_mtime_ns == before
