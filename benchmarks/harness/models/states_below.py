"""What reaches a layer, kept for a second pass over the same batches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from benchmarks.harness.config.methods import block_of
from benchmarks.harness.models.prefix import has_prefix
from emoe.architectures import find_ffns

STATES_ROOM = 2**29  # bytes of what is kept of one pass for the next


class StatesBelow:
    """What the layers below one put out, batch by batch, so that another pass over the same batches begins there.

    For passes in evaluation mode between which nothing changes below that layer. Results are the same to the last bit. Computed again is what
    does not fit into the room, and all of architectures of which :func:`~benchmarks.harness.models.prefix.has_prefix` does not know that
    layers hand on nothing else, as in an encoder whose decoder reads it.

    Args:
        network: a classifier or language model, converted or not.
        layer: number of the first layer that may differ between the passes.
        room: bytes to keep at most.

    Example:
        >>> below = StatesBelow(model, 10)  # doctest: +SKIP
        >>> with below.recording():
        ...     dense = evaluate(model)
        >>> emoe.convert_(model, emoe.EMoEConfig(num_experts=64, top_k=16, layers=(10,)))
        >>> with below.replaying():
        ...     sparse = evaluate(model)
    """

    def __init__(self, network: nn.Module, layer: int, room: int = STATES_ROOM) -> None:
        below = find_ffns(network)[:layer] if has_prefix(network) else []
        self._blocks = [network.get_submodule(block_of(ffn.name)) for ffn in below]
        self._room = room
        self._batches: list[tuple[str, Tensor | None]] = []

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keep what the passes of the block make."""
        self._batches, room = [], self._room
        begun = ""

        def begin(_block: nn.Module, args: tuple[Any, ...]) -> None:
            nonlocal begun
            begun = _mark(args[0])

        def end(_block: nn.Module, _args: object, states: Tensor) -> None:
            nonlocal room
            fits = states.nbytes <= room
            room -= states.nbytes if fits else 0
            self._batches.append((begun, states.detach().cpu() if fits else None))

        hooks = []
        if self._blocks:
            hooks += [self._blocks[0].register_forward_pre_hook(begin), self._blocks[-1].register_forward_hook(end)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Have the passes of the block take what was kept.

        Raises:
            RuntimeError: out of a pass over other batches than those of :meth:`recording`.
        """
        batches, kept = iter(self._batches), cast(Tensor | None, None)
        own = {block: block.__dict__.get("forward") for block in self._blocks}

        def forward(block: nn.Module, run: Any, states: Tensor, *args: Any, **kwargs: Any) -> Any:
            nonlocal kept
            if block is self._blocks[0]:
                mark, kept = next(batches, ("", None))
                if mark != _mark(states):
                    raise RuntimeError("a pass over other batches than those of which the states were kept")
            if kept is None:
                return run(states, *args, **kwargs)
            return kept.to(states.device) if block is self._blocks[-1] else states

        for block in self._blocks:
            cast(Any, block).forward = partial(forward, block, block.forward)
        try:
            yield
        finally:
            for block, before in own.items():
                if before is None:
                    del block.__dict__["forward"]
                else:
                    cast(Any, block).forward = before


@torch.no_grad()
def _mark(states: Tensor) -> str:
    """By what a batch is known again, one with NaN too."""
    return f"{tuple(states.shape)} {float(states.double().sum())}"
