"""Load image classifiers of timm and transformers by name."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForImageClassification

from benchmarks.harness.base import DataError, DefinitionError, derive_seed
from benchmarks.harness.config.catalogue import ModelSpec
from benchmarks.harness.models.loading import (
    load_config,
    load_pretrained,
    loading_errors,
    source_of,
    source_text,
    weights_digest,
)
from benchmarks.harness.sources.hub import cached_commit
from benchmarks.harness.sources.local import user_model_folder
from emoe.architectures import find_ffns
from emoe.files import WEIGHT_FILE, read_tensors

# Standard deviation of random weights, as in timm. timm also cuts them off at 100 deviations, which
# has no effect.
_WEIGHT_DEVIATION = 0.02


class ImageClassifier(nn.Module):
    """An image network of timm or transformers, with one interface for both.

    Attributes:
        network: The model of timm or transformers.
        source: A dictionary with the source of the weights (``from``), and with the digest of all
            weights except the head (``weights``).
    """

    def __init__(
        self, network: nn.Module, source: Mapping[str, str], options: Mapping[str, Any]
    ) -> None:
        super().__init__()
        self.network = network
        self.source = dict(source)
        self._options = dict(options)  # additional arguments for each call of the network

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Return the ``logits`` ``[rows, classes]``, and the mean ``loss`` if labels are given.

        Args:
            pixel_values: Normalised images ``[rows, 3, height, width]``.
            labels: Classes ``[rows]``.
        """
        output = self.network(pixel_values, **self._options)
        # timm returns the logits themselves
        logits = output if isinstance(output, Tensor) else output.logits
        if labels is None:
            return {"logits": logits}
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def load_image_network(model: ModelSpec) -> nn.Module:
    """Load the pre-trained network whose neurons are clustered.

    Its head is not used, because the partition of the neurons does not depend on the head.
    """
    classifier = load_image_classifier(model, num_classes=2, image_size=None, drop_path=0.0, seed=0)
    return classifier.network


def load_image_classifier(
    model: ModelSpec,
    num_classes: int,
    image_size: int | None,
    drop_path: float,
    seed: int,
    dropout: float = 0.0,
) -> ImageClassifier:
    """Load the pre-trained network with a new head.

    Args:
        model: The model.
        num_classes: The number of classes of the head.
        image_size: The width and height of the images in pixels; None for the size in pre-training.
        drop_path: The rate of stochastic depth. DINOv2 has this rate in every block. In timm the
            last block has it, and the rates of the blocks rise linearly to it.
        seed: The seed of the head.
        dropout: The dropout before the head.

    Raises:
        DataError: The weights are missing or damaged.
        DefinitionError: The architecture has no stochastic depth, or the head of a timm model is
            not one linear layer.
        ConversionError: The FFNs of a timm model are unknown.
    """
    network: Any
    if model.timm is not None:
        network, source = _load_timm(model, num_classes, image_size, drop_path, seed)
        head = network.get_classifier()
        call_options = {}
    else:
        network, source = _load_transformers(model, num_classes, drop_path, seed)
        head = network.classifier
        call_options = _resizing_options(network.config, image_size)
    if dropout:
        head.register_forward_pre_hook(partial(_apply_dropout, dropout))
    return ImageClassifier(network, source, call_options)


def _resizing_options(config: Any, image_size: int | None) -> dict[str, bool]:
    """Return the arguments that a transformers network needs for images of another size.

    Args:
        config: The configuration of the network, with the image size of the pre-training.
        image_size: The width and height of the images in pixels; None for the size in pre-training.
    """
    # other architectures, such as DINOv2, always interpolate their positions
    needs_option = config.model_type in ("vit", "deit")
    has_other_size = image_size is not None and image_size != config.image_size
    if needs_option and has_other_size:
        return {"interpolate_pos_encoding": True}
    return {}


def _apply_dropout(rate: float, head: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    """Apply dropout to the input of a head, as a pre-hook of the head."""
    (features,) = args
    return (F.dropout(features, rate, head.training),)


def _load_transformers(
    model: ModelSpec, num_classes: int, drop_path: float, seed: int
) -> tuple[nn.Module, dict[str, str]]:
    """Load an image classifier of transformers with a new head.

    Returns:
        The classifier, and the source of its weights: ``source`` of :class:`ImageClassifier`.

    Raises:
        DataError: The weights are missing or damaged.
        DefinitionError: The architecture has no stochastic depth.
    """
    options: dict[str, Any] = {"num_labels": num_classes}
    if drop_path:
        if not hasattr(load_config(model), "drop_path_rate"):
            raise DefinitionError(
                f"the model '{model.name}' has no drop_path; set training.drop_path to 0 for it"
            )
        options["drop_path_rate"] = drop_path
    torch.manual_seed(seed)
    # a checkpoint may have a head for other classes, or none
    network = load_pretrained(
        AutoModelForImageClassification,
        model,
        dtype=torch.float32,
        ignore_mismatched_sizes=True,
        **options,
    )
    return network, source_of(model, network)


def _load_timm(
    model: ModelSpec, num_classes: int, image_size: int | None, drop_path: float, seed: int
) -> tuple[nn.Module, dict[str, str]]:
    """Load an image classifier of timm with a new head.

    Returns:
        The classifier, and the source of its weights: ``source`` of :class:`ImageClassifier`.

    Raises:
        DataError: The weights are missing or damaged.
        DefinitionError: The head is not one linear layer.
        ConversionError: The FFNs of this architecture are unknown.
    """
    network = _load_timm_backbone(model, drop_path)
    # Raises the error for unknown architectures. This comes first, because their networks may lack
    # the methods that are called below.
    find_ffns(network)
    repository = f"timm/{model.timm}"
    commit = cached_commit(repository, WEIGHT_FILE, model.revision)
    # computed first, because the next lines change the pre-trained weights
    source = {"from": source_text(model, commit), "weights": weights_digest(network)}
    if image_size is not None:
        network.set_input_size(img_size=image_size)  # resamples the position embeddings
    torch.manual_seed(seed)
    network.reset_classifier(num_classes)
    head = network.get_classifier()
    if not isinstance(head, nn.Linear):  # a distilled model has two
        raise DefinitionError(
            f"the head of the model '{model.name}' is not one linear layer; "
            f"choose another model of timm than '{model.timm}'"
        )
    nn.init.normal_(head.weight, std=_WEIGHT_DEVIATION)
    nn.init.zeros_(head.bias)
    return network, source


def _load_timm_backbone(model: ModelSpec, drop_path: float) -> Any:
    """Load a timm network that has no head.

    Its weights are random, or come from the user's folder or the hub.

    Raises:
        DataError: The weights are missing or damaged.
    """
    import timm

    options: dict[str, Any] = {"num_classes": 0, "drop_path_rate": drop_path}  # 0: no head
    is_random = model.random is not None
    user_folder = user_model_folder(model.name)
    comes_from_hub = not is_random and user_folder is None
    # timm downloads the newest weights unless the name of the repository ends with a revision
    if comes_from_hub and model.revision:
        options["pretrained_cfg_overlay"] = {"hf_hub_id": f"timm/{model.timm}@{model.revision}"}
    with loading_errors(model):
        network = timm.create_model(cast(str, model.timm), pretrained=comes_from_hub, **options)
        if is_random:
            _randomise_(network, derive_seed("random weights", model.name))
        elif user_folder is not None:
            _load_weights_(network, user_folder, model.name)
    return network


def _load_weights_(network: nn.Module, folder: Path, name: str) -> None:
    """Load the user's own weights into a timm network that has no head.

    Args:
        network: The network.
        folder: The user's folder with the file of weights.
        name: The name of the model, for messages.

    Raises:
        DataError: The file lacks weights of the network.
    """
    tensors = read_tensors(folder / WEIGHT_FILE)
    # not strict, because the file may also have a head
    missing, _ = network.load_state_dict(tensors, strict=False)
    if missing:
        raise DataError(f"the weights in {folder} lack '{missing[0]}' of '{name}'")


def _randomise_(network: nn.Module, seed: int) -> None:
    """Draw random weights and set biases to zero; the scales of norms stay as they are.

    These weights are equal in all torch releases. Those from timm's ``trunc_normal_`` are not.
    """
    torch.manual_seed(seed)
    for name, weight in network.named_parameters():
        if weight.ndim > 1:
            nn.init.normal_(weight, std=_WEIGHT_DEVIATION)
        elif name.endswith("bias"):
            nn.init.zeros_(weight)  # timm initialises some biases randomly
