"""What `plan` says of suites: what is done, what the rest takes, and on what that rests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness.base.errors import DefinitionError
from benchmarks.harness.config import workload
from benchmarks.harness.config.catalogue import load_models
from benchmarks.harness.config.paper_items import runs_shown
from benchmarks.harness.config.runs import plan
from benchmarks.harness.config.suite import load_suite
from tests import fake_runs
from tests.planned import plan_once
from tests.programs import call

RUNS = Path("results/runs")


@pytest.fixture(autouse=True)
def workdir(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan_once(monkeypatch)


def planned(*arguments: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(call("plan", *arguments, "--json"))
    return found


def test_plan_estimates_by_what_is_stated_until_something_was_recorded() -> None:
    before = planned("--suite", "mini_search")["total"]
    assert (before["done"], before["by_basis"], before["unknown"]) == (0, {"stated": before["runs"]}, 0)
    assert "nothing like them was measured" in " ".join(call("plan", "--suite", "mini_search").split())
    first = plan(["glue"], "mini_search")[0]
    fake_runs.write_runs([first])
    found = planned("--suite", "mini_search")
    total = found["total"]
    assert (total["done"], total["missing"]) == (1, before["runs"] - 1)
    assert set(total["by_basis"]) == {"finished", "seed"}
    assert total["seconds"] < before["seconds"] / 4  # it took two seconds
    assert [model["name"] for model in found["models"]] == [first.spec["model"]["name"]]
    assert found["sets"]
    (RUNS / first.folder / "metrics.json").write_text("{")
    with pytest.raises(DefinitionError, match=r"metrics\.json is damaged"):
        planned("--suite", "mini_search")


def test_plan_takes_what_runs_took_where_the_suite_was_blessed() -> None:
    found = planned("--suite", "smoke", "--benchmark", "modularity")["total"]
    assert found["by_basis"] == {"blessed": found["missing"]}
    assert found["seconds"] > 0
    with pytest.raises(DefinitionError, match="did you mean 'glue'"):
        call("plan", "--suite", "smoke", "--benchmark", "gleu")


def numbers(line: str) -> list[str]:
    return line.split()[1:4]


@pytest.mark.parametrize("suite", ["smoke", "mini", "paper"])
def test_plan_fits_a_terminal_and_touches_nothing(suite: str, here: Path) -> None:
    text = call("plan", "--suite", suite)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    assert list(here.iterdir()) == []
    loaded = load_suite({"suite": suite})
    shown = {line.split()[0]: numbers(line) for line in lines if line[:1].isalpha() and len(line.split()) > 4}
    for name in (*loaded.settings.benchmarks, "all"):
        count = len(loaded.runs if name == "all" else loaded.runs_of(name))
        assert shown[name] == [str(count), "0", str(count)]
    assert ("figure_7" in shown) == bool(runs_shown(loaded, "figure_7"))
    assert ("a100" in text) == (suite == "paper")
    words = " ".join(text.split())
    assert "That is stated, not measured" in words if suite == "paper" else "On " in words
    if suite == "paper":
        assert "grammar_test not counted" in words
        assert "llama2-7b hub meta-llama/Llama-2-7b-hf 13 GB" in words
        assert "flipkart by hand unknown 205,041" in words


def test_plan_counts_a_run_once_though_several_tables_show_it() -> None:
    found = planned("--suite", "mini")
    tables = {row["name"]: row for row in found["tables"]}
    total = found["total"]
    assert sum(row["runs"] for row in found["work"]) == total["runs"] < sum(row["runs"] for row in tables.values())
    assert total["seconds"] == pytest.approx(sum(row["seconds"] for row in found["work"]))
    assert max(row["seconds"] for row in tables.values()) < total["seconds"]
    # what is evaluated out of domain has to be trained
    three = {run.folder for run in runs_shown(load_suite({"suite": "mini"}), "table_3")}
    evaluated = [
        run for run in plan(["glue_lora", "glue_ood"], "mini") if run.folder in three and run.benchmark == "glue_ood"
    ]
    assert evaluated
    assert three >= {folder for run in evaluated for folder in run.spec["candidates"]}
    alone = planned("--suite", "mini", "--table", "table_3")
    assert alone["total"] == {**tables["table_3"], "name": "all"}
    assert [row["name"] for row in alone["tables"]] == ["table_3"]
    traces = planned("--suite", "mini", "--table", "figure_6")
    methods = {run.spec["method"]["name"] for run in runs_shown(load_suite({"suite": "mini"}), "figure_6")}
    assert methods == {"lora_gmoe", "lora_emoe", "lora_emoe_learn"}  # of which the paper has traces
    assert [row["name"] for row in traces["work"]] == ["glue_lora"]


def test_plan_says_how_long_it_takes_on_several_cores_and_gpus() -> None:
    one, two = (planned("--suite", "mini", "--cores", cores) for cores in ("1", "2"))
    assert one["seconds_at_once"] == pytest.approx(one["total"]["seconds"])
    assert two["seconds_at_once"] == pytest.approx(one["total"]["seconds"] / 2)
    assert planned("--suite", "mini", "--cores", "999")["seconds_at_once"] == one["total"]["longest_seconds"]
    gpu, gpus = (planned("--suite", "mini", "--device", "h100", "--gpus", count) for count in ("1", "4"))
    assert gpus["seconds_at_once"] == pytest.approx(gpu["total"]["gpu_seconds"] / 4)
    slow, fast = (
        planned("--suite", "mini", "--device", "a100", "--tflops", speed)["total"] for speed in ("0.001", "0.01")
    )
    assert slow["seconds"] > 4 * fast["seconds"]
    for wrong in (("--tflops", "0"), ("--cores", "0"), ("--gpus", "-1"), ("--tflops", "nan"), ("--tflops", "fast")):
        call("plan", "--suite", "smoke", *wrong, status=2)


def test_plan_names_what_it_does_not_know() -> None:

    def refused(match: str, *arguments: str) -> None:
        with pytest.raises(DefinitionError, match=match):
            call("plan", *arguments)

    refused("did you mean 'table_3'", "--suite", "smoke", "--table", "tabel_3")
    refused("did you mean 'h100'", "--suite", "smoke", "--device", "h10")
    refused("the suite mini_search runs nothing of table_mmlu", "--suite", "mini_search", "--table", "table_mmlu")
    refused("runs nothing in the benchmark llama", "--suite", "smoke", "--table", "table_4", "--benchmark", "llama")


def test_plan_says_how_far_it_is_off_on_finished_runs() -> None:
    runs = plan(["glue"], "smoke")
    fake_runs.write_runs(runs)
    for run in runs:
        file = RUNS / run.folder / "metrics.json"
        content = json.loads(file.read_text())
        content["cost"]["job_seconds"] = 4.0 if run.spec["method"]["name"] == "gmoe" else 2.0
        file.write_text(json.dumps(content))
    found = planned("--suite", "smoke", "--benchmark", "glue")
    rows = {row["name"]: row for row in found["errors"]["time"]}
    assert rows["glue"]["runs"] == rows["all"]["runs"] == len(runs) == found["total"]["done"]
    assert rows["glue"]["worst"] == pytest.approx(0.5, abs=0.1)  # the one that took twice as long
    assert found["total"]["seconds"] == 0
    text = " ".join(call("plan", "--suite", "smoke").split())
    assert "How far estimates are off on finished runs" in text


@pytest.mark.parametrize("seconds", ["NaN", "-1.0", "0", '"long"', "null"])
def test_plan_refuses_a_record_of_no_time(seconds: str) -> None:
    folder = RUNS / plan(["modularity"], "smoke")[0].folder
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(f'{{"cost": {{"job_seconds": {seconds}}}}}')
    with pytest.raises(DefinitionError, match=r"metrics\.json is damaged"):
        call("plan", "--suite", "smoke", "--benchmark", "modularity")


def test_plan_names_the_run_whose_layers_a_shape_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    models = dict(load_models())
    shape = models["minilm"].shape
    assert shape is not None
    models["minilm"] = models["minilm"].model_copy(update={"shape": shape.model_copy(update={"layers": 4})})
    monkeypatch.setattr(workload, "load_models", lambda: models)
    with pytest.raises(DefinitionError, match=r"glue/minilm-\S+: layers \[5\] do not exist.*'minilm\.shape'"):
        call("plan", "--suite", "mini", "--benchmark", "modularity")
