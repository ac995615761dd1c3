from __future__ import annotations

import pytest

import emoe
from emoe.architectures import resolve_layers


@pytest.mark.parametrize(
    ("request_", "chosen"),
    [
        ("all", list(range(12))),
        ("last:2", [10, 11]),
        ("last-half:2", [6, 8, 10]),
        ("8:12:2", [8, 10]),
        ("-2:", [10, 11]),
        ((8, 10), [8, 10]),
        ((-1,), [11]),
    ],
)
def test_requests(request_, chosen) -> None:
    assert resolve_layers(request_, 12) == chosen


@pytest.mark.parametrize(
    "request_", ["last", "last:0", "last:13", "last-half:0", "12:", "::0", "8-10", (12,), (1, -11)]
)
def test_requests_that_match_nothing_raise(request_) -> None:
    with pytest.raises(emoe.ConfigError):
        resolve_layers(request_, 12)
