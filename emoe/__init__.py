"""Emergent Mixture-of-Experts: turn any transformer's FFNs into a mixture of experts.

import emoe

config = emoe.EMoEConfig(num_experts=64, top_k=16, layers="last-half:2")
print(emoe.convert_(model, config))
"""

import importlib
import importlib.metadata
import importlib.util
from typing import TYPE_CHECKING, Any

from emoe.config import EMoEConfig, GMoEConfig, config_from_dict
from emoe.errors import CheckpointError, ConfigError, ConversionError, EMoEError
from emoe.registration import register_loader

if TYPE_CHECKING:
    from emoe.architectures import FFNSpec, register_ffn
    from emoe.checkpoint import from_pretrained, save_pretrained
    from emoe.convert import ConversionReport, config_of, convert_, is_converted, to_dense_
    from emoe.layer import aux_loss, update_gates_
    from emoe.partitioning import partition
    from emoe.records import record_routing
    from emoe.routers import Router, register_router
    from emoe.settings import fix_experts_, for_inference_, set_backend_, set_top_k_
    from emoe.trainer import TrainerCallback

# These names are imported at their first use, each from its module. Planning a benchmark imports
# emoe, but needs neither PyTorch nor transformers.
_MODULES = {
    "ConversionReport": "convert",
    "FFNSpec": "architectures",
    "Router": "routers",
    "TrainerCallback": "trainer",
    "aux_loss": "layer",
    "config_of": "convert",
    "convert_": "convert",
    "fix_experts_": "settings",
    "for_inference_": "settings",
    "from_pretrained": "checkpoint",
    "is_converted": "convert",
    "partition": "partitioning",
    "record_routing": "records",
    "register_ffn": "architectures",
    "register_router": "routers",
    "save_pretrained": "checkpoint",
    "set_backend_": "settings",
    "set_top_k_": "settings",
    "to_dense_": "convert",
    "update_gates_": "layer",
}

try:
    __version__ = importlib.metadata.version("emoe")
except importlib.metadata.PackageNotFoundError:
    # A checkout on the path that nobody installed has no metadata. Its version is unknown.
    __version__ = "0.0.0+unknown"

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
    "config_of",
    "convert_",
    "fix_experts_",
    "for_inference_",
    "from_pretrained",
    "is_converted",
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

# The callback's module imports transformers, which is not a dependency. `from emoe import *`
# imports every name in __all__, and must not fail without transformers.
if importlib.util.find_spec("transformers") is not None:
    __all__ += ["TrainerCallback"]


def __getattr__(name: str) -> Any:
    """Import a name's module at the first use of the name."""
    if name not in _MODULES:
        raise AttributeError(f"module 'emoe' has no attribute '{name}'")
    module = importlib.import_module(f"emoe.{_MODULES[name]}")
    value = getattr(module, name)
    # the next use finds the name here, because Python calls __getattr__ for missing names only
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List also the names that are not imported yet."""
    return sorted({*globals(), *_MODULES})


register_loader()  # so that AutoModel.from_pretrained loads converted checkpoints
