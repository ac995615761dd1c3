"""What `import emoe` offers: all of it is there, and what needs PyTorch is imported when it is asked for."""

from __future__ import annotations

import pytest

import emoe
from emoe.config import ROUTERS


def test_every_name_is_there_and_is_listed() -> None:
    for name in (*emoe.__all__, "TrainerCallback"):
        assert getattr(emoe, name) is getattr(emoe, name)
        assert name in dir(emoe)
    names: dict[str, object] = {}
    exec("from emoe import *", names)  # noqa: S102 -- as a notebook does
    assert set(emoe.__all__) <= set(names)
    with pytest.raises(AttributeError, match="module 'emoe' has no attribute 'konvert_'"):
        emoe.konvert_  # noqa: B018


@pytest.mark.parametrize("name", ROUTERS)
def test_a_router_is_known_as_what_it_is(name: str) -> None:
    entry = ROUTERS[name]
    assert issubclass(entry.load(), emoe.Router)
    assert entry.learned == entry.load().learned
