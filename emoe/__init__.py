"""Emergent Mixture-of-Experts: turn any transformer's FFNs into a mixture of experts.

import emoe

config = emoe.EMoEConfig(num_experts=64, top_k=16, layers="last-half:2")
print(emoe.convert_(model, config))
"""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

from emoe.config import EMoEConfig, GMoEConfig, config_from_dict
from emoe.errors import CheckpointError, ConfigError, ConversionError, EMoEError
from emoe.registration import register_loader

if TYPE_CHECKING:
    from emoe.architectures import FFNSpec, register_ffn
    from emoe.checkpoint import from_pretrained, save_pretrained
    from emoe.convert import ConversionReport, convert_, to_dense_
    from emoe.layer import aux_loss, update_gates_
    from emoe.partitioning import partition
    from emoe.records import record_routing
    from emoe.routers import Router, register_router
    from emoe.settings import fix_experts_, for_inference_, set_backend_, set_top_k_
    from emoe.trainer import TrainerCallback as TrainerCallback

# imported on first use, because planning a benchmark needs neither PyTorch nor transformers
_NAMES = {
    "architectures": ("FFNSpec", "register_ffn"),
    "checkpoint": ("from_pretrained", "save_pretrained"),
    "convert": ("ConversionReport", "convert_", "to_dense_"),
    "layer": ("aux_loss", "update_gates_"),
    "partitioning": ("partition",),
    "records": ("record_routing",),
    "routers": ("Router", "register_router"),
    "settings": ("fix_experts_", "for_inference_", "set_backend_", "set_top_k_"),
    "trainer": ("TrainerCallback",),
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names}

__version__ = importlib.metadata.version("emoe")

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
    "for_inference_",
    "from_pretrained",
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
    if name not in _MODULES:
        raise AttributeError(f"module 'emoe' has no attribute '{name}'")
    return globals().setdefault(name, getattr(importlib.import_module(f"emoe.{_MODULES[name]}"), name))


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})


register_loader()  # so that AutoModel.from_pretrained loads converted checkpoints
