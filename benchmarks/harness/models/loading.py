"""Load models and tokenizers by name: from the hub, a folder, a package, or (for tests) a configuration.

All are read by the rules of :mod:`emoe.files`: safetensors, complete, and without their own code.
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
from benchmarks.harness.sources.hub import hub_name
from benchmarks.harness.sources.local import user_model_folder
from benchmarks.harness.sources.packages import package_folder
from emoe.architectures import FFN, find_ffns
from emoe.config import resolve_layers
from emoe.errors import CheckpointError
from emoe.files import DOWNLOADED, check_companions, load_stock, one_line, tensor_digest


def _model_folder(model: ModelSpec) -> Path:
    """Return the folder of a model's files. A model of the hub is downloaded.

    A folder of the model's name below the model root (environment variable ``EMOE_MODEL_ROOT``) comes first.
    """
    if folder := user_model_folder(model.name):
        check_companions(folder)
        return folder
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
        loader: The auto class of transformers.
        model: The resolved entry of ``models.yaml``; with ``config`` the weights are random.
        **options: Options of :func:`emoe.files.load_stock`.

    Raises:
        DataError: The weights are missing, damaged, pickled or do not fit.
    """
    if model.config is not None:
        torch.manual_seed(derive_seed("random weights", model.name))
        return cast(
            PreTrainedModel,
            loader.from_config(load_config(model), dtype=options.get("dtype", torch.float32)),
        )
    with loading_errors(model):
        return cast(PreTrainedModel, load_stock(loader, _model_folder(model), **options))


@contextmanager
def loading_errors(model: ModelSpec) -> Iterator[None]:
    """Raise a one-line :class:`DataError` if files cannot be loaded."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # a damaged file raises anything
        reason = str(error) if isinstance(error, CheckpointError) else one_line(error)
        raise DataError(
            f"could not load the model '{user_model_folder(model.name) or model.hub or model.name}': {reason}; "
            "without the hub, put its folder below model_root (see config/README.md)"
        ) from error


def load_tokenizer(model: ModelSpec) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer, which pads on the right, with the end token if it has no padding token (GPT-2)."""
    if model.config is not None:
        tokenizer = load_tokenizer(model_spec(cast(str, model.tokenizer)))
        if tokenizer.eos_token is None:  # BERT's, for a decoder
            tokenizer.bos_token, tokenizer.eos_token = tokenizer.cls_token, tokenizer.sep_token
    else:
        with loading_errors(model):
            tokenizer = AutoTokenizer.from_pretrained(
                str(_model_folder(model)), trust_remote_code=False
            )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    # padding on the left would shift the positions of a decoder, depending on the other rows of the batch
    tokenizer.padding_side = "right"
    if model.modality == "seq2seq":  # T5 takes only these; BERT's tokenizer adds more
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
    return tokenizer


def load_config(model: ModelSpec) -> PreTrainedConfig:
    """Load a model's configuration, without its weights (raises :class:`DataError`)."""
    if model.config is not None:
        return AutoConfig.for_model(**model.config)
    with loading_errors(model):
        return AutoConfig.from_pretrained(str(_model_folder(model)), trust_remote_code=False)


def load_backbone(model: ModelSpec) -> PreTrainedModel:
    """Load a pre-trained text model without a head, to cluster its neurons (raises :class:`DataError`)."""
    return load_pretrained(AutoModel, model, dtype=torch.float32)


def load_classifier(
    model: ModelSpec, num_labels: int, seed: int, pad_token_id: int | None
) -> PreTrainedModel:
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
    if model.config is not None:
        # an empty checkpoint, so that the head is drawn as for a loaded model
        config, weights = (
            AutoConfig.for_model(**model.config, **options),
            load_backbone(model).state_dict(),
        )
        kind = cast(Any, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)])
        torch.manual_seed(seed)
        loaded: PreTrainedModel = kind.from_pretrained(None, config=config, state_dict=weights)
    else:
        torch.manual_seed(seed)
        loaded = load_pretrained(
            AutoModelForSequenceClassification, model, dtype=torch.float32, **options
        )
    if loaded.config.pad_token_id is None:
        loaded.config.pad_token_id = pad_token_id
    return loaded


def load_seq2seq(model: ModelSpec) -> PreTrainedModel:
    """Load a pre-trained encoder-decoder with its language-modelling head, in float32 (raises :class:`DataError`)."""
    return load_pretrained(AutoModelForSeq2SeqLM, model, dtype=torch.float32, new_head=False)


def load_language_model(model: ModelSpec) -> PreTrainedModel:
    """Load a pre-trained model with its language-modelling head (raises :class:`DataError`).

    Args:
        model: The resolved entry of ``models.yaml``. Optional keys: ``weights`` (the dtype, ``fp32`` by default),
            ``quantize``, and ``whole`` (layers whose FFNs are not quantised).
    """
    options = {"quantization_config": _four_bit(model)} if model.quantize is not None else {}
    return load_pretrained(
        AutoModelForCausalLM, model, dtype=_dtype(model), new_head=False, **options
    )


def _dtype(model: ModelSpec) -> torch.dtype:
    return torch.bfloat16 if model.weights == "bf16" else torch.float32


def build_empty_language_model(model: ModelSpec, converted: Any) -> PreTrainedModel:
    """Build a language model for weights that another process sends.

    Args:
        model: The resolved entry of ``models.yaml``.
        converted: The layers to convert. Their weights become zero; all others stay uninitialised.
    """
    with no_init_weights():
        built: PreTrainedModel = AutoModelForCausalLM.from_config(
            load_config(model), dtype=_dtype(model)
        )
    built.tie_weights()
    for ffn in _ffns_of(built, converted):
        for parameter in built.get_submodule(ffn.name).parameters():
            parameter.data.zero_()
    return built


def _ffns_of(model: PreTrainedModel, layers: Any) -> list[FFN]:
    """Return the FFNs of the requested layers, such as ``last:2``; none if the request is empty."""
    ffns = find_ffns(model)
    return [ffns[number] for number in resolve_layers(layers, len(ffns))] if layers else []


def _four_bit(model: ModelSpec) -> BitsAndBytesConfig:
    """Return settings of bitsandbytes that keep the head and the FFNs of ``whole`` unquantised."""
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(load_config(model))
    whole = [
        f"{ffn.name}.{path}"
        for ffn in _ffns_of(network, model.whole)
        for path, _ in ffn.projections()
    ]
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=model.quantize,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=[*whole, "lm_head"],
    )


def source_of(
    model: ModelSpec, loaded: PreTrainedModel, *, with_digest: bool = True
) -> dict[str, str]:
    """Describe the weights of a loaded model for the record: their source, and their digest without the head's."""
    digest = weights_digest(loaded.base_model) if with_digest else ""
    return {"from": describe(model, Path(str(loaded.name_or_path)).name), "weights": digest}


def describe(model: ModelSpec, commit: str | None) -> str:
    """Name the source of a model's weights: folder, package, or hub id with the ``commit`` that was read."""
    if model.config is not None or model.random is not None:
        return "random weights"
    if folder := user_model_folder(model.name):
        return str(folder)
    if model.package is not None:
        return f"package {model.package}"
    if model.rebuilt is not None:
        return f"rebuilt from the package {model.rebuilt}"
    return hub_name(model.hub or f"timm/{model.timm}", model.revision, commit)


def weights_digest(model: nn.Module) -> str:
    """Return 16 hex digits of the sha256 over all weights of a model."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}:{tensor_digest(tensor)}".encode())
    return digest.hexdigest()[:16]
