"""``python -m emoe``: model folders converted, shown and folded back from the shell."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

import emoe
from emoe.__main__ import cli
from emoe.layer import routed_layers
from tests import classifiers
from tests.model_folders import assert_same, edit_json, loaded, save, tensors

SIZE = ("--num-experts", 8, "--top-k", 2)
UNREADABLE = "9" * 5000  # Python reads no number of more than 4,300 digits


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    folder = tmp_path / "bert"
    classifiers.bert(None).save_pretrained(folder)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "vocab.txt").write_text("[PAD]\n")
    return folder


@pytest.fixture(params=["bert", "vit"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "vit":
        return save("VisionTransformer", tmp_path / "vit")
    return request.getfixturevalue("bert")


def call(*arguments: object, fails: bool = False) -> str:
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert (result.exit_code != 0) == fails, result.output
    assert not result.exception or isinstance(result.exception, SystemExit)
    return result.output


def assert_refused(*arguments: object, message: str) -> None:
    """Expect one line of error, and no new folder."""
    lines = call(*arguments, fails=True).strip().splitlines()
    assert lines[-1].startswith("error: ")
    assert message in lines[-1]
    assert not Path(str(arguments[3])).exists()


def test_convert_inspect_and_fold_back(source: Path, tmp_path: Path) -> None:
    out, dense = tmp_path / "out", tmp_path / "dense"
    text = call(
        "convert", source, "--output", out, *SIZE, "--layers", "last:2", "--set", "selection=bottom"
    )
    assert "% of FFN neurons active" in text
    shown = call("inspect", out)
    assert re.search(r'^selection +"bottom" +\*$', shown, re.MULTILINE)
    layers = routed_layers(loaded(out))
    assert [layer.config.selection for layer in layers] == ["bottom", "bottom"]
    for layer in layers:  # its number, experts, neurons and an expert's neurons
        width = len(layer.ffn.proj_in.weight)
        row = rf"^ *{layer.ffn.index} +8 +{width} +{width // 8}$"
        assert re.search(row, shown, re.MULTILINE)
    call("to-dense", out, "--output", dense, "--restore-order")
    assert_same(tensors(dense), tensors(source))
    assert all(
        (dense / file.relative_to(source)).exists() for file in source.rglob("*")
    )  # vocabulary too


def test_published_settings_and_copies(bert: Path, tmp_path: Path) -> None:
    call(
        "convert",
        bert,
        "--output",
        tmp_path / "a",
        *SIZE,
        "--layers",
        "1,3",
        "--as-published",
        "tutel",
    )
    assert '"per_expert"' in call("inspect", tmp_path / "a")
    call(
        "convert",
        bert,
        "--output",
        tmp_path / "b",
        "--kind",
        "gmoe",
        "--num-experts",
        3,
        "--top-k",
        2,
    )
    assert [layer.config.kind for layer in routed_layers(loaded(tmp_path / "b"))] == ["gmoe"]
    assert_refused("to-dense", tmp_path / "b", "--output", tmp_path / "c", message="no dense equal")


def test_wrong_settings_and_folders_are_named(bert: Path, tmp_path: Path) -> None:
    out, converted = tmp_path / "out", tmp_path / "converted"
    call("convert", bert, "--output", converted, *SIZE)
    for words, message in (
        (
            ("convert", bert, "--output", out, "--num-experts", 7, "--top-k", 2),
            "64 neurons cannot be split into 7",
        ),
        (("convert", bert, "--output", out, *SIZE, "--set", "selection"), "write name=value"),
        (
            ("convert", bert, "--output", out, *SIZE, "--partition", "coactivation"),
            "needs calibration data",
        ),
        (("convert", bert, "--output", out, *SIZE, "--layers", UNREADABLE), "is invalid"),
        (("convert", bert, "--output", out, *SIZE, "--set", f"version={UNREADABLE}"), "version is"),
        (("convert", bert, "--output", out, *SIZE, "--set", "score=" + "[" * 100_000), "score is"),
        (("convert", "no/such-model", "--output", out, *SIZE), "the hub gave no model"),
        (("convert", converted, "--output", out, *SIZE), "holds experts already"),
        (("to-dense", bert, "--output", out), "holds no experts"),
    ):
        assert_refused(*words, message=message)
    assert "is not empty" in call("convert", bert, "--output", bert, *SIZE, fails=True)


def test_the_current_folder_is_refused_before_the_model_is_converted(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    text = call("convert", bert, "--output", ".", *SIZE, fails=True)
    assert text == "error: . is the current folder; name a new folder\n"


@pytest.mark.parametrize("exists", [True, False])
def test_the_new_folder_may_be_a_link(exists: bool, bert: Path, tmp_path: Path) -> None:
    real = tmp_path / "real"
    if exists:
        real.mkdir()
    link = tmp_path / "link"
    link.symlink_to(real)
    call("convert", bert, "--output", link, *SIZE)
    assert link.is_symlink()
    assert routed_layers(loaded(real))


def unsafe_shard(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    index = {"metadata": {}, "weight_map": {"a": "../outside.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def own_code(folder: Path) -> None:
    (folder / "own.py").write_text("raise SystemExit('it ran')")
    auto_map = {"AutoModel": "own.X", "AutoConfig": "own.X"}
    edit_json(folder / "config.json", architectures=None, model_type="own", auto_map=auto_map)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda folder: edit_json(folder / "config.json", architectures=["NoSuchModel"]),
            "names 'NoSuchModel'",
        ),
        (
            lambda folder: edit_json(folder / "config.json", hidden_size="x"),
            "cannot be loaded by BertFor",
        ),
        (unsafe_shard, "must be a .safetensors file of this folder"),
        (own_code, "cannot be loaded by AutoModel"),
    ],
)
def test_damaged_folders_are_one_line_and_run_no_code(
    bert: Path, tmp_path: Path, change: Callable[[Path], None], message: str
) -> None:
    converted = tmp_path / "converted" / "bert"
    call("convert", bert, "--output", converted, *SIZE)
    for command, folder, options in (("convert", bert, SIZE), ("to-dense", converted, ())):
        change(folder)
        assert_refused(command, folder, "--output", tmp_path / "out", *options, message=message)


def test_the_hubs_cache_of_links_is_converted(bert: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "cache" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    bert.rename(tmp_path / "cache" / "blobs")
    for name in ("config.json", "model.safetensors", "1_Pooling/vocab.txt"):
        (snapshot / Path(name).name).symlink_to(tmp_path / "cache" / "blobs" / name)
    (tmp_path / "secret.txt").write_text("secret")
    (snapshot / "outside.txt").symlink_to(tmp_path / "secret.txt")
    call("convert", snapshot, "--output", tmp_path / "out", *SIZE)
    assert not (tmp_path / "out" / "outside.txt").exists()
    assert (tmp_path / "out" / "vocab.txt").read_text()


@pytest.mark.parametrize("method", ["emoe", "emoe-learn"])
def test_a_folder_that_the_models_library_saved_is_shown_and_folded_back(
    method: str, tmp_path: Path
) -> None:
    model, folder, out = (
        classifiers.bert(classifiers.METHODS[method]),
        tmp_path / "saved",
        tmp_path / "dense",
    )
    model.save_pretrained(folder)
    assert "the original order of the neurons is unknown" in call("inspect", folder)
    assert_refused(
        "to-dense", folder, "--output", out, "--restore-order", message="leave out restore_order"
    )
    call("to-dense", folder, "--output", out)
    assert "emoe" not in json.loads((out / "config.json").read_text())
    assert_same(tensors(out), emoe.to_dense_(model).state_dict())
