"""Activations of every neuron on a calibration set, the features of the co-activation partition."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from emoe.architectures import FFN
from emoe.errors import ConversionError
from emoe.tokens import PaddingMaskHook, watch_padding

MAX_TOKENS = 4096

Batch = Mapping[str, Any] | Sequence[Any] | Tensor


@torch.no_grad()
def record_activations(
    model: nn.Module, ffns: Sequence[FFN], batches: Iterable[Batch], *, seed: int = 0
) -> dict[int, Tensor]:
    """Run the model and record the absolute input of each out-projection for a random sample of tokens.

    Padding is skipped if a batch has an ``attention_mask``. The model runs in evaluation mode; its modes are restored.

    Args:
        model: the model to run.
        ffns: the FFNs to record.
        batches: the model's inputs, as dictionaries of arguments, sequences of arguments, or tensors.
        seed: seed of the sample, which has at most :data:`MAX_TOKENS` tokens.

    Returns:
        ``[d, tokens]`` float32 on the CPU, by layer number.

    Raises:
        ConversionError: the batches have no token, or an activation is not finite.
    """
    samples = {ffn.index: _Sample(seed) for ffn in ffns}
    padding = watch_padding(model, ffns)
    hooks = [
        ffn.proj_out.register_forward_pre_hook(_collector(samples[ffn.index], padding.get(ffn.index))) for ffn in ffns
    ]
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        for batch in batches:
            _call(model, batch)
    finally:
        for module, mode in modes.items():
            module.training = mode
        for watch in padding.values():
            watch.remove()
        for hook in hooks:
            hook.remove()
    activations = {index: sample.rows.t().contiguous() for index, sample in samples.items()}
    for ffn in ffns:
        if not activations[ffn.index].shape[1]:
            raise ConversionError("partition='coactivation': the calibration batches have no token")
        if not torch.isfinite(activations[ffn.index]).all():
            raise ConversionError(f"{ffn.name}: activations on the calibration set are not finite")
    return activations


class _Sample:
    """Draw a uniform sample from a stream of rows: each row gets a random number, and the lowest numbers are kept."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._draws = torch.empty(0, dtype=torch.float64)
        self.rows = torch.empty(0, 0)

    def add(self, rows: Tensor) -> None:
        """Add rows ``[n, d]`` to the stream."""
        draws = torch.rand(rows.shape[0], generator=self._generator, dtype=torch.float64)
        if self._draws.numel():
            draws, rows = torch.cat([self._draws, draws]), torch.cat([self.rows, rows])
        order = draws.argsort()[:MAX_TOKENS]
        self._draws, self.rows = draws[order], rows[order]


def _collector(sample: _Sample, padding: PaddingMaskHook | None) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def collect(_module: nn.Module, args: tuple[Any, ...]) -> None:
        rows = args[0].flatten(0, -2).abs()
        mask = None if padding is None else padding.token_mask(rows.shape[0])
        sample.add((rows if mask is None else rows[mask.to(rows.device)]).float().cpu())

    return collect


def _call(model: nn.Module, batch: Batch) -> None:
    device = next(model.parameters()).device
    if isinstance(batch, Tensor):
        batch = [batch]
    kwargs = dict(batch) if isinstance(batch, Mapping) else {}
    args = () if isinstance(batch, Mapping) else batch

    def move(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    model(*map(move, args), **{name: move(value) for name, value in kwargs.items()})
