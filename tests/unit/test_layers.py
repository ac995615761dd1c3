from __future__ import annotations

import pytest

import emoe
from emoe.layer_numbers import resolve_layers


@pytest.mark.parametrize(
    ("request_", "chosen"),
    [
        ("all", list(range(12))),
        ("last:2", [10, 11]),
        ("last-half:2", [6, 8, 10]),
        ("last-quarter:2", [9, 11]),
        ("8:12:2", [8, 10]),
        ("-2:", [10, 11]),
        ((8, 10), [8, 10]),
        ((-1,), [11]),
    ],
)
def test_requests(request_, chosen) -> None:
    assert resolve_layers(request_, 12) == chosen


@pytest.mark.parametrize(
    ("request_", "of_32", "of_60"),
    [
        ("last-half:4", [16, 20, 24, 28], [30, 34, 38, 42, 46, 50, 54, 58]),
        ("last-quarter:2", [24, 26, 28, 30], [45, 47, 49, 51, 53, 55, 57, 59]),
    ],
)
def test_shares_go_by_depth(request_, of_32, of_60) -> None:
    assert (resolve_layers(request_, 32), resolve_layers(request_, 60)) == (of_32, of_60)


@pytest.mark.parametrize(
    "request_",
    [
        "last",
        "last:0",
        "last:13",
        "last-half:0",
        "last-quarter:0",
        "last-third:2",
        "12:",
        "::0",
        "8-10",
        (12,),
        (1, -11),
    ],
)
def test_requests_that_match_nothing_raise(request_) -> None:
    with pytest.raises(emoe.ConfigError):
        resolve_layers(request_, 12)
