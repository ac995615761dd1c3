"""Describe the processor of this machine, and the variables that choose its kernels."""

from __future__ import annotations

import functools
import os
import platform
import re
from pathlib import Path
from typing import NamedTuple

from benchmarks.harness.base import short_digest

# the variables that choose an implementation
_VARIABLES = (
    "ATEN_CPU_CAPABILITY",
    "ONEDNN_MAX_CPU_ISA",
    "DNNL_MAX_CPU_ISA",
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
)


def implementation_variables() -> dict[str, str]:
    """Return the environment variables that choose an implementation and are set."""
    return {name: os.environ[name] for name in _VARIABLES if name in os.environ}


class Processor(NamedTuple):
    """The processor of this machine."""

    name: str
    flags_digest: str
    """Digest of the name and of the supported instructions."""


@functools.cache
def read_processor() -> Processor:
    """Read the processor's name and supported instructions from ``/proc/cpuinfo``."""
    text = Path("/proc/cpuinfo").read_text()
    # such as "model name : AMD EPYC 7763"
    model_line = re.search(r"^model name\s*: (.*)", text, re.MULTILINE)
    name = platform.machine()  # for example on ARM, where this line may be missing
    if model_line is not None:
        name = model_line[1].strip()
    # the supported instructions: x86 calls them "flags", and ARM calls them "Features"
    flags_line = re.search(r"^(?:flags|Features)\s*: (.*)", text, re.MULTILINE)
    flags = []
    if flags_line is not None:
        flags = sorted(flags_line[1].split())
    name_and_flags = " ".join([name, *flags])
    return Processor(name, flags_digest=short_digest(name_and_flags, 12))
