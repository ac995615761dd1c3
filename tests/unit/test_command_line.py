"""``python -m emoe``: model folders converted, shown and folded back from the shell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import emoe
from emoe.__main__ import cli
from emoe.layer import routed_layers


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=60, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64)
    folder = tmp_path / "bert"
    BertForSequenceClassification(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("[PAD]\n")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    return folder


@pytest.fixture
def vit(tmp_path: Path) -> Path:
    from emoe.stock import save_weights

    torch.manual_seed(0)
    folder = tmp_path / "vit"
    folder.mkdir()
    save_weights(timm.create_model("test_vit"), folder)
    return folder


def edit_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def call(*arguments: object, fails: bool = False) -> str:
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert (result.exit_code != 0) == fails, result.output
    assert not result.exception or isinstance(result.exception, SystemExit)
    return result.output


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_convert_inspect_and_fold_back(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    source, out, dense = request.getfixturevalue(kind), tmp_path / "out", tmp_path / "dense"
    size = ("--num-experts", 8, "--top-k", 2, "--layers", "last:2")
    text = call("convert", source, out, *size, "--set", "selection=bottom")
    assert "2 of" in text
    assert "% of FFN neurons active" in text
    text = call("inspect", out)
    assert '"bottom"' in text
    assert "emoe_partition.safetensors" in text
    found = json.loads(call("inspect", out, "--json"))
    assert found["config"]["selection"] == "bottom"
    assert [row["experts"] for row in found["layers"]] == [8, 8]
    assert found["files"].keys() == {path.name for path in out.iterdir() if path.is_file()}
    loader = BertForSequenceClassification if kind == "bert" else timm.create_model
    model = emoe.from_pretrained(loader, out)
    assert [layer.config.selection for layer in routed_layers(model)] == ["bottom", "bottom"]
    call("to-dense", out, dense, "--restore-order")
    before, after = load_file(source / "model.safetensors"), load_file(dense / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    if kind == "bert":
        assert (out / "vocab.txt").exists()
        assert (dense / "vocab.txt").exists()
        assert (dense / "1_Pooling" / "config.json").exists()


def test_published_settings_copies_and_layer_lists(bert: Path, tmp_path: Path) -> None:
    call(
        "convert", bert, tmp_path / "a", "--num-experts", 8, "--top-k", 2, "--layers", "1,3", "--as-published", "tutel"
    )
    text = call("inspect", tmp_path / "a")
    assert '"per_expert"' in text
    assert "numbers that the stock class has no place for" in text
    call("convert", bert, tmp_path / "b", "--kind", "gmoe", "--num-experts", 3, "--top-k", 2, "--layers", "1")
    assert '"gmoe"' in call("inspect", tmp_path / "b")
    assert "no dense equal" in call("to-dense", tmp_path / "b", tmp_path / "c", fails=True)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-experts", 7, "--top-k", 2], "64 neurons cannot be split into 7"),
        (["--num-experts", 8, "--top-k", 9], "top_k is 9; it must be at most num_experts"),
        (["--num-experts", 8, "--top-k", 2, "--layers", "last:9"], "more than the model's 4 layers"),
        (["--num-experts", 8, "--top-k", 2, "--set", "selektion=top"], "did you mean 'selection'"),
        (["--num-experts", 8, "--top-k", 2, "--set", "selection"], "write name=value"),
        (["--num-experts", 8, "--top-k", 2, "--partition", "coactivation"], "needs calibration data"),
        (["--num-experts", 8, "--top-k", 2, "--as-published", "tutle"], "did you mean 'tutel'"),
    ],
)
def test_wrong_settings_are_named_and_nothing_is_written(bert: Path, tmp_path: Path, arguments, message: str) -> None:
    assert message in call("convert", bert, tmp_path / "out", *arguments, fails=True)
    assert not (tmp_path / "out").exists()


def test_wrong_folders_are_named(bert: Path, tmp_path: Path) -> None:
    size, out = ("--num-experts", 8, "--top-k", 2), tmp_path / "out"
    assert "exists and is not empty" in call("convert", bert, bert, *size, fails=True)
    assert "is no folder, and the hub gives out no model" in call("convert", "no/such-model", out, *size, fails=True)
    assert "not a folder that emoe.save_pretrained wrote" in call("inspect", bert, fails=True)
    call("convert", bert, out, *size)
    assert "holds experts already" in call("convert", out, tmp_path / "again", *size, fails=True)
    (bert / "model.safetensors").unlink()
    assert "holds no model.safetensors" in call("convert", bert, tmp_path / "x", *size, fails=True)
    (bert / "config.json").write_text("{")
    (bert / "model.safetensors").write_text("")
    assert "config.json is damaged" in call("convert", bert, tmp_path / "x", *size, fails=True)
    (bert / "config.json").write_text('{"architectures": ["NoSuchModel"], "model_type": "bert"}')
    assert "which transformers does not have" in call("convert", bert, tmp_path / "x", *size, fails=True)
    (bert / "config.json").unlink()
    assert "holds no config.json" in call("convert", bert, tmp_path / "x", *size, fails=True)


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (["NoSuchModel"], "'NoSuchModel', which transformers does not have"),
        ("BertModel", "'architectures' is no list of names: 'BertModel'"),
        (3, "'architectures' is no list of names: 3"),
        ({"a": 1}, "'architectures' is no list of names"),
        ([None], "'architectures' is no list of names"),
        ([["BertModel"]], "'architectures' is no list of names"),
        (["nn"], "'nn', which transformers does not have"),
        (["utils"], "names 'utils' as the model's class, which is none"),
        (["is_torch_available"], "names 'is_torch_available' as the model's class"),
        (["BertConfig"], "names 'BertConfig' as the model's class"),
        (["PreTrainedModel"], "names 'PreTrainedModel' as the model's class"),
        (["BertPreTrainedModel"], "names 'BertPreTrainedModel' as the model's class"),
        (["AutoTokenizer"], "names 'AutoTokenizer' as the model's class"),
        (["__dict__"], "names '__dict__' as the model's class"),
        (["LlamaForCausalLM"], "are not those of a LlamaForCausalLM"),
    ],
)
def test_odd_classes_in_a_models_configuration_are_named(
    bert: Path, tmp_path: Path, classes: Any, message: str
) -> None:
    edit_json(bert / "config.json", architectures=classes)
    text = call("convert", bert, tmp_path / "out", "--num-experts", 8, "--top-k", 2, fails=True)
    assert message in text
    assert len(text.strip().splitlines()) == 1 or "are not those" in message  # the library reports beside it
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 10**9}, "asks for more layers than there are tensors in the weights, 73"),
        ({"text_config": {"num_layers": 10**9}}, "asks for more layers than there are tensors"),
        ({"transformers_weights": "../other.safetensors"}, "names other weight files by 'transformers_weights'"),
        ({"hidden_size": "x"}, "cannot be loaded by BertForSequenceClassification"),
        ({"num_attention_heads": 0}, "cannot be loaded by BertForSequenceClassification"),
        ({"emoe": 3}, "config.json, 'emoe' is damaged"),
        ({"emoe": {"config": {"kind": "emoe", "num_experts": 8, "top_k": 2}, "layers": [3, 1]}}, "no ascending list"),
        ({"emoe": {"config": {"kind": ["emoe"]}, "layers": [1]}}, "kind is ['emoe']"),
        ({"emoe": {"config": {"kind": "emoe", "num_experts": 8, "top_k": 2}, "layers": [1]}}, "holds experts already"),
    ],
)
def test_odd_values_in_a_models_configuration_are_named(bert: Path, tmp_path: Path, change: Any, message: str) -> None:
    edit_json(bert / "config.json", **change)
    assert message in call("convert", bert, tmp_path / "out", "--num-experts", 8, "--top-k", 2, fails=True)


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        (
            {"a": "../outside.safetensors"},
            "names the shard '../outside.safetensors'; it must be a .safetensors file of the",
        ),
        ({"a": "shard.bin"}, "names the shard 'shard.bin'; it must be a .safetensors file of the same folder"),
        ({"a": "missing.safetensors"}, "names the shard 'missing.safetensors', which"),
        ({"a": "x" * 5000 + ".safetensors"}, "names the shard 'xxxx"),
        ({"a": 3}, "'weight_map' names no shards"),
        ({}, "'weight_map' names no shards"),
    ],
)
def test_shards_outside_the_folder_and_pickled_ones_are_refused(
    bert: Path, tmp_path: Path, shards: Any, message: str
) -> None:
    (bert / "model.safetensors").rename(tmp_path / "outside.safetensors")
    (bert / "shard.bin").write_bytes(b"")
    (bert / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    text = call("convert", bert, tmp_path / "out", "--num-experts", 8, "--top-k", 2, fails=True)
    assert message in text
    assert len(text) < 600


def test_code_that_comes_with_a_model_is_not_run(bert: Path, tmp_path: Path) -> None:
    (bert / "own.py").write_text("raise SystemExit('it ran')")
    edit_json(
        bert / "config.json",
        architectures=None,
        model_type="own",
        auto_map={"AutoModel": "own.X", "AutoConfig": "own.X"},
    )
    text = call("convert", bert, tmp_path / "out", "--num-experts", 8, "--top-k", 2, fails=True)
    assert "cannot be loaded by AutoModel" in text
    assert "it ran" not in text


def test_companions_behind_links_out_of_the_folder_are_not_copied(bert: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.json").write_text("{}")
    (bert / "special_tokens_map.json").symlink_to(tmp_path / "secret.json")
    (bert / "inside.txt").symlink_to("vocab.txt")
    text = call("convert", bert, tmp_path / "out", "--num-experts", 8, "--top-k", 2)
    assert f"Not copied: {bert / 'special_tokens_map.json'} is a link that leads out of the folder" in text
    assert not (tmp_path / "out" / "special_tokens_map.json").exists()
    assert (tmp_path / "out" / "inside.txt").read_text() == "[PAD]\n"
    # the hub's cache keeps files beside its snapshots and links them
    blobs, snapshot = tmp_path / "cache" / "blobs", tmp_path / "cache" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for place, name in enumerate(("config.json", "model.safetensors", "vocab.txt")):
        (bert / name).rename(blobs / str(place))
        (snapshot / name).symlink_to(blobs / str(place))
    assert "Not copied" not in call("convert", snapshot, tmp_path / "again", "--num-experts", 8, "--top-k", 2)
    assert (tmp_path / "again" / "vocab.txt").exists()


def test_a_folder_that_the_models_own_library_saved_is_shown_and_folded_back(bert: Path, tmp_path: Path) -> None:
    model = BertForSequenceClassification.from_pretrained(bert)
    emoe.convert_(model, emoe.EMoEConfig(num_experts=8, top_k=2, layers="last:2"))
    model.save_pretrained(tmp_path / "own")
    assert "not known where the neurons stood at first" in call("inspect", tmp_path / "own")
    size = ("--num-experts", 8, "--top-k", 2)
    assert "holds experts already" in call("convert", tmp_path / "own", tmp_path / "x", *size, fails=True)
    assert "leave restore_order out" in call(
        "to-dense", tmp_path / "own", tmp_path / "x", "--restore-order", fails=True
    )
    call("to-dense", tmp_path / "own", tmp_path / "dense")
    assert "emoe" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    call("convert", tmp_path / "dense", tmp_path / "again", *size)


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ("all", "all"),
        ("last:2", "the last 2"),
        ("last-half:2", "one in 2 of the latter half, from its first on"),
        ("last-quarter:2", "one in 2 of the last quarter, from its first on"),
        ("1:4:2", "from 1 up to 4, itself not included, one in 2"),
        ("1,3", "those numbered 1, 3"),
    ],
)
def test_inspect_says_what_its_signs_mean(bert: Path, tmp_path: Path, layers: str, words: str) -> None:
    call("convert", bert, tmp_path / "out", "--num-experts", 8, "--top-k", 2, "--layers", layers)
    assert f"* not the default. layers: {words}" in call("inspect", tmp_path / "out")
    assert "every second one of the latter half" in " ".join(call("convert", "--help").split())


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A tiny language model whose tokens are words."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, eos_token_id=1
    )
    folder = tmp_path / "llama"
    LlamaForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1} | {f"w{i}": i for i in range(2, 40)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", unk_token="<unk>").save_pretrained(folder)
    return folder


def test_a_folder_answers_with_experts_and_without(llama: Path, tmp_path: Path) -> None:
    experts = tmp_path / "experts"
    call("convert", llama, experts, "--num-experts", 8, "--top-k", 2, "--layers", "all")
    answers = {}
    for backend in ("sparse", "masked", "auto"):
        text = call("generate", experts, "w3 w4 w5", "--max-new-tokens", 6, "--backend", backend)
        answer, _, rest = text.partition("\n")
        answers[backend] = answer
        assert "[6 tokens in" in rest
        assert f"2 of 8 experts in 2 of 2 layers, {backend} backend]" in rest
    assert len(set(answers.values())) == 1
    model = emoe.from_pretrained(LlamaForCausalLM, experts)
    wanted = model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=6, do_sample=False, pad_token_id=1)[0, 3:]
    assert answers["sparse"].split() == [
        f"w{token}" for token in wanted.tolist() if token > 1
    ]  # special tokens are not shown
    assert "; dense]" in call("generate", llama, "w3", "--max-new-tokens", 2)


def test_a_chat_template_is_used_unless_the_prompt_shall_stay_raw(llama: Path) -> None:
    (llama / "chat_template.jinja").write_text("w9 {{ messages[0]['content'] }} w10")
    asked = call("generate", llama, "w3", "--max-new-tokens", 4)
    assert asked.split("[")[0] == call("generate", llama, "w9 w3 w10", "--raw", "--max-new-tokens", 4).split("[")[0]


def test_what_cannot_answer_is_named(bert: Path, llama: Path, tmp_path: Path) -> None:
    assert "holds a BertForSequenceClassification, which does not generate text" in call(
        "generate", bert, "w3", fails=True
    )
    for file in llama.glob("tokenizer*"):
        file.unlink()
    assert "holds no tokenizer" in call("generate", llama, "w3", fails=True)
    assert "is no folder" in call("generate", tmp_path / "nothing", "w3", fails=True)
    model = BertForSequenceClassification.from_pretrained(bert)
    with pytest.raises(emoe.ConversionError, match="convert it first"):
        emoe.set_backend_(model, "sparse")
    emoe.convert_(model, emoe.EMoEConfig(num_experts=8, top_k=2, layers="all"))
    with pytest.raises(emoe.ConfigError, match="did you mean 'sparse'"):
        emoe.set_backend_(model, "sparce")
