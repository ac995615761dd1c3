"""Load image classifiers of timm and transformers by name."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForImageClassification

from benchmarks.harness.base import DataError, DefinitionError, derive_seed
from benchmarks.harness.config.catalogue import ModelSpec
from benchmarks.harness.models.loading import (
    describe,
    load_config,
    load_pretrained,
    loading_errors,
    source_of,
    weights_digest,
)
from benchmarks.harness.sources.hub import cached_commit
from benchmarks.harness.sources.local import user_model_folder
from emoe.files import WEIGHT_FILES, read_tensors

_DEVIATION = 0.02  # timm truncates at 100 deviations, that is, never


class ImageClassifier(nn.Module):
    """Wrap an image network of timm or transformers in the same interface.

    Attributes:
        network: The model of timm or transformers.
        source: The source of the weights, and the digest of all weights except the head.
    """

    def __init__(
        self, network: nn.Module, source: Mapping[str, str], options: Mapping[str, Any]
    ) -> None:
        super().__init__()
        self.network, self.source, self._options = network, dict(source), dict(options)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Return the ``logits`` ``[rows, classes]``, and with labels the mean cross entropy ``loss``.

        Args:
            pixel_values: Normalised images ``[rows, 3, height, width]``.
            labels: Classes ``[rows]``.
        """
        output = self.network(pixel_values, **self._options)
        logits = output if isinstance(output, Tensor) else output.logits
        return (
            {"logits": logits}
            if labels is None
            else {"loss": F.cross_entropy(logits, labels), "logits": logits}
        )


def load_image_network(model: ModelSpec) -> nn.Module:
    """Load the pre-trained network, to cluster its neurons."""
    return load_image_classifier(
        model, num_classes=2, image_size=None, drop_path=0.0, seed=0
    ).network


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
        model: The resolved entry of ``models.yaml``.
        num_classes: The number of classes of the head.
        image_size: The width and height of the images in pixels; None for the size in pre-training.
        drop_path: The rate of stochastic depth: of the last block in timm (earlier ones rise linearly), of every
            block in DINOv2.
        seed: The seed of the head.
        dropout: The dropout before the head.

    Raises:
        DataError: The weights are missing or damaged.
        DefinitionError: The architecture has no stochastic depth.
    """
    network: Any
    if model.timm is not None:
        network, source = _load_timm(model, num_classes, image_size, drop_path, seed)
        head, resized = network.get_classifier(), False
    else:
        network, source = _load_transformers(model, num_classes, drop_path, seed)
        config = network.config
        head, resized = (
            network.classifier,
            config.model_type in ("vit", "deit") and config.image_size != image_size,
        )
    if dropout:
        head.register_forward_pre_hook(partial(_apply_dropout, dropout))
    return ImageClassifier(network, source, {"interpolate_pos_encoding": True} if resized else {})


def _apply_dropout(rate: float, head: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    return (F.dropout(args[0], rate, head.training),)


def _load_transformers(
    model: ModelSpec, num_classes: int, drop_path: float, seed: int
) -> tuple[nn.Module, dict[str, str]]:
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
    import timm

    options: dict[str, Any] = {"num_classes": 0, "drop_path_rate": drop_path}
    repository, revision, folder = (
        f"timm/{model.timm}",
        model.revision,
        user_model_folder(model.name),
    )
    is_random = model.random is not None
    if revision and not folder:
        options["pretrained_cfg_overlay"] = {"hf_hub_id": f"{repository}@{revision}"}
    with loading_errors(model):
        network: Any = timm.create_model(
            cast(str, model.timm), pretrained=not is_random and not folder, **options
        )
        if is_random:
            _draw_(network, derive_seed("random weights", model.name))
        elif folder:
            missing, _ = network.load_state_dict(
                read_tensors(folder / WEIGHT_FILES[0]), strict=False
            )  # but the head
            if missing:
                raise DataError(f"the weights in {folder} lack '{missing[0]}' of '{model.name}'")
    commit = cached_commit(repository, WEIGHT_FILES[0], revision)
    source = {"from": describe(model, commit), "weights": weights_digest(network)}
    if image_size is not None:
        network.set_input_size(img_size=image_size)  # resamples the positions
    torch.manual_seed(seed)
    network.reset_classifier(num_classes)
    head = cast(nn.Linear, network.get_classifier())
    nn.init.normal_(head.weight, std=_DEVIATION)
    nn.init.zeros_(head.bias)
    return network, source


def _draw_(network: nn.Module, seed: int) -> None:
    """Draw random weights that are equal in all torch releases, unlike timm's (``trunc_normal_``)."""
    torch.manual_seed(seed)
    for name, weight in network.named_parameters():
        if weight.ndim > 1:
            nn.init.normal_(weight, std=_DEVIATION)
        elif name.endswith("bias"):
            nn.init.zeros_(weight)  # timm draws some
