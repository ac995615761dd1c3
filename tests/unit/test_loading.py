"""Load models: safetensors only, complete, without code of their own; and record the origin of all numbers."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import datasets
import huggingface_hub
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import emoe
from benchmarks.domainbed.definition import RunImageSet
from benchmarks.domainbed.validation import load_set
from benchmarks.harness.base import MODEL_ROOT, DataError
from benchmarks.harness.config.benchmark import benchmark_names, load_benchmark
from benchmarks.harness.config.catalogue import ModelSpec, load_models
from benchmarks.harness.config.method_specs import MethodSpec
from benchmarks.harness.models import loading
from benchmarks.harness.models.build import build_seq2seq
from benchmarks.harness.models.image import load_image_classifier
from benchmarks.harness.models.partitions import partition_keys
from benchmarks.harness.run import environment
from benchmarks.harness.sources import hub
from benchmarks.llama.instructions import load_instructions
from benchmarks.text.data import load_whole_part
from emoe.errors import EMoEError
from tests import tiny_models
from tests.tiny_hub import write_models, write_seq2seq

CODE = "from pathlib import Path\nPath('executed').touch()\n"
LOADERS: dict[str, tuple[str, Callable[[ModelSpec], Any]]] = {
    "classifier": ("bert-base-cased", lambda model: loading.load_classifier(model, 2, 0, 0)),
    "backbone": ("gpt2", loading.load_backbone),
    "language": ("gpt2", loading.load_language_model),
    "seq2seq": ("t5", loading.load_seq2seq),
    "image": ("dinov2", lambda model: load_image_classifier(model, 3, 28, 0.0, 0)),
    "timm": (
        "test_vit",
        lambda model: load_image_classifier(
            model.model_copy(update={"timm": "test_vit"}), 3, 160, 0.0, 0
        ),
    ),
    "tokenizer": ("gpt2", loading.load_tokenizer),
}


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:500])


def replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def pickle_weights(path: Path) -> None:
    torch.save(load_file(path), path.with_name("pytorch_model.bin"))
    path.unlink()


def change_tensor(
    change: Callable[[dict[str, torch.Tensor], str], object],
) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        tensors = load_file(path)
        ends = ("fc1.weight", "c_fc.weight", "dense.weight", "wi.weight")
        change(tensors, next(name for name in tensors if name.endswith(ends)))
        save_file(tensors, path, {"format": "pt"})

    return damage


def edit_config(**values: Any) -> Callable[[Path], None]:
    return lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | values))


def ask_for_code(path: Path) -> None:
    kinds = (
        "Config",
        "Model",
        "ModelForCausalLM",
        "ModelForSequenceClassification",
        "ModelForSeq2SeqLM",
    )
    names = {f"Auto{kind}": "code.Anything" for kind in (*kinds, "ModelForImageClassification")}
    edit_config(auto_map=names, model_type="unknown")(path)
    path.with_name("code.py").write_text(CODE)


def ask_for_code_of_tokenizer(path: Path) -> None:
    path.unlink()
    settings = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["code.Own", None]}}
    path.with_name("tokenizer_config.json").write_text(json.dumps(settings))
    path.with_name("code.py").write_text(CODE)


WEIGHTS, CONFIG, ROW = "model.safetensors", "config.json", torch.zeros(3, 5)
DAMAGE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "no weights": (WEIGHTS, Path.unlink),
    "cut weights": (WEIGHTS, cut),
    "pickled weights": (WEIGHTS, pickle_weights),
    "a tensor is missing": (WEIGHTS, change_tensor(lambda tensors, name: tensors.pop(name))),
    "a tensor has another shape": (
        WEIGHTS,
        change_tensor(lambda tensors, name: tensors.update({name: ROW})),
    ),
    "no settings": (CONFIG, Path.unlink),
    "settings are no JSON": (CONFIG, lambda path: path.write_text("{")),
    "no head": (CONFIG, edit_config(architectures=["GPT2Model"], tie_word_embeddings=False)),
    "code of its own": (CONFIG, ask_for_code),
    "attention from a hub": (
        CONFIG,
        edit_config(attn_implementation="kernels-community/flash-attn2"),
    ),
    "cut tokenizer": ("tokenizer.json", cut),
    "a tokenizer's own code": ("tokenizer.json", ask_for_code_of_tokenizer),
    "a pipe as tokenizer": ("tokenizer.json", replace_by_pipe),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_models(folder, ["bert-base-cased", "gpt2"])
    write_seq2seq(folder, "t5", 2)
    tiny_models.build("dinov2").save_pretrained(folder / "dinov2")
    (folder / "test_vit").mkdir()
    save_file(timm.create_model("test_vit").state_dict(), folder / "test_vit" / WEIGHTS)
    return folder


@pytest.fixture
def model_root(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    monkeypatch.setenv(MODEL_ROOT, str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys, "stdin", io.StringIO("y\n" * 9)
    )  # transformers asks whether it may run code
    return tmp_path


@pytest.mark.parametrize(
    ("damage", "kind"),
    [
        *(
            (damage, "classifier")
            for damage in DAMAGE
            if damage != "no head" and "tokenizer" not in damage
        ),
        *((damage, "tokenizer") for damage in DAMAGE if "tokenizer" in damage),
        ("no head", "language"),
        *((damage, kind) for damage in DAMAGE if "tensor" in damage for kind in ("image", "timm")),
        *(("code of its own", kind) for kind in ("backbone", "language", "seq2seq", "image")),
    ],
)
def test_a_damaged_folder_is_refused_in_one_line(model_root: Path, damage: str, kind: str) -> None:
    name, load = LOADERS[kind]
    file, change = DAMAGE[damage]
    change(model_root / name / file)
    with pytest.raises(DataError) as caught:
        load(ModelSpec(name=name, hub=f"nobody/{name}"))
    assert str(model_root / name) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (model_root / "executed").exists()


@pytest.mark.parametrize("kind", LOADERS)
def test_a_whole_folder_loads(model_root: Path, kind: str) -> None:
    name, load = LOADERS[kind]
    assert load(ModelSpec(name=name, hub=f"nobody/{name}"))


@pytest.mark.parametrize("weights", [None, "bf16"])
def test_only_the_clustered_weights_of_a_language_model_change_their_type(
    model_root: Path, weights: str | None
) -> None:
    """The partition is that of the model that a run loads, or the run would cluster again."""
    tiny_models.build_generator("llama").half().save_pretrained(model_root / "llama")
    model = ModelSpec(name="llama", hub="nobody/llama", modality="language", weights=weights)
    config = emoe.EMoEConfig(num_experts=4, top_k=1, layers=[1])
    loaded = loading.load_language_model_to_cluster(model, [1])
    assert partition_keys(loaded, config) == partition_keys(
        loading.load_language_model(model), config
    )
    types = {parameter.dtype for parameter in loaded.parameters() if parameter.ndim > 1}
    assert types == {torch.float16, torch.bfloat16 if weights == "bf16" else torch.float32}
    assert sum(parameter.dtype != torch.float16 for parameter in loaded.parameters()) == 1


def test_a_table_that_encoder_and_decoder_share_counts_once(model_root: Path) -> None:
    """In T5 1.1, the head has a weight of its own, so the table is only looked up."""
    method = MethodSpec(name="vanilla", variant="", config=None)
    model = ModelSpec(name="t5", hub="nobody/t5", modality="seq2seq")
    spec = SimpleNamespace(model=model, method=method, seed=0, training=None)
    with_one_table = build_seq2seq(spec).summary

    edit_config(tie_word_embeddings=False)(model_root / "t5" / CONFIG)
    file = model_root / "t5" / WEIGHTS
    weights = load_file(file)
    table = weights["shared.weight"]
    save_file({**weights, "lm_head.weight": torch.randn_like(table)}, file, {"format": "pt"})
    with_own_head = build_seq2seq(spec).summary
    assert with_own_head["parameters"] == with_one_table["parameters"] + table.numel()
    assert with_own_head["flops_per_token"] == with_one_table["flops_per_token"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("test_resnet", "no FFN row for architecture 'ResNet'"),
        (
            "deit_tiny_distilled_patch16_224",
            "the head of the model 'other' is not one linear layer",
        ),
    ],
)
def test_an_architecture_of_timm_with_another_form_is_refused(name: str, message: str) -> None:
    model = ModelSpec(name="other", modality="image", timm=name, random=True)
    with pytest.raises(EMoEError, match=message):
        load_image_classifier(model, 3, 32, 0.0, 0)


def test_a_model_that_is_nowhere_names_the_remedy(model_root: Path) -> None:
    with pytest.raises(
        DataError, match=r"could not load the model 'nobody/bert': .*below model_root"
    ):
        loading.load_backbone(ModelSpec(name="bert", hub="nobody/bert"))


def test_a_model_of_the_hub_is_recorded_with_its_commit(
    model_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(MODEL_ROOT)
    commit = "a" * 40
    (model_root / "bert-base-cased").rename(model_root / commit)
    requests = []

    def download(name: str, **options: Any) -> str:
        requests.append((name, options["revision"]))
        assert not any(pattern.endswith((".bin", ".py")) for pattern in options["allow_patterns"])
        return str(model_root / commit)

    monkeypatch.setattr(loading, "snapshot_download", download)
    model = ModelSpec(name="bert", hub="somebody/bert", revision="main")
    assert (
        loading.source_of(model, loading.load_backbone(model))["from"]
        == f"somebody/bert@{commit} (not pinned)"
    )
    assert requests == [("somebody/bert", "main")]


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_packages_instruction_sets_and_kernel_settings_are_recorded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    captured = environment.capture()
    assert {"torch", "numpy", "transformers", "datasets", "tokenizers", "scikit-learn"} <= set(
        captured["packages"]
    )
    facts = environment.fingerprint(captured)
    assert {"processor", "processor flags", "torch build", "threads", "package torch"} <= set(facts)
    assert facts["CPU capability"] == "AVX2"
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    assert environment.fingerprint(captured) == facts | {"variable MKL_CBWR": "COMPATIBLE"}


def serve(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rows: dict[str, list[Any]]) -> None:
    """Let `datasets` load these rows as if from the hub."""
    folder = (
        tmp_path / str(len(list(tmp_path.iterdir()))) / "owner___set" / "default" / "0.0.0" / COMMIT
    )
    datasets.Dataset.from_dict(rows).save_to_disk(str(folder))
    split = datasets.load_from_disk(str(folder))
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda *_, **given: split if "split" in given else datasets.DatasetDict(train=split),
    )


def test_sets_of_the_hub_are_recorded_with_their_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(monkeypatch, tmp_path, {"premise": ["a"], "hypothesis": ["b"], "label": [1]})
    text = load_benchmark("glue").tasks["hans"]
    assert (
        load_whole_part(text, "test").source
        == f"jhu-cogsci/hans@{COMMIT} (not pinned) (default), split validation"
    )
    serve(monkeypatch, tmp_path, {"instruction": ["a"], "input": [""], "output": ["b"]})
    alpaca = load_benchmark("llama").tasks["alpaca"].source
    read = load_instructions("alpaca", alpaca).source
    assert read == f"tatsu-lab/alpaca@{COMMIT} (instead of {alpaca.revision})"
    serve(
        monkeypatch, tmp_path, {"image": [None] * 4, "domain": list("acps"), "label": ["dog"] * 4}
    )
    source = {"folder": "PACS", "hub": "flwrlabs/pacs", "revision": COMMIT}
    task = {
        "name": "pacs",
        "domainbed": "PACS",
        "source": source,
        "environments": [[name, name] for name in "ACPS"],
    }
    assert (
        load_set(RunImageSet.model_validate(task), 0, truncated="refuse").source
        == f"hub flwrlabs/pacs@{COMMIT}"
    )


def test_weights_of_timm_are_recorded_with_their_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = (
        tmp_path / "models--timm--test_vit.r160_in1k" / "snapshots" / COMMIT / "model.safetensors"
    )
    file.parent.mkdir(parents=True)
    save_file(timm.create_model("test_vit.r160_in1k").state_dict(), file)
    download = mock.Mock(return_value=str(file))
    monkeypatch.setattr("timm.models._hub.hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: str(file))
    model = ModelSpec(name="test", timm="test_vit.r160_in1k", revision=COMMIT)
    assert (
        load_image_classifier(model, 2, 160, 0.0, 0).source["from"]
        == f"timm/test_vit.r160_in1k@{COMMIT}"
    )
    options = download.call_args.kwargs
    assert (options["repo_id"], options["revision"]) == ("timm/test_vit.r160_in1k", COMMIT)


def test_sets_and_models_of_the_hub_are_pinned_except_known_ones() -> None:
    models = {
        name
        for name, model in load_models().items()
        if (model.hub or model.timm) and not model.random
    }
    loose = {name for name in models if not hub.is_commit(load_models()[name].revision)}
    for name in benchmark_names():
        for key, task in load_benchmark(name).tasks.items():
            source = task.model_dump().get("source", {})
            if "hub" in source and not hub.is_commit(source["revision"]):
                loose.add(key)
    assert loose == {"vit-large", "office_home", "sick_relatedness", "sick_entailment", "hans"}
