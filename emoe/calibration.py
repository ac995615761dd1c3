"""Record the activations of every neuron on a calibration set.

They are the features of the co-activation partition.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from emoe.architectures import FFN
from emoe.errors import ConversionError
from emoe.modes import restored_modes
from emoe.tokens import PaddingMaskHook, watch_padding

# largest number of tokens in a sample
MAX_TOKENS = 4096

Batch = Mapping[str, Any] | Sequence[Any] | Tensor


@torch.no_grad()
def record_activations(
    model: nn.Module, ffns: Sequence[FFN], batches: Iterable[Batch], *, seed: int = 0
) -> dict[int, Tensor]:
    """Run the model, and record the neurons' absolute activations for a random sample of tokens.

    Activations are the inputs of the out-projections. Padding is skipped if the model gets a
    padding mask. The model runs in evaluation mode; the mode of each module is restored.

    Args:
        model: the model to run.
        ffns: the FFNs to record.
        batches: inputs of the model. Each is a dictionary or a sequence of arguments, or a tensor.
        seed: seed of the sample, which has at most :data:`MAX_TOKENS` tokens.

    Returns:
        Activations ``[d, tokens]`` by layer number, in float32 on the CPU.

    Raises:
        ConversionError: the batches have no token.
    """
    padding_hooks = watch_padding(model, ffns)
    samples = {}
    sample_hooks = []
    for ffn in ffns:
        sample = _Sample(seed, padding_hooks.get(ffn.index))
        samples[ffn.index] = sample
        sample_hooks.append(ffn.proj_out.register_forward_pre_hook(sample.add))
    # each call of the model adds rows to the samples through the hooks
    try:
        with restored_modes(model):
            model.eval()
            for batch in batches:
                _call(model, batch)
    finally:
        for padding_hook in padding_hooks.values():
            padding_hook.remove()
        for sample_hook in sample_hooks:
            sample_hook.remove()
    # samples have a row per token, but the clustering takes a row per neuron
    activations = {index: sample.rows.t().contiguous() for index, sample in samples.items()}
    if any(of_layer.numel() == 0 for of_layer in activations.values()):
        raise ConversionError("partition='coactivation': the calibration batches have no token")
    return activations


class _NumberedRows(NamedTuple):
    """Rows of a stream, each with a random number.

    Attributes:
        numbers: random numbers ``[tokens]`` in float64.
        rows: rows ``[tokens, d]`` in float32.
    """

    numbers: Tensor
    rows: Tensor


class _Sample:
    """A uniform random sample of the rows of a stream.

    Each row gets a random number. The sample keeps the :data:`MAX_TOKENS` rows with the lowest
    numbers.

    Args:
        seed: seed of the random numbers.
        padding: hook that reads the padding mask, None to use all rows.
    """

    def __init__(self, seed: int, padding: PaddingMaskHook | None) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._padding = padding
        # Empty vectors at first. `torch.cat` leaves them out, whatever the width of the rows.
        self._lowest = _NumberedRows(torch.empty(0, dtype=torch.float64), torch.empty(0))

    @property
    def rows(self) -> Tensor:
        """The sampled rows ``[tokens, d]`` in float32."""
        return self._lowest.rows

    def add(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        """Update the sample with the absolute inputs of an out-projection. A forward pre-hook."""
        activated_neurons = args[0]  # [..., d]
        magnitudes = activated_neurons.flatten(0, -2).abs()  # [tokens, d]
        new_rows = self._without_padding(magnitudes).float().cpu()
        # a uniform sample: every row draws a number, and the rows with the lowest numbers stay
        new_numbers = torch.rand(len(new_rows), generator=self._generator, dtype=torch.float64)
        all_numbers = torch.cat([self._lowest.numbers, new_numbers])
        all_rows = torch.cat([self._lowest.rows, new_rows])
        kept = all_numbers.argsort()[:MAX_TOKENS]
        self._lowest = _NumberedRows(all_numbers[kept], all_rows[kept])

    def _without_padding(self, rows: Tensor) -> Tensor:
        """Drop the rows ``[tokens, d]`` of padding tokens, if the model got a padding mask."""
        if self._padding is None:
            return rows
        mask = self._padding.token_mask(len(rows), rows.device)
        if mask is None:
            return rows
        return rows[mask]


def _call(model: nn.Module, batch: Batch) -> None:
    """Call a model with one batch, on the device of the model's first parameter."""
    device = next(model.parameters()).device
    if isinstance(batch, Mapping):
        named = {name: _moved(value, device) for name, value in batch.items()}
        model(**named)
    elif isinstance(batch, Tensor):
        model(batch.to(device))
    else:
        arguments = [_moved(value, device) for value in batch]
        model(*arguments)


def _moved(value: Any, device: torch.device) -> Any:
    """Return a tensor on a device, and any other value unchanged."""
    if isinstance(value, Tensor):
        return value.to(device)
    return value
