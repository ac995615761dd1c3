"""The guard of a decision sees each thing that it read become another, in Python and by the compiled kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from emoe.decision_guard import Guard, Sampled
from emoe.sparse.build import compiled_kernels


@pytest.mark.parametrize("compared_by", ["kernels", "Python"])
def test_the_guard_sees_each_thing_it_read_become_another(compared_by: str) -> None:
    class Owner:
        size = 1

    class Other(Owner):
        pass

    owner, hooks, weight = Owner(), {"a": 1}, torch.ones(2, 2)
    settings: dict[str, Any] = {"mode": "eval", "hooks": hooks}
    guard = Guard()
    assert guard.item(settings, "mode") == "eval"
    assert guard.item(settings, "none") is None
    assert guard.attribute(Owner, "size") == 1
    assert guard.attribute(owner, "__class__") is Owner
    assert guard.items(guard.item(settings, "hooks")) == [1]
    assert guard.tensor(weight) is weight
    copied = torch.ones(5, 40)
    guard.numbers(guard.tensor(copied), Sampled(copied))
    if compared_by == "kernels":
        if (kernels := compiled_kernels()) is None:
            pytest.skip("no compiler on this machine")
        guard.compare_by(kernels)
    assert guard.holds()
    changes: list[tuple[Callable[[], Any], Callable[[], Any]]] = [
        (lambda: settings.update(mode="train"), lambda: settings.update(mode="eval")),
        (lambda: settings.update(none=0), lambda: settings.pop("none")),
        (lambda: settings.update(hooks={"a": 1}), lambda: settings.update(hooks=hooks)),
        (lambda: hooks.update(b=2), lambda: hooks.pop("b")),
        (lambda: hooks.update(a=2), lambda: hooks.update(a=1)),
        (lambda: setattr(Owner, "size", 2), lambda: setattr(Owner, "size", 1)),
        (lambda: setattr(owner, "__class__", Other), lambda: setattr(owner, "__class__", Owner)),
        (lambda: weight.t_(), lambda: weight.t_()),
        (lambda: weight.resize_(1, 4), lambda: weight.resize_(2, 2)),
        (lambda: copied.data.fill_(2), lambda: copied.data.fill_(1)),
        (lambda: setattr(weight, "__class__", nn.Parameter), lambda: setattr(weight, "__class__", Tensor)),
    ]
    for change, back in changes:
        change()
        assert not guard.holds()
        back()
        assert guard.holds()
    copied.add_(0)  # which PyTorch counts as a change
    assert not guard.holds()
