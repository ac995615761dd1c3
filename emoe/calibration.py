"""Record the activations of every neuron on a calibration set, as features for the co-activation partition."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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
        ConversionError: the batches have no token.
    """
    padding = watch_padding(model, ffns)
    samples = {ffn.index: _Sample(seed, padding.get(ffn.index)) for ffn in ffns}
    hooks: list[Any] = list(padding.values())
    hooks += [ffn.proj_out.register_forward_pre_hook(samples[ffn.index].add) for ffn in ffns]
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        for batch in batches:
            _call(model, batch)
    finally:
        for module, mode in modes.items():
            module.training = mode
        for hook in hooks:
            hook.remove()
    activations = {index: sample.rows.t().contiguous() for index, sample in samples.items()}
    if not all(rows.numel() for rows in activations.values()):
        raise ConversionError("partition='coactivation': the calibration batches have no token")
    return activations


class _Sample:
    """Sample rows of a stream uniformly: draw a random number for each row, and keep the lowest ones."""

    def __init__(self, seed: int, padding: PaddingMaskHook | None) -> None:
        self._generator, self._padding = torch.Generator().manual_seed(seed), padding
        self._draws, self.rows = torch.empty(0, dtype=torch.float64), torch.empty(0)

    def add(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        """Add the magnitudes of an out-projection's input, without padding. This is a forward pre-hook."""
        rows = args[0].flatten(0, -2).abs()
        mask = None if self._padding is None else self._padding.token_mask(len(rows))
        rows = (rows if mask is None else rows[mask.to(rows.device)]).float().cpu()
        draws = torch.rand(len(rows), generator=self._generator, dtype=torch.float64)
        draws, rows = torch.cat([self._draws, draws]), torch.cat([self.rows, rows])
        order = draws.argsort()[:MAX_TOKENS]
        self._draws, self.rows = draws[order], rows[order]


def _call(model: nn.Module, batch: Batch) -> None:
    device = next(model.parameters()).device

    def move(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    if isinstance(batch, Mapping):
        model(**{name: move(value) for name, value in batch.items()})
    else:
        model(*map(move, [batch] if isinstance(batch, Tensor) else batch))
