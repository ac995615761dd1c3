"""Language models by name: safetensors of one or several files, GGUF, 4-bit."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from benchmarks.harness.base.errors import DefinitionError
from benchmarks.harness.base.seeds import derive_seed
from benchmarks.harness.models.loading import from_pretrained, gguf_option, load_whole, locate
from emoe.architectures import find_ffns
from emoe.files import save_weights
from emoe.layer_numbers import resolve_layers

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def load_config(model: Mapping[str, Any]) -> PreTrainedConfig:
    """The configuration of a model, read without its weights.

    Raises:
        DataError: it is not there.
    """
    if "config" in model:
        return AutoConfig.for_model(**model["config"])
    place, revision = locate(model)
    config: PreTrainedConfig = from_pretrained(AutoConfig, place, revision, **gguf_option(place))
    return config


def load_language_model(model: Mapping[str, Any], converted: Any = (), *, empty: bool = False) -> PreTrainedModel:
    """A pre-trained model with its language-modelling head.

    Args:
        model: a resolved entry of ``models.yaml``, with ``weights`` (their type, ``fp32`` where left out) and perhaps ``quantize`` and
            ``whole`` (layers whose FFNs are not quantised).
        converted: layers whose FFNs will be split, as :func:`emoe.convert_` takes them; only looked at where ``empty``.
        empty: leave the weights as the memory happens to be, zero in these layers: another process will send them. Memory that
            nobody writes to is not taken.

    Raises:
        DataError: it is not there, is damaged, or lacks weights of its layers.
        DefinitionError: 4 bits without the package that makes them.
    """
    dtype = DTYPES[model.get("weights", "fp32")]
    if "config" in model or empty:
        config = load_config(model)
        torch.manual_seed(derive_seed("random weights", model["name"]))
        with no_init_weights() if empty else nullcontext():
            built: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
        built.tie_weights()
        if empty:
            ffns = find_ffns(built)
            for i in _numbers(converted, len(ffns)):  # a conversion looks at them
                for parameter in built.get_submodule(ffns[i].name).parameters():
                    parameter.data.zero_()
        return built
    place, _ = locate(model)
    options: dict[str, Any] = gguf_option(place) or {"use_safetensors": True}
    if "quantize" in model:
        options["quantization_config"] = _four_bit(model)
    return load_whole(AutoModelForCausalLM, model, dtype=dtype, **options)


def unpack_gguf(source: Path, folder: Path) -> None:
    """Write the model of a GGUF folder as an ordinary one, in float32, with its tokenizer.

    Args:
        source: a folder with one GGUF file.
        folder: gets safetensors, configuration and tokenizer; what is there already is replaced.

    Raises:
        DataError: no GGUF file, several, or one that cannot be read.
    """
    option = gguf_option(str(source))
    loaded = from_pretrained(AutoModelForCausalLM, str(source), None, dtype=torch.float32, **option)
    config = copy.deepcopy(loaded.config)
    del config.quantization_config  # the weights are plain now, which transformers does not know
    with no_init_weights():
        plain = AutoModelForCausalLM.from_config(config)
    plain.tie_weights()
    plain.load_state_dict(loaded.state_dict())
    from_pretrained(AutoTokenizer, str(source), None, **option).save_pretrained(folder)
    save_weights(plain, folder)


def meta_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The model without memory for its weights: to count them."""
    with torch.device("meta"):
        return cast(PreTrainedModel, AutoModelForCausalLM.from_config(config))


def _four_bit(model: Mapping[str, Any]) -> Any:
    """bitsandbytes' 4-bit weights for all but the head and some FFNs: keys of experts must be readable."""
    from transformers import BitsAndBytesConfig

    if importlib.util.find_spec("bitsandbytes") is None:
        raise DefinitionError(
            f"'{model['name']}' is asked for in 4 bits (tuning.quantize), which needs the package 'bitsandbytes'; `pip install bitsandbytes`"
        )
    ffns = find_ffns(meta_model(load_config(model)))
    kept = [
        f"{ffns[i].name}.{path}"
        for i in _numbers(model["whole"], len(ffns))
        for path in (*(path for path, _ in ffns[i].inputs()), ffns[i].spec.proj_out)
    ]
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=model["quantize"],
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=[*kept, "lm_head"],
    )


def _numbers(layers: Any, count: int) -> Sequence[int]:
    return resolve_layers(layers, count) if layers else ()
