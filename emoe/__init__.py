"""Emergent Mixture-of-Experts: make any pre-trained transformer's FFNs a mixture of experts.

import emoe

config = emoe.EMoEConfig(num_experts=64, top_k=16, layers="last-half:2")
print(emoe.convert_(model, config))
"""

import importlib.metadata
import warnings
from typing import TYPE_CHECKING, Any

from emoe.architectures import register_ffn
from emoe.checkpoint import from_pretrained, save_pretrained
from emoe.config import EMoEConfig, GMoEConfig, config_from_dict
from emoe.convert import ConversionReport, convert_, to_dense_
from emoe.errors import CheckpointError, ConfigError, ConversionError, EMoEError
from emoe.noise import noisy_tuning_
from emoe.partitioning import partition
from emoe.records import record_routing
from emoe.routers import Router, register_router
from emoe.rows import FFNSpec
from emoe.settings import fix_experts_, set_backend_, set_top_k_
from emoe.training import aux_loss, update_gates_

if TYPE_CHECKING:
    from emoe.trainer import TrainerCallback as TrainerCallback

try:
    # a checkout's is that of its last installation: the commit says more, and is what runs record
    __version__ = importlib.metadata.version("emoe")
except importlib.metadata.PackageNotFoundError:  # on the path, but not installed
    __version__ = "0.0.0"

__all__ = [
    "CheckpointError",
    "ConfigError",
    "ConversionError",
    "ConversionReport",
    "EMoEConfig",
    "EMoEError",
    "FFNSpec",
    "GMoEConfig",
    "Router",
    "aux_loss",
    "config_from_dict",
    "convert_",
    "fix_experts_",
    "from_pretrained",
    "noisy_tuning_",
    "partition",
    "record_routing",
    "register_ffn",
    "register_router",
    "save_pretrained",
    "set_backend_",
    "set_top_k_",
    "to_dense_",
    "update_gates_",
]


def __getattr__(name: str) -> Any:
    if name == "TrainerCallback":  # and nothing else of emoe needs transformers
        from emoe.trainer import TrainerCallback

        return TrainerCallback
    if name == "retie_gates_":
        warnings.warn("emoe.retie_gates_ is now emoe.update_gates_", DeprecationWarning, stacklevel=2)
        return update_gates_
    raise AttributeError(f"module 'emoe' has no attribute '{name}'")
