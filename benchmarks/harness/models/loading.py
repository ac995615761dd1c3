"""Load models and tokenizers from the hub, a folder, a package, or (for tests) a configuration.

The rules of :mod:`emoe.files` apply: only complete safetensors files are read, and no code that
comes with a model is executed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import snapshot_download
from torch import nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights

from benchmarks.harness.base import MODELS, DataError, derive_seed
from benchmarks.harness.config.catalogue import ModelSpec, model_spec
from benchmarks.harness.sources.hub import hub_name, is_commit
from benchmarks.harness.sources.local import user_model_folder
from benchmarks.harness.sources.packages import package_folder
from emoe.architectures import FFN, find_ffns
from emoe.config import resolve_layers
from emoe.errors import CheckpointError
from emoe.files import (
    DOWNLOADED,
    check_companions,
    class_and_message,
    load_stock,
    tensor_digest,
)


def _model_folder(model: ModelSpec) -> Path:
    """Return the folder of a model's files, and download them if the model is on the hub.

    If the user has a folder for the model below the model root (the environment variable
    ``EMOE_MODEL_ROOT``), it replaces all other sources.
    """
    user_folder = user_model_folder(model.name)
    if user_folder is not None:
        check_companions(user_folder)
        return user_folder
    if model.rebuilt is not None:
        return MODELS / model.name
    if model.package is not None:
        # models.yaml has both keys for each package
        path = cast(str, model.path)
        checksums = cast(dict[str, str], model.sha256)
        return package_folder(model.package, path, checksums)
    repository = cast(str, model.hub)  # a model with none of the other sources is on the hub
    return Path(snapshot_download(repository, revision=model.revision, allow_patterns=DOWNLOADED))


def load_pretrained(loader: Any, model: ModelSpec, **options: Any) -> PreTrainedModel:
    """Load a model, or build one with reproducible random weights.

    Args:
        loader: An auto class of transformers, such as ``AutoModel``.
        model: The model; if it has a ``config``, its weights are random.
        **options: Options of :func:`emoe.files.load_stock`. Random weights use only ``dtype``.

    Raises:
        DataError: The weights are missing, damaged, pickled or do not fit.
    """
    if model.config is not None:
        dtype = options.get("dtype", torch.float32)
        torch.manual_seed(derive_seed("random weights", model.name))
        built = loader.from_config(load_config(model), dtype=dtype)
        return cast(PreTrainedModel, built)
    with loading_errors(model):
        folder = _model_folder(model)
        return cast(PreTrainedModel, load_stock(loader, folder, **options))


@contextmanager
def loading_errors(model: ModelSpec) -> Iterator[None]:
    """Raise a one-line :class:`DataError` if the files of a model cannot be loaded."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # a damaged file raises anything
        reason = class_and_message(error)
        if isinstance(error, CheckpointError):
            reason = str(error)  # already one line, with the name of the file
        # the folder or repository that was read; other models have only a name
        place = user_model_folder(model.name) or model.hub or model.name
        raise DataError(
            f"could not load the model '{place}': {reason}; "
            "without the hub, put its folder below model_root (see config/README.md)"
        ) from error


def load_tokenizer(model: ModelSpec) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer. It pads on the right.

    A tokenizer without a padding token (GPT-2) pads with the end token.
    """
    if model.config is not None:
        tokenizer = _borrow_tokenizer(model)
    else:
        with loading_errors(model):
            tokenizer = AutoTokenizer.from_pretrained(
                str(_model_folder(model)), trust_remote_code=False
            )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    # padding on the left would shift the positions of a decoder by the length of other rows
    tokenizer.padding_side = "right"
    if model.modality == "seq2seq":  # T5 takes only these inputs; BERT's tokenizer adds more
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
    return tokenizer


def _borrow_tokenizer(model: ModelSpec) -> PreTrainedTokenizerBase:
    """Load the tokenizer of the other model that a model with random weights names."""
    other = model_spec(cast(str, model.tokenizer))
    tokenizer = load_tokenizer(other)
    if tokenizer.eos_token is None:  # a decoder with BERT's tokenizer needs these tokens
        tokenizer.bos_token = tokenizer.cls_token
        tokenizer.eos_token = tokenizer.sep_token
    return tokenizer


def load_config(model: ModelSpec) -> PreTrainedConfig:
    """Load a model's configuration, without its weights.

    Raises:
        DataError: The files of the model cannot be loaded.
    """
    if model.config is not None:
        return AutoConfig.for_model(**model.config)
    with loading_errors(model):
        return AutoConfig.from_pretrained(str(_model_folder(model)), trust_remote_code=False)


def architecture_of(network: nn.Module) -> str:
    """Return the ``model_type`` of a network; its class if it is of timm, such as ``Beit``."""
    # models of timm have no configuration
    config = getattr(network, "config", None)
    return str(getattr(config, "model_type", type(network).__name__))


def load_backbone(model: ModelSpec) -> PreTrainedModel:
    """Load a pre-trained text model without a head, to cluster its neurons.

    Raises:
        DataError: The weights are missing or damaged.
    """
    return load_pretrained(AutoModel, model, dtype=torch.float32)


def load_classifier(
    model: ModelSpec, num_labels: int, seed: int, pad_token_id: int | None
) -> PreTrainedModel:
    """Load a pre-trained text model with a new head.

    Args:
        model: The model.
        num_labels: The number of classes; 1 for a regression.
        seed: The seed of the head.
        pad_token_id: The padding token of the tokenizer.

    Raises:
        DataError: The weights are missing or damaged.
    """
    problem_type = "regression" if num_labels == 1 else "single_label_classification"
    options: dict[str, Any] = {"num_labels": num_labels, "problem_type": problem_type}
    if model.config is not None:
        loaded = _random_classifier(model, seed, options)
    else:
        torch.manual_seed(seed)
        loaded = load_pretrained(
            AutoModelForSequenceClassification, model, dtype=torch.float32, **options
        )
    if loaded.config.pad_token_id is None:
        loaded.config.pad_token_id = pad_token_id
    return loaded


def _random_classifier(model: ModelSpec, seed: int, options: dict[str, Any]) -> PreTrainedModel:
    """Build a text classifier whose backbone has the random weights of :func:`load_backbone`.

    The weights are loaded as a checkpoint without a head, so that transformers draws the head in
    the same way as for a real checkpoint.

    Args:
        model: The model, which has a ``config``.
        seed: The seed of the head.
        options: Further options of the configuration.
    """
    settings = cast(dict[str, Any], model.config)
    config = AutoConfig.for_model(**settings, **options)
    weights = load_backbone(model).state_dict()
    classifier_type = cast(Any, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)])
    torch.manual_seed(seed)  # after load_backbone, which sets another seed
    loaded: PreTrainedModel = classifier_type.from_pretrained(
        None, config=config, state_dict=weights
    )
    return loaded


def load_seq2seq(model: ModelSpec) -> PreTrainedModel:
    """Load a pre-trained encoder-decoder with its language-modelling head, in float32.

    Raises:
        DataError: The weights are missing or damaged.
    """
    return load_pretrained(AutoModelForSeq2SeqLM, model, dtype=torch.float32, new_head=False)


def load_language_model(model: ModelSpec) -> PreTrainedModel:
    """Load a pre-trained model with its language-modelling head, in float32, bfloat16 or 4 bits.

    Raises:
        DataError: The weights are missing or damaged.
    """
    options: dict[str, Any] = {"dtype": _dtype(model), "new_head": False}
    if model.quantize is not None:
        options["quantization_config"] = _four_bit(model)
    return load_pretrained(AutoModelForCausalLM, model, **options)


def load_language_model_to_cluster(model: ModelSpec, layers: Any) -> PreTrainedModel:
    """Load a pre-trained language model to cluster the neurons of some layers.

    The in-projections of these layers have the type in which a run loads them. All other weights
    keep the type that ``config.json`` names, so that their files are mapped and not copied into
    memory. In another type, a model of 30 billion parameters would take 60 or 120 GB.

    Args:
        model: The model.
        layers: Layer numbers, or text such as ``last:2``.

    Raises:
        DataError: The weights are missing or damaged.
    """
    # random weights have no files, and weights in 4 bits are small
    if model.config is not None or model.quantize is not None:
        return load_language_model(model)
    loaded = load_pretrained(AutoModelForCausalLM, model, dtype="auto", new_head=False)
    for ffn in _ffns_of(loaded, layers):
        ffn.proj_in.to(_dtype(model))
    return loaded


def _dtype(model: ModelSpec) -> torch.dtype:
    """Return the dtype in which a language model's weights are loaded."""
    if model.weights == "bf16":
        return torch.bfloat16
    return torch.float32


def build_empty_language_model(model: ModelSpec, converted: Any) -> PreTrainedModel:
    """Build a language model for weights that another process sends.

    Args:
        model: The model.
        converted: The layers to convert, as layer numbers or text such as ``last:2``; None for
            none. The weights of their FFNs become zero, because the conversion reads them. All
            other weights stay uninitialised.
    """
    config = load_config(model)
    with no_init_weights():
        built: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=_dtype(model))
    built.tie_weights()
    for ffn in _ffns_of(built, converted):
        for parameter in built.get_submodule(ffn.name).parameters():
            parameter.data.zero_()
    return built


def _ffns_of(model: PreTrainedModel, layers: Any) -> list[FFN]:
    """Return the FFNs of some layers.

    Args:
        model: The model.
        layers: Layer numbers, or text such as ``last:2``; None for no layers.
    """
    if not layers:
        return []
    ffns = find_ffns(model)
    numbers = resolve_layers(layers, len(ffns))
    return [ffns[number] for number in numbers]


def _four_bit(model: ModelSpec) -> BitsAndBytesConfig:
    """Return the bitsandbytes settings for a language model in 4 bits.

    The head is not quantised, and neither are the FFNs of the layers that ``model.whole`` lists.
    """
    # on the device meta, the network has no weights; it only serves to find the FFNs
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(load_config(model))
    unquantised = []  # paths of modules
    for ffn in _ffns_of(network, layers=model.whole):
        for path, _ in ffn.projections():
            unquantised.append(f"{ffn.name}.{path}")
    unquantised.append("lm_head")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=model.quantize,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=unquantised,
    )


def source_of(
    model: ModelSpec, loaded: PreTrainedModel, *, with_digest: bool = True
) -> dict[str, str]:
    """Describe the weights of a loaded model for ``metrics.json``.

    Args:
        model: The model of the run's spec.
        loaded: The loaded model.
        with_digest: False to leave the digest empty.

    Returns:
        A dictionary with the source of the weights (``from``), and with the digest of all weights
        except the head (``weights``).
    """
    digest = weights_digest(loaded.base_model) if with_digest else ""
    # the hub's cache names the folder of a model after its commit
    folder_name = Path(str(loaded.name_or_path)).name
    commit = folder_name if is_commit(folder_name) else None
    return {"from": source_text(model, commit), "weights": digest}


def source_text(model: ModelSpec, commit: str | None) -> str:
    """Return the source of a model's weights as text.

    It is "random weights", the user's folder, a package, or the repository on the hub.

    Args:
        model: The model.
        commit: The commit that was read from the hub; only used for a model of the hub.
    """
    if model.config is not None or model.random is not None:
        return "random weights"
    user_folder = user_model_folder(model.name)
    if user_folder is not None:
        return str(user_folder)
    if model.package is not None:
        return f"package {model.package}"
    if model.rebuilt is not None:
        return f"rebuilt from the package {model.rebuilt}"
    repository = model.hub or f"timm/{model.timm}"
    return hub_name(repository, model.revision, commit)


def weights_digest(model: nn.Module) -> str:
    """Return 16 hex digits of the sha256 over all weights of a model."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}:{tensor_digest(tensor)}".encode())
    return digest.hexdigest()[:16]
