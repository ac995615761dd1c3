"""Register the loader of converted checkpoints with transformers, once transformers is imported.

``import emoe`` must not import transformers: planning a benchmark imports emoe in every process and
needs neither transformers nor PyTorch, whose import takes seconds. But
``AutoModel.from_pretrained`` must know the loader, in whatever order a program imports the two. So
Python's import system calls back when transformers' quantizers load.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_QUANTIZERS = "transformers.quantizers.auto"
_LOADER = "emoe.loader"
_logger = logging.getLogger(__name__)


def register_loader() -> None:
    """Register the loader of converted checkpoints with transformers.

    Do it now if transformers' quantizers are imported already, else as soon as they are.
    """
    if _QUANTIZERS in sys.modules:
        _import_loader()
    else:
        # insert it first, because the import system uses the first finder that finds a module
        sys.meta_path.insert(0, _Finder())


def _import_loader() -> None:
    """Import :mod:`emoe.loader`, which registers itself with transformers.

    If this version of transformers lacks a name that the loader imports, only log a warning.
    """
    try:
        importlib.import_module(_LOADER)
    except ImportError as error:
        _logger.warning(
            "emoe: this transformers cannot load converted checkpoints, "
            "use emoe.from_pretrained: %s",
            error,
        )


class _Finder(MetaPathFinder):
    """An import finder for one module, ``transformers.quantizers.auto``.

    It finds the module as Python does, and wraps its import loader in :class:`_LoadAndRegister`.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the changed import specification of the quantizers, None for other modules."""
        if fullname != _QUANTIZERS:
            return None
        # importlib.util.find_spec would ask this finder again
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _LoadAndRegister(spec.loader)
        return spec


class _LoadAndRegister(Loader):
    """An import loader that loads a module as before, and then imports :mod:`emoe.loader`.

    ``loader`` is the module's own import loader.
    """

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Let the module's own loader create it."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Execute the module, then import :mod:`emoe.loader`."""
        self._loader.exec_module(module)
        _import_loader()
