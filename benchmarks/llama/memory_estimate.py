"""What a run takes of memory and disk, computed from the model's configuration before its weights are read."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from benchmarks.harness.base.errors import DataError
from benchmarks.harness.models.language import load_config, meta_model
from benchmarks.harness.models.memory import Memory, memory
from benchmarks.harness.models.prefix import frozen_names
from benchmarks.harness.models.tuning import tune_
from benchmarks.harness.training.processes import is_sharded, local_rank, local_size, world_size
from benchmarks.llama.definition import InstructionSpec, RunInstructionTraining

_BYTES = {"fp32": 4.0, "bf16": 2.0}
_FOUR_BIT = 0.55  # with the blocks' scales
_GRADIENT, _ADAM, _FLOAT = 4, 8, 4
_SMALLER = "weights: bf16 or a smaller evaluation.batch_size take less"
_LOADED_ONCE = "weights: bf16, or parallel: fsdp, where one process loads them, take less"


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that a run takes at least.

    Attributes:
        weights: of the model, on all processes of this machine together, as all that follows but what says otherwise.
        gradients: of what is trained.
        optimiser: two moments of each trained number.
        logits: of one micro-batch, with their gradient.
        whole: the weights of one whole model.
        loading: of the machine's own memory while the weights are read: on one process where they are shared, else on each.
        evaluation: the whole model and the logits of a batch, which the first process evaluates alone.
        disk: of two checkpoints (the old one goes when the new one is there) and of what is kept.
    """

    weights: float
    gradients: float
    optimiser: float
    logits: float
    whole: float
    loading: float
    evaluation: float
    disk: float

    @property
    def memory(self) -> float:
        return self.weights + self.gradients + self.optimiser + self.logits


def estimate_memory(spec: InstructionSpec) -> MemoryEstimate:
    """The least that a run takes. Activations come on top.

    Args:
        spec: of the run.
    """
    training, tune = spec.training, spec.method.tune
    trains = training if isinstance(training, RunInstructionTraining) else None
    config = load_config(spec.model.model_dump())
    model = meta_model(config)
    frozen = frozen_names(model, trains.frozen_layers) if trains and trains.frozen_layers else frozenset()
    if tune is not None:
        lora = training.lora.model_dump() if training.lora else None
        tune_(model, lora, tune.model_dump(), spec.seed, frozen)
    for name in frozen if tune is None else ():
        model.get_parameter(name).requires_grad_(False)
    total = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    # a CPU computes in float32, whatever the weights were
    each = _BYTES[spec.model.weights or "fp32"] if torch.cuda.is_available() else _FLOAT
    each = _FOUR_BIT if spec.model.quantize else each
    # of a sharded model this machine's processes hold their part of one copy
    copies = local_size() / world_size() if is_sharded() else local_size()
    row = 2 * spec.data.max_length * config.vocab_size * _FLOAT
    weights = (total - trained) * each + trained * _FLOAT
    return MemoryEstimate(
        weights=copies * weights,
        gradients=copies * trained * _GRADIENT,
        optimiser=copies * trained * _ADAM,
        logits=trains.per_device_train_batch_size * local_size() * row if trains else 0,
        whole=weights,
        loading=(1 if is_sharded() else local_size()) * total * each,
        evaluation=weights + spec.evaluation.batch_size * row,
        disk=2 * trained * (_FLOAT + _ADAM) + (trained * _FLOAT if training.keep_weights else 0),
    )


def check_memory(estimate: MemoryEstimate, folder: Path) -> list[str]:
    """See that there is enough of memory and disk for a run, on this machine and on this process's GPU.

    Args:
        estimate: of the run.
        folder: where it writes; checkpoints that are there already will go.

    Returns:
        Warnings: what is more than there is free now. A run may still fit, for example when another one ends.

    Raises:
        DataError: the weights alone are more than there is in all, or the disk is too small; says how much there is, what takes it, and what
            would take less.
    """
    parts = (
        f"weights {_gb(estimate.weights)}, gradients {_gb(estimate.gradients)}, optimiser {_gb(estimate.optimiser)}, logits {_gb(estimate.logits)}; "
        "activations come on top"
    )
    least = f"the run needs at least {_gb(estimate.memory)} of memory ({parts})"
    advice = "A smaller per_device_train_batch_size, weights: bf16, adapters instead of everything, or more GPUs with parallel: fsdp take less"
    alone = f"the whole model is evaluated by one process, which takes at least {_gb(estimate.evaluation)}"
    host = memory()
    host = Memory(host.total + psutil.swap_memory().total, host.free)
    if not torch.cuda.is_available():
        found = [
            _judge(estimate.memory, estimate.weights, host, least, advice),
            _judge(estimate.evaluation, estimate.whole, host, alone, _SMALLER),
        ]
    else:
        free, total = torch.cuda.mem_get_info(local_rank())
        gpu, share = Memory(float(total), float(free)), 1 / local_size()
        each = f"{least}, {_gb(estimate.memory * share)} on each GPU"
        loading = f"the weights take {_gb(estimate.loading)} of this machine's memory while they are loaded"
        found = [
            _judge(estimate.memory * share, estimate.weights * share, gpu, each, advice),
            _judge(estimate.evaluation, estimate.whole, gpu, alone, _SMALLER),
            # never certain: they may be read from the disk piece by piece
            _judge(estimate.loading, 0.0, host, loading, _LOADED_ONCE),
        ]
    old = sum(file.stat().st_size for file in (folder / "checkpoints").rglob("*") if file.is_file())
    disk = shutil.disk_usage(folder).free + old
    if estimate.disk > disk:
        raise DataError(
            f"the run needs {_gb(estimate.disk)} of disk for checkpoints and kept weights, and {folder} has {_gb(disk)} free. "
            "Make room, put results/ on a larger disk, or train adapters instead of everything"
        )
    return [warning for warning in found if warning]


def _judge(needed: float, weights: float, there: Memory, what: str, advice: str) -> str | None:
    """A warning where more is needed than is free; an error where the weights alone are more than there is in all."""
    if weights > there.total:
        alone = f"the weights alone are {_gb(weights)}, and there are {_gb(there.total)} in all"
        raise DataError(f"{what}; {alone}. {advice}")
    return f"{what}, and {_gb(there.free)} are free. {advice}" if needed > there.free else None


def _gb(size: float) -> str:
    return f"{size / 1e9:,.1f} GB"
