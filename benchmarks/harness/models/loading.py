"""Load models and tokenizers by name: from the hub, a folder, a package, or (for tests) a configuration.

All are read by the rules of :mod:`emoe.files`: safetensors or GGUF, complete, and without their own code.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights

from benchmarks.harness.base import MODELS, DataError, DefinitionError, derive_seed
from benchmarks.harness.config.catalogue import load_models
from benchmarks.harness.sources.hub import hub_name
from benchmarks.harness.sources.local import user_model_folder
from benchmarks.harness.sources.packages import package_folder
from emoe.architectures import find_ffns
from emoe.config import resolve_layers
from emoe.errors import CheckpointError
from emoe.files import DOWNLOADED, Weights, load_stock, one_line
from emoe.files import read_tensors as read_checkpoint_tensors
from emoe.partitioning import tensor_digest

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def _model_folder(model: Mapping[str, Any]) -> Path:
    """Return the folder of a model's files. A model of the hub is downloaded.

    A folder of the model's name below the model root (environment variable ``EMOE_MODEL_ROOT``) comes first.
    """
    if folder := user_model_folder(model):
        return folder
    if "rebuilt" in model:
        return MODELS / model["name"]
    if "package" in model:
        return package_folder(model["package"], model["path"], model["sha256"])
    return Path(snapshot_download(model["hub"], revision=model.get("revision"), allow_patterns=DOWNLOADED))


def load_settings(loader: Any, model: Mapping[str, Any]) -> Any:
    """Load a configuration or a tokenizer (raises :class:`DataError`)."""
    with _loading(model):
        folder = _model_folder(model)
        return loader.from_pretrained(str(folder), trust_remote_code=False, **_gguf_option(folder))


def load_pretrained(loader: Any, model: Mapping[str, Any], **options: Any) -> tuple[PreTrainedModel, Path]:
    """Load a model's weights.

    Args:
        loader: The auto class of transformers.
        model: The resolved entry of ``models.yaml``.
        **options: Options of the loader.

    Returns:
        The model, and the folder of its weights.

    Raises:
        DataError: The weights are missing, damaged, pickled or another model's.
    """
    with _loading(model):
        folder = _model_folder(model)
        if not (gguf := _gguf_option(folder)):
            return cast(PreTrainedModel, load_stock(loader, folder, **options)), folder
        loaded, info = loader.from_pretrained(
            str(folder), trust_remote_code=False, output_loading_info=True, **gguf, **options
        )
        if missing := sorted(info["missing_keys"]):
            raise DataError(f"{folder} does not hold the weights of '{model['name']}': it lacks '{missing[0]}'")
        return loaded, folder


@contextmanager
def _loading(model: Mapping[str, Any]) -> Iterator[None]:
    """Raise a one-line :class:`DataError` if files cannot be loaded."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # a damaged file raises anything
        reason = str(error) if isinstance(error, CheckpointError) else one_line(error)
        raise DataError(
            f"could not load the model '{user_model_folder(model) or model.get('hub', model['name'])}': {reason}; "
            "without the hub, put its folder below model_root (see config/README.md)"
        ) from error


def check_stored(network: nn.Module, folder: Path, name: str) -> None:
    """Raise :class:`DataError` if a folder lacks a parameter of a network, or has it in another shape."""
    shapes = {key: parameter.shape for key, parameter in network.named_parameters()}  # tied ones once
    stored = Weights(folder)
    names = stored.find(network, shapes)
    stored_shapes: dict[str, list[int]] = {}
    for path in set(stored.files.values()):
        with safe_open(path, framework="pt") as file:
            stored_shapes |= {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    for key, shape in shapes.items():
        if key not in names or stored_shapes[names[key]] != list(shape):
            raise DataError(f"{folder} does not hold the weights of '{name}': '{key}' is missing or has another shape")


def _gguf_option(folder: Path) -> dict[str, str]:
    """Return transformers' option for a folder with one GGUF file; empty for other folders."""
    files = sorted(folder.glob("*.gguf"))
    if not files or any(folder.glob("*.safetensors")):
        return {}
    if len(files) > 1:
        raise DataError(f"{folder} holds several GGUF files ({files[0].name}, {files[1].name}, …); keep one")
    if importlib.util.find_spec("gguf") is None:
        raise DataError(f"{files[0]} is a GGUF file, which the package 'gguf' reads; `pip install gguf`")
    return {"gguf_file": files[0].name}


def load_tokenizer(model: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer, which pads on the right, with the end token if it has no padding token (GPT-2)."""
    if "config" in model:
        name = model["tokenizer"]
        borrowed = load_tokenizer(load_models()[name].spec(name))
        if borrowed.eos_token is None:  # BERT's, for a decoder
            borrowed.bos_token, borrowed.eos_token = borrowed.cls_token, borrowed.sep_token
        return borrowed
    tokenizer: PreTrainedTokenizerBase = load_settings(AutoTokenizer, model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    # padding on the left would shift the positions of a decoder, depending on the other rows of the batch
    tokenizer.padding_side = "right"
    return tokenizer


def load_seq2seq_tokenizer(model: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """Load the tokenizer of an encoder-decoder; another model's tokenizer gets the same inputs."""
    tokenizer = load_tokenizer(model)
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    return tokenizer


def load_config(model: Mapping[str, Any]) -> PreTrainedConfig:
    """Load a model's configuration, without its weights (raises :class:`DataError`)."""
    if "config" in model:
        return AutoConfig.for_model(**model["config"])
    return cast(PreTrainedConfig, load_settings(AutoConfig, model))


def _random_model(loader: Any, model: Mapping[str, Any], **options: Any) -> PreTrainedModel:
    """Build a model with random weights, the same each time."""
    torch.manual_seed(derive_seed("random weights", model["name"]))
    return cast(PreTrainedModel, loader.from_config(AutoConfig.for_model(**model["config"]), **options))


def load_backbone(model: Mapping[str, Any]) -> PreTrainedModel:
    """Load a pre-trained text model without a head, to cluster its neurons (raises :class:`DataError`)."""
    if "config" in model:
        return _random_model(AutoModel, model)
    return load_pretrained(AutoModel, model, dtype=torch.float32)[0]


def load_classifier(model: Mapping[str, Any], num_labels: int, seed: int, pad_token_id: int | None) -> PreTrainedModel:
    """Load a pre-trained model with a new head (raises :class:`DataError`).

    Args:
        model: The resolved entry of ``models.yaml``.
        num_labels: The number of classes; 1 for a regression.
        seed: The seed of the head.
        pad_token_id: The padding token of the tokenizer.
    """
    options: dict[str, Any] = {
        "num_labels": num_labels,
        "problem_type": "regression" if num_labels == 1 else "single_label_classification",
    }
    if "config" in model:
        # as a checkpoint without a file, so that the head is drawn like any other
        config, weights = AutoConfig.for_model(**model["config"], **options), load_backbone(model).state_dict()
        kind = cast(Any, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)])
        torch.manual_seed(seed)
        loaded: PreTrainedModel = kind.from_pretrained(None, config=config, state_dict=weights)
    else:
        torch.manual_seed(seed)
        loaded, _ = load_pretrained(AutoModelForSequenceClassification, model, dtype=torch.float32, **options)
    if loaded.config.pad_token_id is None:
        loaded.config.pad_token_id = pad_token_id
    return loaded


def load_seq2seq(model: Mapping[str, Any]) -> PreTrainedModel:
    """Load a pre-trained encoder-decoder with its language-modelling head, in float32 (raises :class:`DataError`)."""
    if "config" in model:
        return _random_model(AutoModelForSeq2SeqLM, model)
    loaded, folder = load_pretrained(AutoModelForSeq2SeqLM, model, dtype=torch.float32)
    check_stored(loaded, folder, model["name"])
    return loaded


def load_language_model(model: Mapping[str, Any], converted: Any = (), *, empty: bool = False) -> PreTrainedModel:
    """Load a pre-trained model with its language-modelling head.

    Args:
        model: The resolved entry of ``models.yaml``, with ``weights`` (their type, ``fp32`` by default) and perhaps
            ``quantize`` and ``whole`` (layers whose FFNs are not quantised).
        converted: The layers whose FFNs will be converted; only read with ``empty``.
        empty: Leave the weights uninitialised (zero in these layers): another process sends them.

    Raises:
        DataError: The weights are missing, damaged or incomplete.
        DefinitionError: The package for 4 bits is missing.
    """
    dtype = DTYPES[model.get("weights", "fp32")]
    if empty:
        with no_init_weights():
            built: PreTrainedModel = AutoModelForCausalLM.from_config(load_config(model), dtype=dtype)
        built.tie_weights()
        ffns = find_ffns(built)
        for number in resolve_layers(converted, len(ffns)) if converted else ():  # a conversion reads them
            for parameter in built.get_submodule(ffns[number].name).parameters():
                parameter.data.zero_()
        return built
    if "config" in model:
        return _random_model(AutoModelForCausalLM, model, dtype=dtype)
    options: dict[str, Any] = {"quantization_config": _four_bit(model)} if "quantize" in model else {}
    loaded, folder = load_pretrained(AutoModelForCausalLM, model, dtype=dtype, **options)
    if not options and not _gguf_option(folder):
        check_stored(loaded, folder, model["name"])
    return loaded


def _four_bit(model: Mapping[str, Any]) -> Any:
    """Return bitsandbytes' settings, which leave out the head and the FFNs whose keys must be readable."""
    from transformers import BitsAndBytesConfig

    if importlib.util.find_spec("bitsandbytes") is None:
        raise DefinitionError(
            f"'{model['name']}' is asked for in 4 bits (tuning.quantize), which needs the package 'bitsandbytes'; "
            "`pip install bitsandbytes`"
        )
    with torch.device("meta"):
        ffns = find_ffns(AutoModelForCausalLM.from_config(load_config(model)))
    whole = resolve_layers(model["whole"], len(ffns)) if model["whole"] else ()
    kept = [
        f"{ffns[number].name}.{path}"
        for number in whole
        for path in (*(path for path, _ in ffns[number].inputs()), ffns[number].spec.proj_out)
    ]
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=model["quantize"],
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=[*kept, "lm_head"],
    )


def describe(model: Mapping[str, Any], loaded: PreTrainedModel) -> str:
    """Describe the source of the weights for the record: folder, package, or hub id with its commit."""
    if "config" in model:
        return "random weights"
    if folder := user_model_folder(model):
        return str(folder)
    if "package" in model:
        return f"package {model['package']}"
    if "rebuilt" in model:
        return f"rebuilt from the package {model['rebuilt']}"
    return hub_name(model["hub"], model.get("revision"), Path(str(loaded.name_or_path)).name)


def weights_digest(model: nn.Module) -> str:
    """Return 16 hex digits of the sha256 over all weights of a model."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}:{tensor_digest(tensor)}".encode())
    return digest.hexdigest()[:16]


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file (raises :class:`DataError`)."""
    try:
        return read_checkpoint_tensors(file)
    except CheckpointError as error:
        raise DataError(str(error)) from error
