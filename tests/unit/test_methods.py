"""Models, and methods on them: keys of methods.yaml, heads by seed, the cache of partitions."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Annotated, Any, get_type_hints
from unittest import mock

import pytest
import torch
from pydantic import Field, TypeAdapter
from transformers import BertConfig, BertForSequenceClassification

import emoe
from benchmarks.harness.base import MODEL_ROOT, DefinitionError
from benchmarks.harness.config.catalogue import ModelSpec, model_spec
from benchmarks.harness.config.method_specs import method_spec
from benchmarks.harness.config.methods import ExpertSettings, Method
from benchmarks.harness.config.yaml import Location
from benchmarks.harness.models.conversion import noisy_tuning_
from benchmarks.harness.models.loading import load_backbone, load_classifier, weights_digest
from benchmarks.harness.models.partitions import cached_partition
from benchmarks.harness.run import schemas
from emoe.config import Bounds, EMoEConfig, GMoEConfig
from tests import tiny_models

SEED_OF_RUN = {"const": "run", "type": "string"}  # a seed that only a method may have


def schema_of_field(config: type[Any], field: dataclasses.Field[Any]) -> dict[str, Any]:
    """Return the JSON Schema of an optional key with the type and the bounds of a configuration's field."""
    bounds = field.metadata.get("bounds", Bounds())
    limits = Field(ge=bounds.at_least, gt=bounds.above, lt=bounds.below)
    key = Annotated[get_type_hints(config)[field.name], limits] | None
    return TypeAdapter(key).json_schema()


@pytest.mark.parametrize("config", [EMoEConfig, GMoEConfig])
def test_a_method_has_each_field_of_a_configuration_with_its_bounds(config: type[Any]) -> None:
    keys = ExpertSettings.model_json_schema()["properties"]
    fields = {field.name: field for field in dataclasses.fields(config) if field.name != "version"}
    assert fields.keys() <= keys.keys()
    for name in fields.keys() - {"layers"}:  # YAML has lists, a configuration tuples
        options = [option for option in keys[name]["anyOf"] if option != SEED_OF_RUN]
        assert options == schema_of_field(config, fields[name])["anyOf"], name


def test_no_key_of_a_method_is_unknown_to_the_configurations() -> None:
    known = {field.name for kind in (EMoEConfig, GMoEConfig) for field in dataclasses.fields(kind)}
    assert known - {"version"} == set(ExpertSettings.model_fields)


def test_an_editor_explains_each_key_of_a_method(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schemas, "SCHEMAS", tmp_path)
    schemas.write_schemas()
    written = json.loads((tmp_path / "methods.schema.json").read_text())
    keys = written["$defs"]["Method"]["properties"]
    assert keys.keys() == Method.model_fields.keys()
    assert [name for name, key in keys.items() if not key.get("description")] == []


@pytest.mark.parametrize("kind", ["emoe", "gmoe"])
@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_a_share_of_an_unknown_number_of_experts_is_refused(kind: Any, fraction: float) -> None:
    """A GMoE has six experts by default, and must not use one of them if all are asked for."""
    methods = {"moe": Method(title="MoE", kind=kind, top_k_fraction=fraction)}
    point = {"method": "moe", "model": "minilm"}
    message = "f: 'grid': method 'moe' sets 'top_k_fraction' but no 'num_experts', which it needs"
    with pytest.raises(DefinitionError) as caught:
        method_spec(methods, point, 0, None, Location("f", "grid"))
    assert str(caught.value) == message


def test_noise_scales_with_each_parameter_and_spares_the_head() -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=60,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=64,
    )
    model = BertForSequenceClassification(config)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    noisy_tuning_(model, 0.15, seed=3)
    for name, parameter in model.named_parameters():
        change = (parameter - before[name]).abs().max()
        scale = 0.0 if name.startswith("classifier") else 0.15 * before[name].std()
        assert change <= scale / 2 + 1e-6  # U(-1/2, 1/2) * scale
        assert (change == 0) == (scale == 0), name
    again = BertForSequenceClassification(config)
    again.load_state_dict(before)
    noisy_tuning_(again, 0.15, seed=3)
    assert all(
        torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True)
    )


def test_partitions_are_cached_by_layer_and_content(tmp_path: Path) -> None:
    model = tiny_models.build("bert")
    both = emoe.EMoEConfig(num_experts=8, top_k=2, layers=[0, 1])
    with mock.patch.object(emoe, "partition", side_effect=emoe.partition) as spy:
        partition = cached_partition(model, both, tmp_path)
        again = cached_partition(model, both, tmp_path)
        of_one_layer = cached_partition(
            model, emoe.EMoEConfig(num_experts=8, top_k=4, layers=[1]), tmp_path
        )
        assert spy.call_count == 2
        with torch.no_grad():
            model.encoder.layer[1].intermediate.dense.weight[0, 0] += 1
        cached_partition(model, both, tmp_path)
        assert spy.call_count == 3
    expected = emoe.partition(tiny_models.build("bert"), both)
    for layer in (0, 1):
        assert torch.equal(partition[layer], expected[layer])
        assert torch.equal(again[layer], expected[layer])
        assert partition.explained[layer] == expected.explained[layer]
    assert list(of_one_layer) == [1]


def test_damaged_partitions_are_made_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, config = tiny_models.build("bert"), emoe.EMoEConfig(num_experts=8, top_k=2, layers=[1])
    partition = cached_partition(model, config, tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    content = path.read_bytes()
    damages = {
        "empty": b"",
        "cut off": content[:-8],
        "one neuron twice": content[:-8] + content[-16:-8],
        "another layer": content.replace(b"layer.1", b"layer.0"),
        "no layer": content.replace(b"layer.1", b"layer.x"),
        "metadata of another layer": content.replace(b'{\\"1\\"', b'{\\"0\\"'),
        "metadata of no layer": content.replace(b'{\\"1\\"', b'{\\"x\\"'),
        "metadata without JSON": content.replace(b'{\\"1\\"', b'[\\"1\\"'),
        "no metadata": content.replace(b'"explained"', b'"explainet"'),
    }
    for name, damage in damages.items():
        assert damage != content, name
        path.unlink()  # what is open is still read from
        path.write_bytes(damage)
        again = cached_partition(tiny_models.build("bert"), config, tmp_path)
        warning = capsys.readouterr().err
        assert re.fullmatch(rf"warning: {path} .*; it is computed again\n", warning), name
        assert list(again) == list(again.explained) == [1], name
        assert torch.equal(again[1], partition[1]), name
        cached_partition(tiny_models.build("bert"), config, tmp_path)  # the file is whole again
        assert capsys.readouterr().err == "", name


@pytest.mark.parametrize("name", ["tiny-bert", "tiny-gpt2"])
def test_the_head_of_a_model_without_a_checkpoint_is_that_of_a_loaded_one(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_spec(name)
    built = [load_classifier(model, 3, seed, 0) for seed in (1, 2)]
    backbone = load_backbone(model)
    assert {weights_digest(classifier.base_model) for classifier in built} == {
        weights_digest(backbone)
    }
    head = next(key for key in built[0].state_dict() if key.startswith(("classifier.", "score.")))
    assert not torch.equal(built[0].state_dict()[head], built[1].state_dict()[head])

    backbone.save_pretrained(tmp_path / "saved")
    monkeypatch.setenv(MODEL_ROOT, str(tmp_path))
    loaded = load_classifier(ModelSpec(name="saved", hub="nowhere"), 3, 2, 0)
    assert weights_digest(loaded) == weights_digest(built[1])
