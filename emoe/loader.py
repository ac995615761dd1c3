"""Build the experts while transformers loads a converted checkpoint.

Transformers asks the quantizer that ``quantization_config`` names to prepare the model before the
weights load, and to finish it afterwards. Ours builds the experts, so that shards, ``device_map``,
``dtype``, hub ids and ``revision`` stay transformers' own work. It quantises nothing, and
transformers forgets it after loading.

Importing this module registers the loader (:mod:`emoe.registration` does so).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from torch import nn
from transformers.integrations.moe import ExpertsInterface
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from emoe import files
from emoe.checkpoint import (
    EXTRA_FILE,
    build_experts_,
    check_placement,
    check_routing_is_stored,
    load_extra_,
    read_partition_file_,
    stored_routing,
)
from emoe.convert import finish_conversion_
from emoe.errors import CheckpointError
from emoe.model_config import NEEDS_EMOE, QUANT_METHOD, Experts

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@register_quantization_config(QUANT_METHOD)
class ExpertsConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a converted checkpoint."""

    # after loading, transformers must remove the marks of a quantised model
    dequantize = True

    def __init__(self, **content: Any) -> None:
        self.quant_method: Any = QUANT_METHOD  # the base class knows transformers' own methods only
        try:
            self.experts = Experts.from_quantization_config(content)
        except ValueError as error:
            raise CheckpointError(
                f"config.json: quantization_config is damaged: {files.class_and_message(error)}"
            ) from error

    def to_dict(self) -> dict[str, Any]:
        """Return the ``quantization_config`` as in ``config.json``."""
        return self.experts.quantization_config()


@register_quantizer(QUANT_METHOD)
class ExpertsLoader(HfQuantizer):
    """Builds the experts of a model whose weights transformers loads."""

    requires_calibration = True  # only a converted checkpoint can be loaded, not a dense one
    quantization_config: ExpertsConfig

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> nn.Module:
        """Build the experts, and find the files that hold the state of their routers and biases.

        Transformers calls this method before it loads the weights. The state is among the weights,
        or in the extra file of a folder of emoe 0.1.

        Raises:
            CheckpointError: the state is in neither of them, or the configuration counts more or
                fewer layers than the weights have.
        """
        experts = self.quantization_config.experts
        self._folder: Path | None = None
        self._uses_extra_file = False
        # if the caller passes a state_dict, there are no files, and nothing can be checked
        if not checkpoint_files:
            self._layers = build_experts_(model, experts, "the checkpoint")
            return model

        paths = [Path(file) for file in checkpoint_files]
        folder = paths[0].parent  # all files are in one folder
        self._folder = folder
        file_of_tensor = files.tensor_files(paths)
        names_in_model = _names_in_model(model, file_of_tensor)
        files.check_layers(model, names_in_model, folder)
        self._layers = build_experts_(model, experts, folder)
        # Folders of emoe 0.1 have the routers in the extra file. If a Trainer wrote such a folder,
        # the routers are among the weights instead.
        has_extra_file = (folder / EXTRA_FILE).exists()
        has_routing_in_weights = bool(stored_routing(self._layers, file_of_tensor))
        self._uses_extra_file = has_extra_file and not has_routing_in_weights
        if not self._uses_extra_file:
            check_routing_is_stored(self._layers, file_of_tensor, folder)
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        """Load the checkpoint's files that only emoe writes, and finish the conversion.

        Transformers calls this method after it has loaded the weights.
        """
        check_placement(self._layers)
        if self._folder is not None:
            if self._uses_extra_file:
                load_extra_(self._layers, self._folder)
            # the neurons' original order is never among the weights
            read_partition_file_(self._layers, self._folder)
        finish_conversion_(model)
        return model

    def is_serializable(self) -> bool:
        """Return True: the model saves its weights as they are."""
        return True

    @property
    def is_trainable(self) -> bool:
        """True: the model trains like the dense one."""
        return True


def _names_in_model(model: PreTrainedModel, stored_names: Iterable[str]) -> list[str]:
    """Return the names that stored tensors have in the model.

    Transformers renames the tensors of some models while it loads them. For ViT,
    ``encoder.layer.0.…`` becomes ``layers.0.…``.
    """
    # transformers has not loaded this module yet when it imports ours
    from transformers.conversion_mapping import get_model_conversion_mapping

    renamings = get_model_conversion_mapping(model)
    names_in_model = []
    for stored_name in stored_names:
        name = stored_name
        # each renaming continues with the result of the one before
        for renaming in renamings:
            name, _pattern = renaming.rename_source_key(name)
        names_in_model.append(name)
    return names_in_model


def _refuse_experts(*_args: Any, **_kwargs: Any) -> NoReturn:
    """Raise an error that ``experts_implementation`` is not for this model.

    Transformers calls this function only in its own mixture-of-experts models.
    """
    raise CheckpointError(f"experts_implementation='{NEEDS_EMOE}' marks a converted dense model")


ExpertsInterface.register(NEEDS_EMOE, _refuse_experts)
