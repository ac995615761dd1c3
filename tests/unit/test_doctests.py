"""The docstrings of ``emoe``: examples run, the first line starts with a verb, and every argument is described."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
from types import ModuleType
from typing import Any

import pytest
import torch

import emoe
from emoe.sparse.cost_model import predicted_time_ratio

FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
NAMES = ["emoe", *(module.name for module in pkgutil.walk_packages(emoe.__path__, "emoe."))]
MAIN = [
    emoe.EMoEConfig,
    emoe.convert_,
    emoe.to_dense_,
    emoe.partition,
    emoe.record_routing,
    emoe.save_pretrained,
    emoe.from_pretrained,
    emoe.fix_experts_,
    emoe.for_inference_,
    emoe.set_backend_,
    emoe.set_top_k_,
    emoe.register_ffn,
    emoe.register_router,
    predicted_time_ratio,
]
PUBLIC = [getattr(emoe, name) for name in emoe.__all__]
METHODS = [
    method
    for cls in filter(inspect.isclass, PUBLIC)
    for name, method in inspect.getmembers(cls, lambda member: inspect.isfunction(member) or inspect.ismethod(member))
    if not name.startswith("_") and method.__module__.startswith("emoe.")
]
# first words that are not verbs
NOUNS = {"A", "An", "The", "What", "Which", "How", "Whether", "Where", "When", "Who", "Why", "One", "All", "Inverse"}


def examples(module: ModuleType) -> list[doctest.DocTest]:
    given = {**vars(module), "emoe": emoe, "torch": torch}
    return [test for test in doctest.DocTestFinder().find(module, globs=given) if test.examples]


EXAMPLES = {test.name: test for name in NAMES for test in examples(importlib.import_module(name))}


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_run(name: str) -> None:
    torch.manual_seed(0)
    output: list[str] = []
    failed, _ = doctest.DocTestRunner(optionflags=FLAGS).run(EXAMPLES[name], out=output.append)
    assert not failed, "".join(output)


def test_main_functions_have_an_example() -> None:
    assert [main for main in MAIN if f"{main.__module__}.{main.__qualname__}" not in EXAMPLES] == []


@pytest.mark.parametrize("thing", [*PUBLIC, *METHODS], ids=lambda thing: thing.__qualname__)
def test_docstrings_start_with_a_verb_and_name_every_argument(thing: Any) -> None:
    text = inspect.getdoc(thing) or ""
    first = text.split("\n")[0]
    assert first[:1].isupper()
    assert first.split()[0] not in NOUNS
    if inspect.isclass(thing) or "Args:" not in text:
        return
    missing = [
        name
        for name in inspect.signature(thing).parameters
        if name not in ("self", "cls") and not any(f"    {stars}{name}: " in text for stars in ("", "*", "**"))
    ]
    assert missing == []


@pytest.mark.parametrize("thing", filter(inspect.isfunction, PUBLIC), ids=lambda thing: thing.__qualname__)
def test_functions_describe_their_arguments(thing: Any) -> None:
    assert "\nArgs:\n" in (inspect.getdoc(thing) or "")
