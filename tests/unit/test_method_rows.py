"""What a method is stands once, in methods.yaml; benchmarks and suites say what differs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.harness import base as paths
from benchmarks.harness.base import DefinitionError
from benchmarks.harness.config import benchmark, methods
from benchmarks.harness.config.benchmark import MethodsDefinition, TrainingPart, resolve_methods
from benchmarks.harness.config.methods import Method, load_methods

METHODS = {
    "vanilla": {"title": "Vanilla", "role": "baseline", "kind": "dense"},
    "emoe": {"title": "EMoE", "kind": "emoe"},
    "all_experts": {"title": "All", "kind": "emoe", "top_k_fraction": 1.0},
    "gmoe": {"title": "GMoE", "kind": "gmoe"},
}


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """The rows of a benchmark that compares these methods, or of its suite, with all that is given of each."""
    known = {name: Method.model_validate(method) for name, method in METHODS.items()}
    monkeypatch.setattr(benchmark, "load_methods", lambda: known)

    def use(methods: dict[str, Any], suite: dict[str, Any] | None = None, **benchmark: Any) -> dict[str, Any]:
        content = {"kind": "text", "version": 1, "title": "A", "tables": ["a"], "baseline": "vanilla", **benchmark}
        definition = MethodsDefinition.model_validate(content | {"methods": methods})
        part = TrainingPart.model_validate(suite or {})
        resolved = resolve_methods(definition, part.method_defaults, part.methods)
        return {name: method.model_dump() for name, method in resolved.items()}

    return use


def test_a_row_is_the_method_of_its_name_or_of_the_one_it_names_with_the_defaults_of_its_kind(rows) -> None:
    defaults = {"emoe": {"top_k_fraction": 0.25}, "gmoe": {"top_k": 2}}
    lora = {"method": "vanilla", "title": "LoRA"}
    resolved = rows({"vanilla": {}, "lora": lora, "all_experts": {}, "gmoe": {}}, method_defaults=defaults)
    assert resolved["vanilla"] == {"title": "Vanilla", "role": "baseline", "noise": 0.0, "kind": "dense"}
    assert resolved["lora"] == resolved["vanilla"] | {"title": "LoRA"}
    assert (resolved["all_experts"]["top_k_fraction"], resolved["gmoe"]["top_k"]) == (1.0, 2)
    assert "top_k_fraction" not in rows({"emoe": {"top_k": 4}}, method_defaults=defaults)["emoe"]


def test_the_nearest_setting_holds(rows) -> None:
    defaults = {"emoe": {"layers": [10], "num_experts": 64, "top_k_fraction": 0.25}}
    for settings, wanted in (
        ({}, ([10], 64, 0.25)),
        ({"suite": {"method_defaults": {"emoe": {"layers": [1]}}}}, ([1], 64, 0.25)),
        ({"row": {"layers": [2]}, "suite": {"method_defaults": {"emoe": {"layers": [1]}}}}, ([2], 64, 0.25)),
        ({"row": {"layers": [2]}, "suite": {"methods": {"emoe": {"layers": [3]}}}}, ([3], 64, 0.25)),
    ):
        row = rows({"emoe": settings.get("row", {})}, settings.get("suite", {}), method_defaults=defaults)["emoe"]
        assert (row["layers"], row["num_experts"], row["top_k_fraction"]) == wanted


@pytest.mark.parametrize(
    ("name", "message"),
    [("brokne", "No module named 'brokne'"), ("broken", "No module named 'no_such_package'")],
)
def test_a_plugin_that_cannot_be_imported_is_named(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = yaml.safe_load((paths.BENCHMARKS / "methods.yaml").read_text())
    (tmp_path / "methods.yaml").write_text(yaml.safe_dump(content | {"plugins": [name]}))
    (tmp_path / "broken.py").write_text("import no_such_package\n")
    monkeypatch.setattr(methods, "BENCHMARKS", tmp_path)
    monkeypatch.setattr(methods, "ROOT", tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(DefinitionError, match=rf"/methods\.yaml: 'plugins' names '{name}', .*{message}"):
        load_methods.__wrapped__()
