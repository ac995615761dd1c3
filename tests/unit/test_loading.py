"""Load models by one set of rules: safetensors only, complete, without code of their own; errors are one line."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.harness.base import MODEL_ROOT, DataError
from benchmarks.harness.models import loading
from benchmarks.harness.models.image import load_image_classifier
from tests import tiny_models
from tests.tiny_hub import write_models, write_seq2seq

CODE = "from pathlib import Path\nPath('executed').touch()\n"
LOADERS: dict[str, tuple[str, Callable[[dict[str, Any]], Any]]] = {
    "classifier": ("bert-base-cased", lambda model: loading.load_classifier(model, 2, 0, 0)),
    "backbone": ("gpt2", loading.load_backbone),
    "language": ("gpt2", loading.load_language_model),
    "seq2seq": ("t5", loading.load_seq2seq),
    "image": ("dinov2", lambda model: load_image_classifier(model, 3, 28, 0.0, 0)),
}


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:500])


def pickle_weights(path: Path) -> None:
    torch.save(load_file(path), path.with_name("pytorch_model.bin"))
    path.unlink()


def change_tensor(change: Callable[[dict[str, torch.Tensor], str], object]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        tensors = load_file(path)
        ends = ("fc1.weight", "c_fc.weight", "dense.weight", "wi.weight")
        change(tensors, next(name for name in tensors if name.endswith(ends)))
        save_file(tensors, path, {"format": "pt"})

    return damage


def edit_config(**values: Any) -> Callable[[Path], None]:
    return lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | values))


def ask_for_code(path: Path) -> None:
    kinds = ("Config", "Model", "ModelForCausalLM", "ModelForSequenceClassification", "ModelForSeq2SeqLM")
    names = {f"Auto{kind}": "code.Anything" for kind in (*kinds, "ModelForImageClassification")}
    edit_config(auto_map=names, model_type="unknown")(path)
    path.with_name("code.py").write_text(CODE)


WEIGHTS, CONFIG, ROW = "model.safetensors", "config.json", torch.zeros(3, 5)
DAMAGE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "no weights": (WEIGHTS, Path.unlink),
    "cut weights": (WEIGHTS, cut),
    "pickled weights": (WEIGHTS, pickle_weights),
    "a tensor is missing": (WEIGHTS, change_tensor(lambda tensors, name: tensors.pop(name))),
    "a tensor has another shape": (WEIGHTS, change_tensor(lambda tensors, name: tensors.update({name: ROW}))),
    "no settings": (CONFIG, Path.unlink),
    "settings are no JSON": (CONFIG, lambda path: path.write_text("{")),
    "code of its own": (CONFIG, ask_for_code),
    "attention from a hub": (CONFIG, edit_config(attn_implementation="kernels-community/flash-attn2")),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_models(folder, ["bert-base-cased", "gpt2"])
    write_seq2seq(folder, "t5", 2)
    tiny_models.build("dinov2").save_pretrained(folder / "dinov2")
    return folder


@pytest.fixture
def model_root(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    monkeypatch.setenv(MODEL_ROOT, str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))  # transformers asks whether it may run code
    return tmp_path


@pytest.mark.parametrize(
    ("damage", "kind"),
    [*((damage, "classifier") for damage in DAMAGE), *(("code of its own", kind) for kind in LOADERS)],
)
def test_a_damaged_folder_is_refused_in_one_line(model_root: Path, damage: str, kind: str) -> None:
    name, load = LOADERS[kind]
    file, change = DAMAGE[damage]
    change(model_root / name / file)
    with pytest.raises(DataError) as caught:
        load({"name": name, "hub": f"nobody/{name}"})
    assert str(model_root / name) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (model_root / "executed").exists()


@pytest.mark.parametrize("kind", LOADERS)
def test_a_whole_folder_loads(model_root: Path, kind: str) -> None:
    name, load = LOADERS[kind]
    assert load({"name": name, "hub": f"nobody/{name}"})


@pytest.mark.parametrize("damage", ["cut", "code"])
def test_a_damaged_tokenizer_is_refused_in_one_line(model_root: Path, damage: str) -> None:
    folder = model_root / "gpt2"
    if damage == "code":
        (folder / "tokenizer.json").unlink()
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps({"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["code.Own", None]}}))
        (folder / "code.py").write_text(CODE)
    else:
        cut(folder / "tokenizer.json")
    with pytest.raises(DataError) as caught:
        loading.load_tokenizer({"name": "gpt2", "hub": "nobody/gpt2"})
    assert "\n" not in str(caught.value)
    assert not (model_root / "executed").exists()


def test_a_model_that_is_nowhere_names_the_remedy(model_root: Path) -> None:
    with pytest.raises(DataError, match=r"could not load the model 'nobody/bert': .*below model_root"):
        loading.load_backbone({"name": "bert", "hub": "nobody/bert"})


def test_a_model_of_the_hub_is_recorded_with_its_commit(model_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(MODEL_ROOT)
    commit = "a" * 40
    (model_root / "bert-base-cased").rename(model_root / commit)
    requests = []

    def download(name: str, **options: Any) -> str:
        requests.append((name, options["revision"]))
        assert not any(pattern.endswith((".bin", ".py")) for pattern in options["allow_patterns"])
        return str(model_root / commit)

    monkeypatch.setattr(loading, "snapshot_download", download)
    model = {"name": "bert", "hub": "somebody/bert", "revision": "main"}
    assert loading.describe(model, loading.load_backbone(model)) == f"somebody/bert@{commit} (not pinned)"
    assert requests == [("somebody/bert", "main")]
