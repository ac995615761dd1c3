"""How many steps optimisers have taken in this process: what was made of weights before a step is not theirs after it.

PyTorch counts changes of a tensor, but not those by fused optimisers.
"""

from __future__ import annotations

from typing import Any

from torch.optim.optimizer import register_optimizer_step_post_hook

COUNT = {"steps": 0}


def _count(*_: Any) -> None:
    COUNT["steps"] += 1


register_optimizer_step_post_hook(_count)
