"""The balance loss of a routed FFN: of one forward pass and one thread."""

from __future__ import annotations

from torch import Tensor

from emoe.tokens import PerThread


class PassLoss:
    """The balance loss of this thread's last forward pass, and which pass that was. Copies start empty."""

    def __init__(self) -> None:
        self._value: PerThread[Tensor] = PerThread()
        # the pass that the loss is of, and the one in which it was read
        self._number: PerThread[int] = PerThread()
        self._read: PerThread[int] = PerThread()

    @property
    def value(self) -> Tensor | None:
        """The loss, None before the first pass or where none is asked for."""
        return self._value.get()

    @property
    def number(self) -> int:
        """The number of the pass that it is of."""
        return self._number.get() or 0

    def add(self, loss: Tensor) -> None:
        """Add the loss of one call of the FFN."""
        before = self._value.get()
        self._value.set(loss if before is None else before + loss)

    def forget(self, number: int) -> None:
        """Forget the last pass, because the next one, of a higher number, begins."""
        self._value.clear()
        self._read.clear()
        self._number.set(number)

    def read(self, newest: int) -> Tensor | None:
        """The loss, unless it was read in an earlier pass already: what ended halfway does not count twice.

        Args:
            newest: number of the model's newest pass.
        """
        read = self._read.get()
        if read is not None and read != newest:
            return None
        self._read.set(newest)
        return self._value.get()
