"""``import emoe`` offers its public names, and imports PyTorch only when one of them needs it."""

from __future__ import annotations

import pytest

import emoe
from emoe import config


def test_every_name_exists_and_is_listed() -> None:
    for name in (*emoe.__all__, "TrainerCallback"):
        assert getattr(emoe, name) is getattr(emoe, name)
        assert name in dir(emoe)
    names: dict[str, object] = {}
    exec("from emoe import *", names)  # noqa: S102 -- as a notebook does
    assert set(emoe.__all__) <= set(names)
    with pytest.raises(AttributeError, match="module 'emoe' has no attribute 'konvert_'"):
        emoe.konvert_  # noqa: B018


@pytest.mark.parametrize("name", config.ROUTERS)
def test_a_registered_router_describes_its_class(name: str) -> None:
    entry = config.ROUTERS[name]
    assert issubclass(entry.load(), emoe.Router)
    assert entry.learned == entry.load().learned
