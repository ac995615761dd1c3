"""Transformers' own ``from_pretrained`` loads converted checkpoints with their experts."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    Trainer,
    TrainingArguments,
)
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

import emoe
from emoe.layer import routed_layers
from tests import converted, model_folders, tiny_models
from tests.classifiers import METHODS, bert, load, logits, rows
from tests.model_folders import assert_same, edit_json, tensors

CONFIGS = {
    "avg-k": emoe.EMoEConfig(num_experts=4, top_k=2, layers="last:2"),
    "learned": emoe.EMoEConfig(
        num_experts=4,
        top_k=2,
        layers="last:2",
        router="cosine",
        weighting="softmax",
        output_bias="per_expert",
    ),
    "gmoe": emoe.GMoEConfig(num_experts=2, top_k=1, layers="last:1"),
}
AUTO_CLASSES: dict[str, Any] = {
    "bert": AutoModel,
    "llama": AutoModelForCausalLM,
    "gpt2": AutoModelForCausalLM,
    "t5 v1.1": AutoModelForSeq2SeqLM,
}


def trained(name: str, config: Any) -> Any:
    """Convert a tiny model, and move all weights of its routers and biases from where they start."""
    model = (
        tiny_models.build(name)
        if AUTO_CLASSES[name] is AutoModel
        else tiny_models.build_generator(name)
    )
    torch.manual_seed(0)
    emoe.convert_(model, config)
    with torch.no_grad():
        for layer in routed_layers(model):
            for parameter in layer.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", AUTO_CLASSES)
def test_shards_load_and_are_saved_again_bit_by_bit(name: str, config: str, tmp_path: Path) -> None:
    model, values = trained(name, CONFIGS[config]), tiny_models.inputs(name)
    model.save_pretrained(tmp_path / "saved", max_shard_size="40KB")
    again = AUTO_CLASSES[name].from_pretrained(tmp_path / "saved")
    again.save_pretrained(tmp_path / "again")
    twice = AUTO_CLASSES[name].from_pretrained(tmp_path / "again")
    for loaded in (again, twice):
        assert_same(loaded.state_dict(), model.state_dict())
        assert torch.equal(tiny_models.output(loaded, values), tiny_models.output(model, values))
    assert emoe.config_of(again) == CONFIGS[config]


def test_what_a_loaded_model_can_do(tmp_path: Path) -> None:
    model = bert(METHODS["emoe"])
    dense = bert(None).eval()
    emoe.save_pretrained(model, tmp_path / "out")

    def again(**options: Any) -> Any:
        return AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", **options)

    expected = logits(model)
    assert torch.equal(logits(copy.deepcopy(again())), expected)
    assert torch.equal(logits(Accelerator(cpu=True).prepare(again())), expected)
    assert again().half().dtype == again(dtype=torch.float16).dtype == torch.float16
    assert torch.equal(logits(again(device_map={"": "cpu"})), expected)
    assert torch.equal(logits(emoe.to_dense_(again(), restore_order=True)), logits(dense))
    for name in (
        "is_quantized",
        "hf_quantizer",
        "quantization_method",
    ):  # Trainer and PEFT would refuse or warn
        assert not getattr(again(), name, None)

    adapted: Any = get_peft_model(again(), LoraConfig(target_modules=["query"]))
    arguments = TrainingArguments(
        str(tmp_path / "runs"), max_steps=2, use_cpu=True, report_to=[], disable_tqdm=True
    )
    for network in (adapted, again()):
        Trainer(
            network, arguments, train_dataset=rows(), callbacks=[emoe.TrainerCallback()]
        ).train()
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(
        logits(BertForSequenceClassification.from_pretrained(tmp_path / "merged")), logits(merged)
    )


def test_changed_settings_are_saved_and_a_folded_model_is_dense(tmp_path: Path) -> None:
    model = bert(METHODS["emoe"])
    emoe.set_top_k_(model, 5)
    model.save_pretrained(tmp_path / "five")
    assert emoe.config_of(AutoModel.from_pretrained(tmp_path / "five")).top_k == 5
    emoe.to_dense_(model)
    model.save_pretrained(tmp_path / "dense")
    assert not emoe.is_converted(AutoModel.from_pretrained(tmp_path / "dense"))
    assert "experts" not in (tmp_path / "dense" / "config.json").read_text()


class TwoTowers(nn.Module):
    """Two transformers models, and the configuration of the second one for Trainer."""

    def __init__(self, first: Any, second: Any) -> None:
        super().__init__()
        self.first = first
        self.second = second
        self.config = second.config


def test_settings_of_models_inside_a_module_are_saved_with_each_model(tmp_path: Path) -> None:
    models = {
        "eight": converted.model("bert", num_experts=8, layers=[0, 2]),
        "four": converted.model("bert", num_experts=4, layers=[1]),
    }
    towers = TwoTowers(*models.values())
    emoe.set_top_k_(towers, 3)
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        again = AutoModel.from_pretrained(tmp_path / name)
        assert emoe.config_of(again) == emoe.config_of(model)
        assert emoe.config_of(again).top_k == 3
    emoe.to_dense_(towers)
    for name, model in models.items():
        model.save_pretrained(tmp_path / f"dense {name}")
        assert not emoe.is_converted(AutoModel.from_pretrained(tmp_path / f"dense {name}"))


def test_settings_of_a_list_of_layers_are_saved_with_the_model(tmp_path: Path) -> None:
    model = converted.model("llama", layers=[1, 3])
    emoe.set_top_k_(model.layers, 5)
    model.save_pretrained(tmp_path)
    assert emoe.config_of(AutoModel.from_pretrained(tmp_path)).top_k == 5


def test_settings_of_a_single_layer_are_refused() -> None:
    """The configuration of the model has one number of experts for all its layers."""
    model = converted.model("bert")
    num_layers = len(routed_layers(model))
    held = f"BertLayer holds 1 of the {num_layers} FFNs .*: call set_top_k_ for the whole model"
    with pytest.raises(emoe.ConversionError, match=held):
        emoe.set_top_k_(model.encoder.layer[0], 5)
    usage = {0: torch.arange(emoe.config_of(model).num_experts)}
    with pytest.raises(emoe.ConversionError, match="call fix_experts_ for the whole model"):
        emoe.fix_experts_(model.encoder.layer[0], usage)
    assert emoe.config_of(model) == emoe.config_of(converted.model("bert"))


def test_the_base_model_is_changed_after_the_whole_was_saved(tmp_path: Path) -> None:
    model = bert(None)
    emoe.convert_(model.bert, METHODS["emoe"])
    emoe.save_pretrained(model, tmp_path / "whole")
    emoe.set_top_k_(model.bert, 5)
    model.save_pretrained(tmp_path / "changed")
    assert emoe.config_of(load(tmp_path / "changed")).top_k == 5
    emoe.to_dense_(model.bert)
    model.save_pretrained(tmp_path / "dense")
    dense = BertForSequenceClassification.from_pretrained(tmp_path / "dense")
    assert not emoe.is_converted(dense)
    assert torch.equal(logits(dense), logits(model))


@pytest.mark.parametrize(
    "save", [emoe.save_pretrained, BertForSequenceClassification.save_pretrained]
)
@pytest.mark.parametrize("form", ["built", "folder"])
def test_the_callers_configuration_need_not_describe_the_experts(
    form: str, save: Any, tmp_path: Path
) -> None:
    model = bert(METHODS["emoe-learn"])
    save(model, tmp_path / "experts")
    config = bert(None).config
    config.save_pretrained(tmp_path / "dense")
    given = config if form == "built" else str(tmp_path / "dense")
    again = load(tmp_path / "experts", config=given)
    assert emoe.config_of(again) == METHODS["emoe-learn"]
    assert torch.equal(logits(again), logits(model))
    assert not hasattr(config, "quantization_config")


def test_the_callers_configuration_may_quantise(tmp_path: Path) -> None:
    model = bert(METHODS["emoe"])
    emoe.save_pretrained(model, tmp_path)
    config = bert(None).config
    config.quantization_config = {"quant_method": "test"}
    quantised = load(tmp_path, config=config)
    assert quantised.is_quantized
    assert torch.equal(logits(quantised), logits(model))


LOAD = "transformers.AutoModel.from_pretrained({folder!r})"
WITHOUT_AND_WITH = f"""
import transformers
try:
    {LOAD}
except ValueError as error:
    assert 'experts_implementation="emoe"' in str(error), error
else:
    raise SystemExit("it loaded without emoe")
import emoe
assert emoe.is_converted({LOAD})
"""
EMOE_FIRST = f"""
import emoe, sys
assert "torch" not in sys.modules
import transformers
assert emoe.is_converted({LOAD})
"""


@pytest.mark.slow
@pytest.mark.parametrize("program", [WITHOUT_AND_WITH, EMOE_FIRST], ids=["emoe last", "emoe first"])
def test_transformers_refuses_the_folder_until_emoe_is_imported(
    program: str, tmp_path: Path
) -> None:
    emoe.save_pretrained(bert(METHODS["emoe"]), tmp_path)
    command = [sys.executable, "-c", program.format(folder=str(tmp_path))]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_a_hub_id_and_a_revision(tmp_path: Path) -> None:
    """Read a repository from the hub's cache, as it is after a download."""
    repository = tmp_path / "models--org--experts"
    model = bert(METHODS["emoe"])
    emoe.save_pretrained(model, repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "v1").write_text("abc")
    options: Any = {"revision": "v1", "cache_dir": tmp_path, "local_files_only": True}
    for again in (
        BertForSequenceClassification.from_pretrained("org/experts", **options),
        emoe.from_pretrained(BertForSequenceClassification, "org/experts", **options),
    ):
        assert torch.equal(logits(again), logits(model))
    with pytest.raises(emoe.CheckpointError, match="the hub gave no model"):
        emoe.from_pretrained(
            BertForSequenceClassification, "org/experts", **{**options, "revision": "v2"}
        )


def test_a_router_that_is_not_stored_is_an_error(tmp_path: Path) -> None:
    """Transformers would warn, and leave it as uninitialised memory."""
    bert(METHODS["emoe-learn"]).save_pretrained(tmp_path)
    state = tensors(tmp_path)
    kept = {
        name: tensor
        for name, tensor in state.items()
        if "3.intermediate.intermediate_act_fn" not in name
    }
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(emoe.CheckpointError, match=r"lacks .*router"):
        AutoModel.from_pretrained(tmp_path)


def test_experts_on_the_disk_or_without_weights(tmp_path: Path) -> None:
    emoe.save_pretrained(bert(METHODS["emoe"]), tmp_path / "plain")
    empty = AutoModel.from_pretrained(tmp_path / "plain", device_map="meta")
    assert emoe.is_converted(empty)
    assert next(empty.parameters()).is_meta
    assert next(load(tmp_path / "plain", device_map="meta").parameters()).is_meta
    emoe.save_pretrained(bert(METHODS["emoe-learn"]), tmp_path / "learned")
    places = {
        "bert.embeddings": "cpu",
        "bert.encoder": "disk",
        "bert.pooler": "cpu",
        "classifier": "cpu",
    }
    with pytest.raises(emoe.CheckpointError, match="offloads"):
        load(tmp_path / "learned", device_map=places, offload_folder=str(tmp_path / "disk"))


def test_the_report_of_transformers_is_returned(tmp_path: Path) -> None:
    emoe.save_pretrained(bert(METHODS["emoe"]), tmp_path)
    model, info = load(tmp_path, output_loading_info=True)
    assert emoe.is_converted(model)
    assert not info["missing_keys"]


# the number of layers has another name in each configuration
FEWER_LAYERS = {
    "bert": "num_hidden_layers",
    "gpt2": "n_layer",
    "llama": "num_hidden_layers",
    "t5": "num_layers",
    "vit": "num_hidden_layers",  # transformers renames its tensors
}


@pytest.mark.parametrize("name", FEWER_LAYERS)
def test_a_configuration_with_fewer_layers_than_the_weights_is_refused(
    name: str, tmp_path: Path
) -> None:
    emoe.save_pretrained(converted.model(name, layers=[0]), tmp_path)
    edit_json(tmp_path / "config.json", **{FEWER_LAYERS[name]: 1})
    for folder_loader in (AutoModel, tiny_models.loader(name)):
        with pytest.raises(
            emoe.CheckpointError, match=r"config\.json counts fewer layers than the weights"
        ):
            emoe.from_pretrained(folder_loader, tmp_path)


@pytest.mark.parametrize("name", FEWER_LAYERS)
@pytest.mark.parametrize(("layers", "wrong"), [(1, "fewer"), (9, "more")])
def test_transformers_too_refuses_another_number_of_layers_than_the_weights_have(
    name: str, layers: int, wrong: str, tmp_path: Path
) -> None:
    model = converted.model(name, layers=[0])
    model.save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", **{FEWER_LAYERS[name]: layers})
    with pytest.raises(
        emoe.CheckpointError, match=rf"config\.json counts {wrong} layers than the weights"
    ):
        tiny_models.loader(name).from_pretrained(tmp_path)


def test_the_layers_of_each_stage_are_counted(tmp_path: Path) -> None:
    stages = nn.ModuleList([nn.ModuleList([nn.Linear(1, 1) for _ in range(n)]) for n in (1, 2)])
    names = [f"stages.{name}" for name in stages.state_dict()]
    model = nn.ModuleDict({"stages": stages})
    emoe.files.check_layers(model, names, tmp_path)
    with pytest.raises(emoe.CheckpointError, match=r"fewer layers.*stages\.1\.2\.weight"):
        emoe.files.check_layers(model, [*names, "stages.1.2.weight"], tmp_path)
    with pytest.raises(emoe.CheckpointError, match=r"more layers.*stages\.1\.1\.bias"):
        emoe.files.check_layers(model, names[:-2], tmp_path)


@pytest.mark.parametrize(("layers", "wrong"), [(1, "fewer"), (9, "more")])
def test_a_timm_folder_with_another_number_of_layers_than_the_weights_is_refused(
    layers: int, wrong: str, tmp_path: Path
) -> None:
    emoe.save_pretrained(converted.model("VisionTransformer", layers=[0]), tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    edit_json(tmp_path / "config.json", model_args={**settings["model_args"], "depth": layers})
    with pytest.raises(
        emoe.CheckpointError, match=rf"config\.json counts {wrong} layers than the weights"
    ):
        model_folders.loaded(tmp_path)


@pytest.mark.parametrize(("layers", "wrong"), [(1, "fewer"), (9, "more")])
def test_a_plain_model_with_another_number_of_layers_than_the_weights_is_refused(
    layers: int, wrong: str, tmp_path: Path
) -> None:
    def build(num_layers: int) -> nn.TransformerEncoder:
        layer = nn.TransformerEncoderLayer(8, nhead=2, dim_feedforward=16, batch_first=True)
        return nn.TransformerEncoder(layer, num_layers)

    model = build(2)
    emoe.convert_(model, emoe.EMoEConfig(num_experts=4, top_k=2, layers=[0]))
    emoe.save_pretrained(model, tmp_path)
    assert emoe.is_converted(emoe.from_pretrained(lambda: build(2), tmp_path))
    with pytest.raises(
        emoe.CheckpointError, match=f"function that builds the model counts {wrong} layers"
    ):
        emoe.from_pretrained(lambda: build(layers), tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        {"model_args": {"num_classes": 7}, "pretrained_cfg": {"classifier": ["head"]}},
        {"pretrained_cfg": {"num_classes": 7}},
    ],
)
def test_timm_does_not_replace_a_stored_head_without_a_message(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    source = model_folders.save("VisionTransformer", tmp_path / "dense")
    changed = json.loads((source / "config.json").read_text())
    del changed["num_classes"]
    for name, value in settings.items():
        changed[name] = {**changed.get(name, {}), **value}
    (source / "config.json").write_text(json.dumps(changed))
    with pytest.raises(
        emoe.CheckpointError, match=r"timm did not load the stored head of 1000 classes"
    ):
        model_folders.dense(source)


@pytest.mark.parametrize("classes", [7, 0, 10**9])
def test_a_timm_folder_with_another_number_of_classes_is_refused(
    classes: int, tmp_path: Path
) -> None:
    source = model_folders.save("VisionTransformer", tmp_path / "dense")
    model = converted.model("VisionTransformer")
    emoe.save_pretrained(model, tmp_path / "experts")
    options = tiny_models.load_options("VisionTransformer")
    for folder, load_folder in (
        (source, model_folders.dense),
        (tmp_path / "experts", model_folders.loaded),
    ):
        edit_json(folder / "config.json", num_classes=classes)
        with pytest.raises(
            emoe.CheckpointError, match=rf"num_classes is {classes}, but the weights have a head of"
        ):
            load_folder(folder)
        # timm builds the model with the number among its arguments, if there are two
        settings = json.loads((folder / "config.json").read_text())
        arguments = settings.get("model_args", {})
        edit_json(
            folder / "config.json",
            num_classes=1000,
            model_args={**arguments, "num_classes": classes},
        )
        with pytest.raises(
            emoe.CheckpointError, match=rf"model_args: num_classes is {classes}, but the weights"
        ):
            load_folder(folder)
    edit_json(source / "config.json", pretrained_cfg="x")
    with pytest.raises(emoe.CheckpointError, match="cannot be loaded"):
        model_folders.dense(source)
    source = model_folders.save("VisionTransformer", tmp_path / "another")
    new_head = emoe.files.load_stock(timm.create_model, source, num_classes=3, **options)
    assert new_head.num_classes == 3


def test_a_timm_folder_gets_a_new_head_on_request(tmp_path: Path) -> None:
    model: Any = converted.model("VisionTransformer")
    emoe.save_pretrained(model, tmp_path)
    again = emoe.from_pretrained(timm.create_model, tmp_path, num_classes=3)
    assert again.head.weight.shape[0] == 3
    loaded, expected = again.state_dict(), model.state_dict()
    for state in (loaded, expected):
        del state["head.weight"], state["head.bias"]
    assert_same(loaded, expected)
    same_head = emoe.from_pretrained(timm.create_model, tmp_path, num_classes=1000)
    assert_same(same_head.state_dict(), model.state_dict())
    # with emoe's files beside the weights, we load a dense model's weights ourselves
    dense = emoe.files.load_stock(timm.create_model, tmp_path, num_classes=3)
    assert torch.equal(dense.norm.weight, model.norm.weight)
    state = load_file(tmp_path / "model.safetensors")
    del state["norm.weight"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(emoe.CheckpointError, match=r"lack norm\.weight"):
        emoe.from_pretrained(timm.create_model, tmp_path, num_classes=3)


@register_quantization_config("test")
class NoQuantization(QuantizationConfigMixin):
    """The configuration of a quantizer that changes nothing, in the place of bitsandbytes'."""

    def __init__(self, **_: Any) -> None:
        self.quant_method: Any = "test"


@register_quantizer("test")
class NoQuantizer(HfQuantizer):
    requires_calibration = False
    is_trainable = True

    def is_serializable(self) -> bool:
        return True


@pytest.mark.parametrize("method", ["emoe", "emoe-learn", "emoe, published"])
@pytest.mark.parametrize("is_old", [False, True])
def test_a_checkpoint_is_quantised_and_the_quantised_model_saved(
    method: str, is_old: bool, tmp_path: Path
) -> None:
    model = bert(METHODS[method])
    save = write_as_release_0_1 if is_old else emoe.save_pretrained
    save(model, tmp_path / "saved")
    quantised, info = load(
        tmp_path / "saved", quantization_config=NoQuantization(), output_loading_info=True
    )
    assert quantised.is_quantized
    assert not info["missing_keys"]
    assert torch.equal(logits(quantised), logits(model))
    emoe.save_pretrained(quantised, tmp_path / "again")
    assert "Transformers itself refuses" in (tmp_path / "again" / "README.md").read_text()
    with pytest.raises(
        ValueError, match=r"experts_implementation=\"emoe.from_pretrained\"` is not supported"
    ):
        BertForSequenceClassification.from_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    assert again.is_quantized
    assert torch.equal(logits(again), logits(model))


def write_as_release_0_1(model: Any, folder: Path) -> None:
    """Write a folder as emoe 0.1 did: a dense checkpoint, and all that is new in files of ours."""
    emoe.save_pretrained(model, folder)
    (folder / "README.md").unlink()
    settings = json.loads((folder / "config.json").read_text())
    experts = settings.pop("quantization_config")
    del settings["experts_implementation"]
    content = {"config": experts["experts"], "layers": experts["layers"]}
    (folder / "config.json").write_text(json.dumps({**settings, "emoe": content}))
    (folder / "emoe_config.json").write_text(json.dumps(content))
    state, extra = load_file(folder / "model.safetensors"), {}
    names = {module: name for name, module in model.named_modules()}
    for layer in routed_layers(model):
        for name in layer.state_dict():
            extra[f"{layer.ffn.index}.routing.{name}"] = state.pop(f"{names[layer]}.{name}")
        if layer.output_bias is not None:
            state[f"{names[layer.ffn.proj_out]}.bias"] = layer.folded_output_bias()
        if layer.config.kind == "gmoe":
            for path, module in layer.ffn.projections():
                tensors_of_copy = {
                    f"{layer.ffn.index}.{path}.{key}": t for key, t in module.state_dict().items()
                }
                extra |= tensors_of_copy
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    if extra:
        save_file(extra, folder / "emoe_extra.safetensors")


@pytest.mark.parametrize("option", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("quantises", [False, True])
def test_the_stored_dtype_of_an_old_or_quantised_folder_is_asked_for(
    quantises: bool, option: str, tmp_path: Path
) -> None:
    model = bert(METHODS["emoe"]).bfloat16()
    write_as_release_0_1(model, tmp_path)
    options = {"quantization_config": NoQuantization()} if quantises else {}
    again = load(tmp_path, **{option: "auto"}, **options)
    assert again.dtype == torch.bfloat16
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("method", METHODS)
def test_folders_of_the_first_release_load(method: str, tmp_path: Path) -> None:
    model = bert(METHODS[method])
    write_as_release_0_1(model, tmp_path)
    again = load(tmp_path, num_labels=2)
    assert_same(again.state_dict(), model.state_dict())
    assert torch.equal(logits(again), logits(model))
    for layer, expected in zip(routed_layers(again), routed_layers(model), strict=True):
        assert layer.config == expected.config
        assert method == "gmoe" or torch.equal(layer.permutation, expected.permutation)
    emoe.save_pretrained(again, tmp_path)  # as a folder of today
    assert not {"emoe_config.json", "emoe_extra.safetensors"} & {
        path.name for path in tmp_path.iterdir()
    }
    assert torch.equal(
        logits(BertForSequenceClassification.from_pretrained(tmp_path)), logits(model)
    )


def test_the_librarys_own_folder_of_the_first_release_loads_but_not_as_dense(
    tmp_path: Path,
) -> None:
    model = bert(METHODS["emoe-learn"])
    model.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    experts = settings.pop("quantization_config")
    del settings["experts_implementation"]
    settings["emoe"] = {"config": experts["experts"], "layers": experts["layers"]}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert torch.equal(logits(load(tmp_path)), logits(model))
    stock = BertForSequenceClassification.from_pretrained(tmp_path)
    with pytest.raises(
        emoe.ConversionError, match=r"loaded it as dense: use emoe\.from_pretrained"
    ):
        emoe.set_top_k_(stock, 3)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "llama",
            (
                "LlamaModel.from_pretrained",
                "refuses this checkpoint until",
                "2, 3 of 4",
                "library_name: transformers",
            ),
        ),
        ("VisionTransformer", ("emoe.from_pretrained(timm.create_model", "timm does not know")),
        ("TransformerEncoder", ("build() returns a TransformerEncoder", "reads a dense model")),
    ],
)
def test_a_model_card_is_written_once(name: str, words: tuple[str, ...], tmp_path: Path) -> None:
    model = converted.model(name, layers="last:2")
    emoe.save_pretrained(model, tmp_path)
    card = (tmp_path / "README.md").read_text()
    for text in (*words, "experts (N) | 8", "experts per token (k) | 2"):
        assert text in card
    (tmp_path / "README.md").write_text("mine")
    emoe.save_pretrained(model, tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_the_configuration_of_a_model_is_asked_for() -> None:
    dense, model = bert(None), bert(METHODS["emoe"])
    assert not emoe.is_converted(dense)
    assert emoe.is_converted(nn.DataParallel(model))
    assert (
        emoe.config_of(get_peft_model(model, LoraConfig(target_modules=["query"])))
        == METHODS["emoe"]
    )
    with pytest.raises(
        emoe.ConversionError, match="config_of: the model has no routed FFN; convert it first"
    ):
        emoe.config_of(dense)
