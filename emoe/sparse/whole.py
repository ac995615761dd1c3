"""The module of a whole FFN, where its own code is known to do nothing but call the FFN's parts.

One token at a time that code, and what has to pass through it from part to part, takes as long as the products. Where it is known, decoding does not run it.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from types import CodeType
from typing import Any

from torch import nn

from emoe.architectures import FFN
from emoe.decision_guard import Guard
from emoe.projections import plain_class


def _gated(self: Any, x: Any) -> Any:
    y = self.proj_out(self.activation(self.proj_in(x)) * self.proj_up(x))
    return y  # as language models write it, instruction for instruction


def _instructions(code: CodeType) -> tuple[bytes, int, int]:
    return code.co_code, code.co_argcount, code.co_flags & (inspect.CO_VARARGS | inspect.CO_VARKEYWORDS)


_CODE = _instructions(_gated.__code__)


@dataclass(frozen=True)
class WholeFFN:
    """A module that holds all parts of a gated FFN.

    Attributes:
        module: it.
        names: its children: out-projection, activation, in- and up-projection.
    """

    module: nn.Module
    names: tuple[str, ...]

    def is_as_known(self, guard: Guard) -> bool:
        """Whether its class computes ``proj_out(activation(proj_in(x)) * proj_up(x))`` of these children, and nothing else.

        Told by the instructions, so that every model whose library writes it so is known, and one whose ``forward`` is replaced no longer is.
        """
        guard.attribute(self.module, "__class__")
        forward = guard.attribute(plain_class(self.module) or type(self.module), "forward")
        code = guard.attribute(forward, "__code__")
        # names stand in the order in which the instructions ask for them
        return code is not None and _instructions(code) == _CODE and code.co_names == self.names

    def activation(self, guard: Guard) -> object:
        """What stands in the activation's place."""
        return guard.item(guard.item(vars(self.module), "_modules"), self.names[1])


def whole_ffn(ffn: FFN) -> WholeFFN | None:
    """The module of a whole FFN, or None where that does more, or the FFN has none of its own."""
    spec = ffn.spec
    paths = [spec.proj_out, spec.activation, spec.proj_in, spec.proj_up or ""]
    places, names = zip(*(path.rpartition(".")[::2] for path in paths), strict=True)
    if len(set(places)) > 1 or not all(names):
        return None
    found = WholeFFN(ffn.layer.get_submodule(places[0]), names)
    return found if found.is_as_known(Guard()) else None
