"""What devices can do, as ``benchmarks/devices.yaml`` says, and how long a workload takes on one."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from pydantic import Field

from benchmarks.harness.base.errors import DefinitionError
from benchmarks.harness.base.paths import BENCHMARKS
from benchmarks.harness.config.schema import NotNegative, Positive, Share, Strict, read
from benchmarks.harness.config.workload import Passes, Workload
from emoe.errors import did_you_mean

CPU = "cpu"
USUAL_GPU = "a100"
_TERA, _GIGA, _MICRO = 1e12, 1e9, 1e-6
_UPDATE_BYTES = 28  # that Adam reads and writes of a trained number

Arithmetic = Literal["fp32", "fp16", "bf16"]


class Device(Strict):
    """What a device does. A run takes as long as its slowest part: arithmetic, memory, or starting the work of each layer."""

    title: str
    """What it is."""
    memory_gb: Positive | None
    """Its memory; null for the machine's."""
    tflops: Annotated[dict[Arithmetic, Positive], Field(min_length=1)]
    """Peak by arithmetic, dense, in 10¹² operations a second. What is missing is as fast as fp32."""
    share: dict[Arithmetic, Share]
    """Share of the peak that runs get."""
    bandwidth_gb: Positive
    """Gigabytes of its memory that it reads in a second."""
    link_gb: Positive
    """Gigabytes that several of them send each other in a second."""
    layer_microseconds: NotNegative
    """What one pass through one layer takes at least, however small: the time to start its work."""
    start_seconds: NotNegative
    """What a run takes beside its passes: to start, read weights and data, write."""
    process_gb: NotNegative
    """Memory that a process takes before it has a model."""

    def speed(self, precision: str, threads: int = 1) -> float:
        """Operations a second that runs get.

        Args:
            precision: of the arithmetic; a CPU always computes in float32.
            threads: cores, of a CPU.
        """
        name: Arithmetic = precision if precision in self.tflops else "fp32"
        return self.tflops[name] * self.share[name] * _TERA * (threads if self.memory_gb is None else 1)

    def seconds(self, work: Workload, *, processes: int = 1, threads: int = 1, sharded: bool = False) -> float:
        """How long a workload takes.

        Args:
            work: of a run.
            processes: that share its training; one evaluates.
            threads: cores of a CPU.
            sharded: whether each of them has a part of the model, and not all of it.
        """
        speed, bandwidth = self.speed(work.precision, work.threads or threads), self.bandwidth_gb * _GIGA
        update = work.updates * work.size.trained * _UPDATE_BYTES / bandwidth
        training = (self._passes(work.training, speed, work.size.bytes_each) + update) / processes
        if processes > 1:
            training += work.sent_bytes(processes, sharded=sharded) / (self.link_gb * _GIGA)
        reading = (self._passes(found, speed, work.size.bytes_each) for found in work.reading)
        return self.start_seconds + training + sum(reading)

    def _passes(self, passes: Passes, speed: float, each: float) -> float:
        return max(
            passes.operations / speed,
            passes.count * passes.layers * self.layer_microseconds * _MICRO,
            passes.count * passes.parameters * each / (self.bandwidth_gb * _GIGA),
        )

    def memory_bytes(self, work: Workload, *, processes: int = 1) -> float:
        """Memory that a run takes on it, of several processes each on its own."""
        return self.process_gb * _GIGA + work.memory_bytes(on_cpu=self.memory_gb is None, processes=processes)


class DeviceFile(Strict):
    """What devices can do."""

    devices: dict[Annotated[str, Field(pattern="^[a-z][a-z0-9_]*$")], Device]
    """By the name that `plan --device` takes."""


@functools.cache
def load_devices() -> Mapping[str, Device]:
    """The devices that ``plan`` knows, by name.

    Raises:
        DefinitionError: the file is wrong; names the key and the nearest valid value.
    """
    file = BENCHMARKS / "devices.yaml"
    found = read(file, DeviceFile).devices
    for name in (CPU, USUAL_GPU):
        if name not in found:
            raise DefinitionError(f"{file}: 'devices' lacks '{name}'")
    for name, device in found.items():
        if odd := [
            arithmetic
            for arithmetic in ("fp32", *device.tflops)
            if arithmetic not in device.tflops or arithmetic not in device.share
        ]:
            raise DefinitionError(f"{file}: 'devices.{name}' lacks '{odd[0]}' in 'tflops' or 'share'")
    return found


def find_device(name: str) -> Device:
    """The device of that name.

    Raises:
        DefinitionError: there is none; names the nearest.
    """
    known = load_devices()
    if name not in known:
        raise DefinitionError(f"there is no device '{name}'{did_you_mean(name, known)} (benchmarks/devices.yaml)")
    return known[name]


def device_of(gpus: Sequence[str]) -> str:
    """The name of the device that a run was recorded on; a usual one for a GPU that is not known here, which finished runs correct.

    Args:
        gpus: as ``environment.gpus`` of its ``metrics.json`` names them; none for a CPU.

    >>> device_of(["NVIDIA A100-SXM4-80GB"]), device_of([]), device_of(["Some Other 1"])
    ('a100', 'cpu', 'a100')
    """
    if not gpus:
        return CPU
    # a space may part letters and number; an RTX A1000 is no A100
    patterns = {name: re.sub(r"([a-z])(\d)", r"\1 ?\2", name) for name in load_devices() if name != CPU}
    plain = gpus[0].lower()
    found = (name for name, text in patterns.items() if re.search(rf"(?<![a-z0-9]){text}(?!\d)", plain))
    return next(found, USUAL_GPU)
