"""The names and the version of the package ``emoe``."""

from __future__ import annotations

import importlib.metadata
import runpy
import sys

import pytest

import emoe


def test_every_public_name_can_be_imported() -> None:
    names: dict[str, object] = {}
    exec("from emoe import *", names)  # noqa: S102 -- as a notebook does
    assert set(emoe.__all__) <= set(names)
    assert set(emoe.__all__) <= set(dir(emoe))
    assert "TrainerCallback" in emoe.__all__


def test_importing_all_names_does_not_need_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)  # as if it were not installed
    again = runpy.run_path(emoe.__file__)
    assert set(emoe.__all__) - set(again["__all__"]) == {"TrainerCallback"}


def test_a_checkout_that_is_not_installed_has_no_known_version(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    again = runpy.run_path(emoe.__file__)
    assert again["__version__"] == "0.0.0+unknown"
