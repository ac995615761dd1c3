"""Runs travel: packed on one machine, merged on another, and nothing wrong is taken."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from click.testing import CliRunner, Result
from filelock import FileLock

from benchmarks.__main__ import cli
from benchmarks.harness.base.errors import DataError, DefinitionError
from benchmarks.harness.base.paths import LOCK, ORIGIN
from benchmarks.harness.config.jobs import run_inputs
from benchmarks.harness.config.suite import load_suite
from benchmarks.harness.results import bundles
from benchmarks.harness.results.bundles import Merged, merge_bundle, origin_of, write_bundle
from emoe.errors import EMoEError
from tests import fake_runs

RUNS = Path("results/runs")
GLUE = load_suite({"suite": "smoke"}).runs_of("glue")


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Another lab's folder, with finished runs; one's own is beside it."""
    folder = tmp_path / "there"
    for place in (folder, tmp_path / "here"):
        place.mkdir()
    fake_runs.write(folder / RUNS, "smoke", benchmarks=("glue",))
    for run in GLUE:
        (folder / RUNS / run.folder / "log.txt").write_text("training, 3 steps\n")
    monkeypatch.chdir(tmp_path / "here")
    return folder


@pytest.fixture
def bundle(there: Path) -> Path:
    file = there / "runs.zip"
    assert write_bundle(file, GLUE, "lab b", root=there / RUNS) == len(GLUE)
    return file


def call(*words: str) -> Result:
    return CliRunner().invoke(cli, words)


def content(folder: Path) -> dict[str, bytes]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_what_was_packed_is_there_and_named_and_nothing_runs_again(there: Path, bundle: Path) -> None:
    merged = merge_bundle(bundle)
    assert sorted(merged.added) == sorted(run.folder for run in GLUE)
    assert merged == Merged(added=merged.added)
    ours = content(RUNS)
    for run in GLUE:
        assert ours.pop(f"{run.folder}/{ORIGIN}")
        assert ours.pop(f"{run.folder}/run.json") == f"{run.to_json()}\n".encode()
    assert ours == content(there / RUNS)
    assert origin_of(GLUE[0].folder) == "lab b"
    assert run_inputs(GLUE[0]) == []  # so that Snakemake fetches no data for it
    (RUNS / GLUE[0].folder / "metrics.json").unlink()
    assert run_inputs(GLUE[0]) != []  # deleted, it is run here


def test_the_same_runs_make_the_same_bytes_and_merging_twice_adds_nothing(there: Path, bundle: Path) -> None:
    again = there / "again.zip"
    write_bundle(again, reversed(GLUE), "lab b", root=there / RUNS)
    assert again.read_bytes() == bundle.read_bytes()
    merge_bundle(bundle)
    before = content(RUNS)
    assert len(merge_bundle(bundle).there) == len(GLUE)
    assert content(RUNS) == before


def test_ones_own_numbers_are_kept_and_told(there: Path, bundle: Path) -> None:
    fake_runs.write(RUNS, "smoke", {"emoe": 0.05}, benchmarks=("glue",))
    before = content(RUNS)
    found = call("merge", str(bundle))
    assert found.exit_code == 1
    emoe = [run.folder for run in GLUE if run.spec["method"]["name"] == "emoe"]
    assert f"{len(emoe)} here with other numbers, which were kept" in found.output
    assert f"  results/runs/{emoe[0]}" in found.output
    assert content(RUNS) == before


def test_a_run_that_is_being_run_here_is_left_alone(bundle: Path) -> None:
    folder = RUNS / GLUE[0].folder
    folder.mkdir(parents=True)
    with FileLock(folder / LOCK):
        merged = merge_bundle(bundle)
    assert merged.begun == [GLUE[0].folder]
    assert len(merged.added) == len(GLUE) - 1
    assert not (folder / "metrics.json").exists()


def test_weights_of_a_training_here_never_stand_beside_anothers_numbers(bundle: Path) -> None:
    weights = RUNS / GLUE[0].folder / "model/trained.safetensors"
    weights.parent.mkdir(parents=True)
    weights.write_text("ours")
    found = call("merge", str(bundle))
    assert f"{len(GLUE) - 1} added; 1 begun here, left alone (delete their folders to take these)" in found.output
    assert content(weights.parents[1]) == {"model/trained.safetensors": b"ours"}


def test_a_damaged_file_of_ones_own_is_told_before_anything_is_taken(bundle: Path) -> None:
    own = RUNS / GLUE[-1].folder / "metrics.json"
    own.parent.mkdir(parents=True)
    own.write_text("{")
    with pytest.raises(DefinitionError, match=r"metrics\.json is damaged"):
        merge_bundle(bundle)
    assert content(RUNS) == {f"{GLUE[-1].folder}/metrics.json": b"{"}


def test_a_run_keeps_the_name_that_it_came_with(there: Path, bundle: Path) -> None:
    merge_bundle(bundle)
    write_bundle(Path("mine.zip"), GLUE, "lab c")
    for path in RUNS.rglob("*.json"):
        path.unlink()
    merge_bundle(Path("mine.zip"))
    assert origin_of(GLUE[0].folder) == "lab b"


@pytest.mark.usefixtures("undrawn")
def test_tables_and_the_report_say_who_ran_what(there: Path, bundle: Path) -> None:
    fake_runs.write(RUNS, "smoke", benchmarks=("glue",))
    for run in GLUE:
        if run.spec["seed"] == 1:
            (RUNS / run.folder / "metrics.json").unlink()
    merge_bundle(bundle)
    assert call("tables", "--suite", "smoke", "--benchmark", "glue").exit_code == 0
    table = pd.read_csv("results/smoke/tables/glue_results.csv")
    assert set(table["run_by"]) >= {"here (1), lab b (1)", "here (1)"}
    made = call("report", "--suite", "smoke", "--benchmark", "glue", "--output", "results/smoke/glue.html")
    assert made.exit_code == 0, made.output
    page = Path("results/smoke/glue.html").read_text()
    assert "lab b; merged from a bundle" in page
    assert 'data-run-by="here (1), lab b (1)"' in page


def test_only_what_is_finished_and_asked_for_is_packed(there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(there)
    (RUNS / GLUE[0].folder / "metrics.json").unlink()
    found = call("bundle", "out.zip", "--suite", "smoke", "--benchmark", "glue", "--no-logs", "--name", "me")
    assert found.output == f"out.zip: {len(GLUE) - 1} runs; 1 of the suite's {len(GLUE)} are not finished\n"
    with zipfile.ZipFile("out.zip") as archive:
        assert not [name for name in archive.namelist() if name.endswith("log.txt") or GLUE[0].id in name]
    found = call("bundle", "none.zip", "--suite", "smoke", "--benchmark", "llama")
    assert found.exit_code == 1
    assert str(found.exception) == "none of these runs is finished: there is nothing to pack"
    assert not Path("none.zip").exists()
    found = call("bundle", "odd.zip", "--suite", "smoke", "--benchmark", "glue", "--name", "a\nb")
    assert found.exit_code == 1
    assert not Path("odd.zip").exists()


Files = dict[str, bytes]
FIRST = min(run.folder for run in GLUE)


def _manifest(change: Callable[[dict[str, Any]], object]) -> Callable[[Files], None]:
    def changed(files: Files) -> None:
        content = json.loads(files["bundle.json"])
        change(content)
        files["bundle.json"] = json.dumps(content).encode()

    return changed


def _moved(files: Files) -> None:
    """Out of the folder of runs."""
    content = json.loads(files["bundle.json"])
    content["runs"][f"../../{FIRST}"] = content["runs"].pop(FIRST)
    files["bundle.json"] = json.dumps(content).encode()
    for name in [name for name in files if name.startswith(FIRST)]:
        files[f"../../{name}"] = files.pop(name)


def _metrics(old: bytes, new: bytes) -> Callable[[Files], None]:
    """Other numbers, with their right digest."""

    def changed(files: Files) -> None:
        name = f"{FIRST}/metrics.json"
        assert old in files[name]
        files[name] = files[name].replace(old, new, 1)
        content = json.loads(files["bundle.json"])
        content["runs"][FIRST]["files"]["metrics.json"] = hashlib.sha256(files[name]).hexdigest()
        files["bundle.json"] = json.dumps(content).encode()

    return changed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda files: files.pop("bundle.json"), "is no bundle: it has no bundle.json"),
        (lambda files: files.update({"bundle.json": b"{"}), "its bundle.json is damaged"),
        (lambda files: files.update({"bundle.json": b"[]"}), "bundle.json"),
        (_manifest(lambda found: found.update(version=2)), "version"),
        (_manifest(lambda found: found["runs"].pop(FIRST)), "its bundle.json and its files differ in"),
        (_manifest(lambda found: found["runs"][FIRST].update(extra=1)), "extra"),
        (_manifest(lambda found: found["runs"][FIRST].update(origin="a\x1b[31m")), "origin"),
        (_moved, "runs"),
        (lambda files: files.pop(f"{FIRST}/run.json"), "its bundle.json and its files differ in"),
        (lambda files: files.update({"../evil.py": b"1"}), r"differ in '\.\./evil\.py'"),
        (lambda files: files.update({f"{FIRST}/log.txt": b"other"}), "is not what was packed: its sha256 differs"),
        (_metrics(b'"run_id": "', b'"run_id": "x'), "belongs to the run 'x"),
        (
            _manifest(lambda found: found["runs"].update({"glue/" + "a" * 300 + "-00000000": found["runs"][FIRST]})),
            "runs",
        ),
        (_metrics(b'"scores"', b'"measured": {}, "scored"'), "lacks something that such a run records"),
        (_metrics(b'"cost": {', b'"cost": [], "costs": {'), "lacks something that such a run records"),
        (_metrics(b'"model": {', b'"model": [], "models": {'), "lacks something that such a run records"),
        (_metrics(b'"processor"', b'"process"'), r"lacks something that such a run records \(KeyError\('processor'\)"),
        (_metrics(b'"balanced_accuracy": 0.', b'"balanced_accuracy": null, "x": 0.'), "balanced_accuracy is null"),
        (
            _metrics(b'"balanced_accuracy": 0.', b'"balanced_accuracy": true, "x": 0.'),
            "is True, but has to be a number",
        ),
        (_metrics(b'"loss": 0.', b'"loss": 1e999, "x": 0.'), "loss is inf, but has to be a number"),
        (_metrics(b'"scores"', b'"scored"'), r"lacks something that such a run records \(KeyError\('scores'\)\)"),
        (_metrics(b'"balanced_accuracy": 0.', b'"balanced_accuracy": 17.'), "has to be a number from 0 to 1"),
        (_metrics(b'"balanced_accuracy": 0.', b'"balanced_accuracy": NaN, "x": 0.'), "NaN is no number of JSON"),
    ],
)
def test_nothing_of_a_wrong_bundle_is_taken(
    bundle: Path, change: Callable[[Files], object], message: str, tmp_path: Path
) -> None:
    with zipfile.ZipFile(bundle) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    change(files)
    wrong = tmp_path / "wrong.zip"
    with zipfile.ZipFile(wrong, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    with pytest.raises(EMoEError, match=message) as raised:
        merge_bundle(wrong)
    assert str(wrong) in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not RUNS.exists()


def test_a_bundle_that_unpacks_to_too_much_is_refused(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundles, "_LARGEST_OF_ALL", 5000)
    with pytest.raises(DataError, match="unpacks to more than 5,000 bytes"):
        merge_bundle(bundle)
    monkeypatch.setitem(bundles._LARGEST, "metrics.json", 100)
    with pytest.raises(DataError, match=r"metrics\.json' has .* bytes, of 100 at most"):
        merge_bundle(bundle)


def refusal(file: Path) -> str | None:
    try:
        merge_bundle(file)
    except EMoEError as error:
        return str(error)
    return None


def test_what_is_no_zip_is_refused(tmp_path: Path, there: Path) -> None:
    missing, broken = tmp_path / "missing.zip", tmp_path / "broken.zip"
    assert refusal(missing) == f"{missing} does not exist"
    write_bundle(broken, GLUE[:1], "lab b", root=there / RUNS)
    whole = broken.read_bytes()
    for content in (b"no zip", b"", whole[:-40]):
        broken.write_bytes(content)
        assert "broken.zip is no bundle" in str(refusal(broken))
    for place in random.Random(0).sample(range(len(whole)), 150):
        broken.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        said = refusal(broken)
        if said is None:  # a byte that says nothing, such as a date
            assert (RUNS / GLUE[0].folder / "metrics.json").read_bytes() == (
                there / RUNS / GLUE[0].folder / "metrics.json"
            ).read_bytes()
            shutil.rmtree(RUNS)
        else:
            assert "broken.zip" in said
            assert not RUNS.exists()
