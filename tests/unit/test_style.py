"""Test that a method has one style in every figure."""

from __future__ import annotations

import pytest

from benchmarks.harness.config.benchmark import MethodsDefinition, benchmark_names, load_benchmark, resolve_methods
from benchmarks.harness.config.methods import load_methods
from benchmarks.harness.report.style import DENSE, EMOE, GMOE, style_of

BENCHMARKS = [name for name in benchmark_names() if isinstance(load_benchmark(name).definition, MethodsDefinition)]


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_a_method_has_the_same_style_in_every_benchmark(benchmark: str) -> None:
    definition = load_benchmark(benchmark).definition
    for name, method in resolve_methods(definition).items():
        kind = definition.methods[name].method or name
        same = load_methods()[kind]
        own = {"selection", "partition", "router", "num_experts", "also_train"} & set(definition.methods[name].given())
        if not own:
            assert style_of(method) == style_of(same), name
    baseline = resolve_methods(definition)[definition.baseline]
    assert style_of(baseline) == (DENSE if baseline.kind == "dense" else EMOE)  # modularity compares ways to cluster


def test_methods_of_one_figure_have_different_styles() -> None:
    methods = load_methods()
    names = ["vanilla", "block", "gmoe", "emoe", "emoe_learn", "random_partition", "all_experts"]
    names += ["gmoe_published", "emoe_published"]
    styles = [style_of(methods[name]) for name in names]
    assert len(set(styles)) == len(styles)
    assert styles[:4:3] == [DENSE, EMOE]
    assert styles[2] == GMOE
    rows = resolve_methods(load_benchmark("glue_lora").definition)
    selected = [style_of(rows[name]) for name in ("lora", "lora_emoe", "lora_bottom", "lora_random", "lora_contiguous")]
    assert len(set(selected)) == len(selected)
