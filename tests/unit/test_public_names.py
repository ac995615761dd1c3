"""``import emoe`` offers its public names, and the examples in the docstrings run."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from types import ModuleType

import pytest
import torch

import emoe

MODULES = ["emoe", *(module.name for module in pkgutil.walk_packages(emoe.__path__, "emoe."))]


def examples(module: ModuleType) -> list[doctest.DocTest]:
    given = {**vars(module), "emoe": emoe, "torch": torch}
    return [test for test in doctest.DocTestFinder().find(module, globs=given) if test.examples]


EXAMPLES = {test.name: test for name in MODULES for test in examples(importlib.import_module(name))}


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_run(name: str) -> None:
    torch.manual_seed(0)
    output: list[str] = []
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    failed, _ = doctest.DocTestRunner(optionflags=flags).run(EXAMPLES[name], out=output.append)
    assert not failed, "".join(output)


def test_every_name_exists_and_is_listed() -> None:
    for name in (*emoe.__all__, "TrainerCallback"):
        assert hasattr(emoe, name)
        assert name in dir(emoe)
    names: dict[str, object] = {}
    exec("from emoe import *", names)  # noqa: S102 -- as a notebook does
    assert set(emoe.__all__) <= set(names)
