"""How strongly each neuron fires on a calibration set: the features of the co-activation partition."""

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
    """Run the model and keep ``|activation|`` of every neuron for a random sample of the tokens.

    What is recorded is the out-projection's input. Padding is left out where a batch has an
    ``attention_mask``. The model is run in evaluation mode and given back in the modes that its parts had.

    Args:
        model: the model to call.
        ffns: FFNs of it.
        batches: what the model is called with: dictionaries of arguments, or tensors.
        seed: of the sample, at most :data:`MAX_TOKENS` tokens.

    Returns:
        Layer number to ``[d, tokens]`` float32 on the CPU.

    Raises:
        ConversionError: no batch, or activations that are not finite.
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
    found = {index: sample.rows.t().contiguous() for index, sample in samples.items()}
    for ffn in ffns:
        if not found[ffn.index].shape[1]:
            raise ConversionError(
                "partition='coactivation' needs calibration batches, and there was not one token in them"
            )
        if not torch.isfinite(found[ffn.index]).all():
            raise ConversionError(f"{ffn.name}: activations on the calibration set are not finite")
    return found


class _Sample:
    """Uniform sample of a stream of rows: each row draws a number, and the lowest are kept."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._draws = torch.empty(0, dtype=torch.float64)
        self.rows = torch.empty(0, 0)

    def add(self, rows: Tensor) -> None:
        draws = torch.rand(rows.shape[0], generator=self._generator, dtype=torch.float64)
        if self._draws.numel():
            draws, rows = torch.cat([self._draws, draws]), torch.cat([self.rows, rows])
        order = draws.argsort()[:MAX_TOKENS]
        self._draws, self.rows = draws[order], rows[order]


def _collector(sample: _Sample, padding: PaddingMaskHook | None) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def collect(_module: nn.Module, args: tuple[Any, ...]) -> None:
        rows = args[0].flatten(0, -2).abs()
        real = None if padding is None else padding.token_mask(rows.shape[0])
        sample.add((rows if real is None else rows[real.to(rows.device)]).float().cpu())

    return collect


def _call(model: nn.Module, batch: Batch) -> None:
    device = next(model.parameters()).device

    def move(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    if isinstance(batch, Mapping):
        model(**{name: move(value) for name, value in batch.items()})
    elif isinstance(batch, Tensor):
        model(move(batch))
    else:
        model(*(move(value) for value in batch))
