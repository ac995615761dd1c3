"""The held-out loss while a model is trained: it changes nothing, and survives an end on the way."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from benchmarks.harness.config.benchmark import load_benchmark
from benchmarks.harness.config.runs import plan, run_from_spec
from benchmarks.harness.results.records import read_metrics
from benchmarks.llama.figures import draw_curves
from benchmarks.llama.outcomes import InstructionOutcomes
from tests.executed import finish, prepare
from tests.fake_runs import write_runs
from tests.instruction_runs import enter, tiny_run


@pytest.fixture(autouse=True)
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    enter(tmp_path, monkeypatch)


def test_looking_at_held_out_rows_changes_no_other_number() -> None:
    looked = finish(prepare(tiny_run("emoe", "lora", training={"eval_every": 2})))
    plain = tiny_run("emoe", "lora")
    del plain.spec["training"]["eval_every"]
    assert plain.spec["training"]["lora"]["dropout"] > 0  # so that training draws
    found = finish(prepare(run_from_spec(plain.spec)))
    points = looked.pop("held_out_curve")
    assert {**looked, "run_id": ""} == {**found, "run_id": ""}
    assert [point["step"] for point in points] == [0, 2, 4, 6]
    losses = [point["loss"] for point in points]
    assert losses[-1] == looked["scores"]["dev"]["own"]["loss"]
    assert losses[0] > losses[-1]
    untuned = finish(prepare(tiny_run("emoe", "base")))
    assert losses[0] == pytest.approx(untuned["scores"]["dev"]["own"]["loss"], abs=1e-6)


def test_held_out_points_get_a_panel_of_their_own() -> None:
    runs = plan(["llama"], "mini")
    write_runs(runs)
    outcomes = InstructionOutcomes(load_benchmark("llama"), runs)
    draw_curves(outcomes, Path("without.png"))
    for run in runs:
        if read_metrics(run)["curve"]:
            points = [{"step": 0, "loss": 3.1}, {"step": 2, "loss": None}, {"step": 3, "loss": 2.0}]
            outcomes.metrics[run.id]["held_out_curve"] = points
    draw_curves(outcomes, Path("with.png"))
    heights = [Image.open(f"{name}.png").height for name in ("without", "with")]
    assert heights[1] > 1.5 * heights[0]
