"""Models by name: from the hub, a local folder, a package, or (for tests) a configuration."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from benchmarks.harness.base.errors import DataError
from benchmarks.harness.base.paths import MODELS
from benchmarks.harness.base.seeds import derive_seed
from benchmarks.harness.config.catalogue import load_models
from benchmarks.harness.sources.hub import hub_name
from benchmarks.harness.sources.local import own_folder
from benchmarks.harness.sources.packages import package_folder
from emoe.partitioning import tensor_digest


def locate(model: Mapping[str, Any]) -> tuple[str, str | None]:
    """Where a model's files are: a folder or a hub id, and the hub's revision.

    A folder of the model's name below the model root (environment variable ``EMOE_MODEL_ROOT``) comes first.
    """
    if folder := own_folder(model):
        return str(folder), None
    if "rebuilt" in model:
        return str(MODELS / model["name"]), None
    if "package" in model:
        return str(package_folder(model["package"], model["path"], model["sha256"])), None
    return model["hub"], model.get("revision")


def gguf_option(place: str) -> dict[str, str]:
    """How transformers is told of a folder that holds its weights as GGUF; nothing for other folders and the hub.

    Raises:
        DataError: several GGUF files, or the library that reads them is missing.
    """
    folder = Path(place)
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return {}
    files = sorted(folder.glob("*.gguf"))
    if not files:
        return {}
    if len(files) > 1:
        raise DataError(f"{folder} holds several GGUF files ({files[0].name}, {files[1].name}, …); keep one")
    if importlib.util.find_spec("gguf") is None:
        raise DataError(f"{files[0]} is a GGUF file, which the package 'gguf' reads; `pip install gguf`")
    return {"gguf_file": files[0].name}


def load_tokenizer(model: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """The model's tokenizer, which pads on the right; one without a padding token (GPT-2) pads with its end token."""
    if "config" in model:
        name = model["tokenizer"]
        lent = load_tokenizer(load_models()[name].spec(name))
        if lent.eos_token is None:  # BERT's, for a decoder
            lent.bos_token, lent.eos_token = lent.cls_token, lent.sep_token
        return lent
    place, revision = locate(model)
    tokenizer: PreTrainedTokenizerBase = from_pretrained(AutoTokenizer, place, revision, **gguf_option(place))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    # padding on the left would shift the positions of a decoder, by what else is in the batch
    tokenizer.padding_side = "right"
    return tokenizer


def load_backbone(model: Mapping[str, Any]) -> PreTrainedModel:
    """The pre-trained text model without a head, for clustering its neurons."""
    if "config" in model:
        torch.manual_seed(derive_seed("random weights", model["name"]))
        return cast(PreTrainedModel, AutoModel.from_config(AutoConfig.for_model(**model["config"])))
    place, revision = locate(model)
    loaded: PreTrainedModel = from_pretrained(AutoModel, place, revision, dtype=torch.float32)
    return loaded


def load_classifier(model: Mapping[str, Any], num_labels: int, seed: int, pad_token_id: int | None) -> PreTrainedModel:
    """The pre-trained model with a new head, the head drawn from ``seed``.

    Args:
        model: a resolved entry of ``models.yaml``.
        num_labels: classes; 1 for a regression.
        seed: of the head.
        pad_token_id: the tokenizer's padding token.
    """
    options: dict[str, Any] = {
        "num_labels": num_labels,
        "problem_type": "regression" if num_labels == 1 else "single_label_classification",
    }
    if "config" in model:
        # as a checkpoint without a file, so that the head is drawn as that of any other
        config, weights = AutoConfig.for_model(**model["config"], **options), load_backbone(model).state_dict()
        kind = cast(Any, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)])
        torch.manual_seed(seed)
        loaded: PreTrainedModel = kind.from_pretrained(None, config=config, state_dict=weights)
    else:
        place, revision = locate(model)
        torch.manual_seed(seed)
        loaded = from_pretrained(AutoModelForSequenceClassification, place, revision, dtype=torch.float32, **options)
    if loaded.config.pad_token_id is None:
        loaded.config.pad_token_id = pad_token_id
    return loaded


def describe(model: Mapping[str, Any], loaded: PreTrainedModel) -> str:
    """Where the weights came from, for the record: folder, package, or hub id with its commit."""
    if "config" in model:
        return "random weights"
    place, _ = locate(model)
    commit = getattr(loaded.config, "_commit_hash", None)
    if "package" in model and not own_folder(model):
        return f"package {model['package']}"
    if "rebuilt" in model and not own_folder(model):
        return f"rebuilt from the package {model['rebuilt']}"
    return place if own_folder(model) else hub_name(place, model.get("revision"), commit)


def weights_digest(model: nn.Module) -> str:
    """sha256 (16 hex digits) over all weights of a model."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}:{tensor_digest(tensor)}".encode())
    return digest.hexdigest()[:16]


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        DataError: it is missing or damaged.
    """
    try:
        return load_file(file)
    except FileNotFoundError as error:
        raise DataError(f"{file} does not exist") from error
    except SafetensorError as error:
        raise DataError(f"{file} is damaged: {error}") from error


def load_whole(loader: Any, model: Mapping[str, Any], **options: Any) -> PreTrainedModel:
    """A pre-trained model with its own head, every weight of which is there.

    Args:
        loader: one of transformers' auto classes.
        model: a resolved entry of ``models.yaml``.
        **options: how it loads.

    Raises:
        DataError: it is not there, or lacks weights of its layers.
    """
    place, revision = locate(model)
    loaded, notes = from_pretrained(loader, place, revision, output_loading_info=True, **options)
    if missing := sorted(notes["missing_keys"]):
        raise DataError(
            f"{place} does not hold the weights of '{model['name']}': it lacks '{missing[0]}' ({len(missing)} tensors in all)"
        )
    return cast(PreTrainedModel, loaded)


def from_pretrained(loader: Any, place: str, revision: str | None, **options: Any) -> Any:
    """What one of transformers' auto classes loads.

    Raises:
        DataError: it is not there.
    """
    try:
        return loader.from_pretrained(place, **({"revision": revision} if revision else {}), **options)
    except OSError as error:
        raise DataError(
            f"could not load the model '{place}': {error}\n"
            "Without the hub, put its folder below model_root (see config/README.md)"
        ) from error
