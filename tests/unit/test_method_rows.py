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
        found = resolve_methods(definition, part.method_defaults, part.methods)
        return {name: method.model_dump() for name, method in found.items()}

    return use


def test_a_row_is_the_method_of_its_name_or_of_the_one_it_names(rows) -> None:
    found = rows({"vanilla": {}, "lora": {"method": "vanilla", "title": "LoRA"}})
    assert found["vanilla"] == {"title": "Vanilla", "role": "baseline", "noise": 0.0, "kind": "dense"}
    assert found["lora"] == found["vanilla"] | {"title": "LoRA"}
    assert list(rows({"emoe": {}, "vanilla": {}})) == ["emoe", "vanilla"]


def test_the_nearest_setting_holds(rows) -> None:
    defaults = {"emoe": {"layers": [10], "num_experts": 64, "top_k_fraction": 0.25}}
    for settings, wanted in (
        ({}, ([10], 64, 0.25)),
        ({"suite": {"method_defaults": {"emoe": {"layers": [1]}}}}, ([1], 64, 0.25)),
        ({"row": {"layers": [2]}, "suite": {"method_defaults": {"emoe": {"layers": [1]}}}}, ([2], 64, 0.25)),
        ({"row": {"layers": [2]}, "suite": {"methods": {"emoe": {"layers": [3]}}}}, ([3], 64, 0.25)),
    ):
        found = rows({"emoe": settings.get("row", {})}, settings.get("suite", {}), method_defaults=defaults)["emoe"]
        assert (found["layers"], found["num_experts"], found["top_k_fraction"]) == wanted


def test_defaults_are_for_a_kind_and_leave_what_a_method_is(rows) -> None:
    defaults = {"emoe": {"top_k_fraction": 0.25}, "gmoe": {"top_k": 2}}
    found = rows({"vanilla": {}, "all_experts": {}, "gmoe": {}}, method_defaults=defaults)
    assert not {"top_k", "top_k_fraction"} & set(found["vanilla"])
    assert found["all_experts"]["top_k_fraction"] == 1.0
    assert found["gmoe"]["top_k"] == 2


def test_k_in_one_form_replaces_k_in_the_other(rows) -> None:
    found = rows({"emoe": {"top_k": 4}, "all_experts": {}}, method_defaults={"emoe": {"top_k_fraction": 0.5}})
    assert "top_k_fraction" not in found["emoe"]
    found = rows({"all_experts": {"top_k": 24}}, {"method_defaults": {"emoe": {"top_k_fraction": 0.5}}})
    assert (found["all_experts"]["top_k"], "top_k_fraction" in found["all_experts"]) == (24, False)


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Read a methods.yaml like the real one, with a method more and plugins."""
    content = yaml.safe_load((paths.BENCHMARKS / "methods.yaml").read_text())
    monkeypatch.setattr(methods, "BENCHMARKS", tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(methods, "ROOT", tmp_path)

    def use(method: object = None, plugins: object = ()) -> dict[str, Any]:
        methods = content["methods"] | ({"mine": method} if method else {})
        (tmp_path / "methods.yaml").write_text(yaml.safe_dump({"plugins": list(plugins), "methods": methods}))
        return load_methods.__wrapped__()["mine"].given()

    return use


def test_a_plugin_makes_its_router_and_its_tuning_known(read, tmp_path: Path) -> None:
    (tmp_path / "my_router.py").write_text(
        "import emoe\nfrom benchmarks.harness.config.methods import register_tuning\n"
        "emoe.register_router('linear', type('Linear', (emoe.Router,), {}))\n"
        "register_tuning('bias', lambda model, layers: [])\n"
    )
    named = {"title": "Mine", "kind": "emoe", "router": "linear", "weighting": "softmax", "tune": "bias"}
    assert read(named, plugins=["my_router"]) == named
    for key, wrong, nearest in (("router", "linaer", "linear"), ("tune", "bais", "bias")):
        with pytest.raises(DefinitionError, match=rf"'methods\.mine\.{key}' is '{wrong}'; did you mean '{nearest}'"):
            read({**named, key: wrong}, plugins=["my_router"])


@pytest.mark.parametrize(
    ("name", "message"),
    [("brokne", "did you mean 'broken'"), ("broken", "cannot be imported: No module named 'no_such_package'")],
)
def test_a_plugin_that_cannot_be_imported_is_named(read, tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "broken.py").write_text("import no_such_package\n")
    with pytest.raises(DefinitionError, match=rf"/methods\.yaml: 'plugins' names '{name}', .*{message}"):
        read(plugins=[name])
