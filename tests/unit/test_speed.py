"""The speed benchmark: what is compared does the same work, times are taken in turn, plans and tables are right."""

from __future__ import annotations

import copy
import functools
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml

from benchmarks.harness.base.errors import DataError, DefinitionError
from benchmarks.harness.config import definition, runs
from benchmarks.harness.config.definition import AnyBenchmark, load_benchmark
from benchmarks.harness.config.kinds import Benchmark
from benchmarks.harness.config.schema import parse
from benchmarks.harness.config.suite import load_suite
from benchmarks.harness.report import report
from benchmarks.harness.report.claims import write_claims
from benchmarks.harness.report.presentation import present
from benchmarks.speed import layer, partition, pipeline, step, timing
from benchmarks.speed.definition import MeasurementDefinition, RunModel, StepSettings
from benchmarks.speed.ffn import CANDIDATES, FFN
from tests import fake_runs
from tests.conftest import ROOT

# what is compared


@pytest.fixture(params=[False, True])
def ffn(request: pytest.FixtureRequest) -> FFN:
    """A plain one without biases, which transformers' plain experts do not have, and a gated one."""
    torch.manual_seed(0)
    found = FFN(8, 32, gated=request.param)
    if not request.param:
        for module in (found.inner, found.outer):
            torch.nn.init.zeros_(module.bias)
    return found


@pytest.mark.usefixtures("always_sparse")
@pytest.mark.parametrize("name", [name for name in CANDIDATES if name != "dense"])
def test_with_all_experts_every_candidate_is_the_dense_ffn(name: str, ffn: FFN) -> None:
    x = torch.randn(10, 8)
    torch.testing.assert_close(CANDIDATES[name](ffn, 4, 4)(x), ffn(x), atol=1e-5, rtol=1e-5)


def test_the_others_choose_the_same_experts(ffn: FFN) -> None:
    x = torch.randn(10, 8)
    expected = CANDIDATES["block_mask"](ffn, 4, 2)(x)
    assert not torch.allclose(expected, ffn(x), atol=1e-3)
    for name in ("transformers_eager", "transformers_grouped"):
        torch.testing.assert_close(CANDIDATES[name](ffn, 4, 2)(x), expected, atol=1e-5, rtol=1e-5)


def test_memory_counts_what_is_kept_and_not_the_weights() -> None:
    net, x = torch.nn.Linear(4, 4), torch.randn(6, 4, requires_grad=True)
    assert layer.kept_bytes(net, functools.partial(net, x)) == 6 * 4 * 4
    assert layer.kept_bytes(net, lambda: net(x).exp()) == 2 * 6 * 4 * 4


# timing


def test_calls_run_in_turn_after_a_round_that_does_not_count() -> None:
    order: list[str] = []
    taken = timing.side_by_side({name: functools.partial(order.append, name) for name in "ab"}, 3)
    assert order == ["a", "b"] * 4
    assert {name: len(seconds) for name, seconds in taken.items()} == {"a": 3, "b": 3}


def test_ratios_are_taken_within_rounds() -> None:
    found = timing.ratios({"dense": [1.0, 2.0, 4.0], "other": [0.5, 1.2, 1.6]}, "dense")
    assert found["other"] == pytest.approx({"ratio": 0.5, "ratio_low": 0.4, "ratio_high": 0.6, "seconds": 1.2})
    assert found["dense"]["ratio"] == 1


# measures


SMALL_LLAMA = {
    "model_type": "llama",
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


class Silent:
    def say(self, text: str) -> None: ...


@pytest.mark.usefixtures("always_sparse")
@pytest.mark.parametrize("measure", ["layer", "step", "decode", "prompt", "generate", "partition"])
def test_each_measure_gives_a_row_a_candidate(measure: str, tmp_path: Path) -> None:
    models = {
        "layer": {"hidden": 16, "neurons": 64, "gated": True},
        "step": {
            "config": {
                "model_type": "bert",
                "vocab_size": 50,
                "hidden_size": 16,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "intermediate_size": 64,
            }
        },
        "decode": {"config": SMALL_LLAMA},
        "prompt": {"config": SMALL_LLAMA},
        "generate": {"config": SMALL_LLAMA},
        "partition": {"hidden": 16, "neurons": 64},
    }
    usual = load_benchmark("speed").definition.measures[measure].settings
    small = {"num_experts": 8, "tokens": 20, "rounds": 2, "batch_size": 2, "length": 4, "starts": 1}
    settings = usual | {name: value for name, value in small.items() if name in usual}
    spec = {"task": {"name": measure}, "model": {"name": "small", **models[measure]}, "settings": settings, "seed": 0}
    threads = torch.get_num_threads()
    found = pipeline.run(spec, tmp_path, Silent())["measured"]
    torch.set_num_threads(threads)
    assert set(settings["candidates"]) <= set(found)
    assert all(row["ratio"] > 0 and row["seconds"] > 0 for row in found.values())
    if measure == "layer":
        assert found["sparse"]["memory_ratio"] < 1
        assert found["sparse"]["expected_ratio"] > 0.25
    if measure == "partition":
        assert 0 < found["emoe"]["inertia"] <= found["kmeans_constrained"]["inertia"] + 0.05 < 1


def test_pictures_are_fed_to_models_that_read_them() -> None:
    config = {"model_type": "vit", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config |= {"intermediate_size": 32, "image_size": 32, "patch_size": 16}
    settings = StepSettings(
        layers="all",
        num_experts=4,
        top_k_fraction=0.5,
        batch_size=2,
        length=9,
        rounds=1,
        threads=1,
        candidates=["masked"],
    )
    assert set(step.measure(RunModel(name="vit", config=config), settings)) == {"dense", "masked"}


def test_keys_are_real_or_made_up_and_the_same_each_time() -> None:
    made_up = RunModel(name="made up", hidden=16, neurons=64)
    made = partition.keys_of(made_up)
    assert made.shape == (64, 16)
    assert torch.equal(made, partition.keys_of(made_up))
    assert partition.keys_of(RunModel(name="real", model="minilm", layer=5)).shape == (1536, 384)


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partition.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="k-means-constrained is not installed"):
        partition.CANDIDATES["kmeans_constrained"](torch.randn(8, 4), 2, 1)


# plans


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"measure": "layers", "model": ["bert-base"]}, "did you mean 'layer'"),
        ({"measure": "layer", "model": ["bert-bass"]}, "did you mean 'bert-base'"),
        ({"measure": "layer", "model": ["bert-base"], "settings": {"token": [1]}}, "did you mean 'tokens'"),
        (
            {"measure": "layer", "model": ["bert-base"], "settings": {"tokens": ["1"]}},
            r"'suites.smoke.grid\[0\].settings.tokens' is '1', but must be integer",
        ),
        (
            {"measure": "layer", "model": ["bert-base"], "settings": {"candidates": [["spars"]]}},
            "did you mean 'sparse'",
        ),
        ({"measure": "layer", "model": ["bert-base", "bert-base"]}, "measures layer bert-base a second time"),
        ({"measure": "layer", "models": ["bert-base"]}, "unknown key"),
    ],
)
def test_a_wrong_grid_is_refused_with_the_nearest_name(block, message, monkeypatch: pytest.MonkeyPatch) -> None:
    content = yaml.safe_load((ROOT / "benchmarks/speed/benchmark.yaml").read_text())
    content["suites"]["smoke"]["grid"] = [block]
    real = load_benchmark("speed")

    def load(name: str) -> AnyBenchmark:
        return Benchmark(name, parse(content, MeasurementDefinition, "benchmark.yaml"), real.tasks)

    monkeypatch.setattr(runs, "load_benchmark", load)
    with pytest.raises(DefinitionError, match=message):
        runs.plan(["speed"], "smoke")


def test_an_unknown_kind_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(definition, "read_yaml", lambda path: {"kind": "speeed"})
    with pytest.raises(DefinitionError, match=r"benchmark.yaml: 'kind' is 'speeed'; did you mean 'speed'"):
        load_benchmark.__wrapped__("speed")


def test_how_often_shapes_the_id_and_not_the_name_of_the_variant() -> None:
    first, *_ = runs.plan(["speed"], "smoke")
    assert first.id.startswith("bert-base-layer-T1024-")
    other = copy.deepcopy(first.spec)
    other["settings"]["rounds"] += 1
    assert runs.run_from_spec(other).id != first.id


# tables, figures, report


@pytest.mark.usefixtures("undrawn")
def test_tables_figures_and_report_show_what_was_measured(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = fake_runs.write(here / "results" / "runs", "speed", benchmarks=("speed",))
    suite = load_suite({"suite": "speed"})
    shown = present(load_benchmark("speed"), made)
    counts = Counter(run.spec["task"]["name"] for run in made)
    counts["decode"] += counts.pop("generate") + counts.pop("prompt")
    assert {table.name: len(table.frame) for table in shown.tables} == {
        f"speed_{name}": n for name, n in counts.items()
    }
    cells = shown.tables[0].texts()
    ratio = fake_runs.measured(made[0])["measured"]["sparse"]["ratio"]
    assert cells.loc[0, "EMoE"] == f"{ratio:.2f} [{0.9 * ratio:.2f}, {1.1 * ratio:.2f}]"
    assert (cells.loc[0, "FFN"], cells.loc[0, "Neurons an expert"]) == ("BERT-base", "48")
    for table in shown.tables:
        table.write(here / "results/speed/tables")
    shown.draw(here / "results/speed/figures")
    write_claims(suite)
    for file in suite.output_files():
        assert (here / file).stat().st_size > 50, file
    report.write_report(suite, here / "report.html")
    page = (here / "report.html").read_text()
    settings = [run.spec["settings"] for run in made if run.spec["task"]["name"] == "layer"]
    quarter = sum(found["dtype"] == "float32" and found["top_k_fraction"] == 0.25 for found in settings)
    assert f"One FFN, forward and backward, float32, k/N 0.25, {quarter} settings: " in page
    assert all(sentence in page for sentence in shown.verdicts)
    assert "Data and training" not in page


@pytest.mark.parametrize(("key", "names"), [("tables", ["layers"]), ("figures", {"layers": "Ratios."})])
def test_tables_and_figures_that_are_not_made_are_named(key: str, names: object, here: Path) -> None:
    made = fake_runs.write(here / "results" / "runs", "smoke", benchmarks=("speed",))
    real = load_benchmark("speed")
    other = Benchmark("speed", real.definition.model_copy(update={key: names}), real.tasks)
    with pytest.raises(DefinitionError, match=f"'{key}' is 'layers', which does not exist; did you mean 'layer'"):
        present(other, made)
