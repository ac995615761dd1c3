"""A run records the origin of its numbers: packages, instructions, commits of sets and weights."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import datasets
import huggingface_hub
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
from benchmarks.llama.instructions import load_instructions
from benchmarks.text.data import load_split

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_packages_instructions_and_what_chooses_kernels_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    captured = environment.capture()
    assert {"torch", "numpy", "transformers", "datasets", "tokenizers", "scikit-learn"} <= set(captured["packages"])
    assert captured["instructions"] == "AVX2"
    facts = environment.fingerprint({"torch": "2"}, ["GPU"])
    assert {"processor", "processor flags", "torch build", "CPU capability", "threads", "package torch"} <= set(facts)
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    assert environment.fingerprint({"torch": "2"}, ["GPU"]) == facts | {"variable MKL_CBWR": "COMPATIBLE"}


@pytest.mark.parametrize(
    ("revision", "read", "written"),
    [
        (COMMIT, COMMIT, f"a/b@{COMMIT}"),
        (COMMIT, "f" * 40, f"a/b@{'f' * 40} (instead of {COMMIT})"),
        (None, None, "a/b@newest (not pinned)"),
    ],
)
def test_a_hub_name_has_the_commit_that_was_read(revision: str | None, read: str | None, written: str) -> None:
    assert hub.hub_name("a/b", revision, read) == written


def serve(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rows: dict[str, list[Any]]) -> None:
    """Let `datasets` load these rows as if from the hub."""
    folder = tmp_path / str(len(list(tmp_path.iterdir()))) / "owner___set" / "default" / "0.0.0" / COMMIT
    datasets.Dataset.from_dict(rows).save_to_disk(str(folder))
    split = datasets.load_from_disk(str(folder))
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *_, **given: split if "split" in given else datasets.DatasetDict(train=split)
    )


def test_sets_of_the_hub_are_recorded_with_their_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, tmp_path, {"premise": ["a"], "hypothesis": ["b"], "label": [1]})
    text = load_benchmark("glue").tasks["hans"]
    assert load_split(text, "test").source == f"jhu-cogsci/hans@{COMMIT} (not pinned) (default), split validation"
    serve(monkeypatch, tmp_path, {"instruction": ["a"], "input": [""], "output": ["b"]})
    alpaca = load_benchmark("llama").tasks["alpaca"].source
    read = load_instructions("alpaca", alpaca).source
    assert read == f"tatsu-lab/alpaca@{COMMIT} (instead of {alpaca.revision})"
    serve(monkeypatch, tmp_path, {"image": [None] * 4, "domain": list("acps"), "label": ["dog"] * 4})
    source = {"folder": "PACS", "hub": "flwrlabs/pacs", "revision": COMMIT}
    task = {"name": "pacs", "domainbed": "PACS", "source": source, "environments": [[name, name] for name in "ACPS"]}
    assert load_set(RunSet.model_validate(task), 0, truncated="refuse").source == f"hub flwrlabs/pacs@{COMMIT}"


def test_weights_of_the_hub_and_of_timm_are_recorded_with_their_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: Any = SimpleNamespace(name_or_path=f"/cache/snapshots/{COMMIT}")
    assert describe({"name": "a", "hub": "b/a", "revision": None}, loaded) == f"b/a@{COMMIT} (not pinned)"
    file = tmp_path / "models--timm--test_vit.r160_in1k" / "snapshots" / COMMIT / "model.safetensors"
    file.parent.mkdir(parents=True)
    save_file(timm.create_model("test_vit.r160_in1k").state_dict(), file)
    download = mock.Mock(return_value=str(file))
    monkeypatch.setattr("timm.models._hub.hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: str(file))
    model = {"name": "test", "timm": "test_vit.r160_in1k", "revision": COMMIT}
    assert load_image_classifier(model, 2, 160, 0.0, 0).source["from"] == f"timm/test_vit.r160_in1k@{COMMIT}"
    options = download.call_args.kwargs
    assert (options["repo_id"], options["revision"]) == ("timm/test_vit.r160_in1k", COMMIT)


def test_sets_and_models_of_the_hub_are_pinned_but_for_known_ones() -> None:
    models = {name for name, model in load_models().items() if (model.hub or model.timm) and not model.random}
    loose = {name for name in models if not hub.is_commit(load_models()[name].revision)}
    for name in benchmark_names():
        for key, task in load_benchmark(name).tasks.items():
            source = task.model_dump().get("source", {})
            if "hub" in source and not hub.is_commit(source["revision"]):
                loose.add(key)
    assert loose == {"vit-large", "office_home", "sick_relatedness", "sick_entailment", "hans"}
