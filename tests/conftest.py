"""Shared fixtures. Tests run on CPU, one thread each, without a hub."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

import benchmarks.kinds  # noqa: F401  (makes the kinds of benchmarks known)
import emoe
from benchmarks.harness.base import DATA_ROOT, MODEL_ROOT
from benchmarks.harness.config.methods import TUNINGS
from benchmarks.harness.sources.packages import PackageFile, find_package
from emoe import architectures
from emoe.config import ROUTERS
from tests.plain_net import SPECS

if TYPE_CHECKING:
    from tests.checkout import Checkout

torch.set_num_threads(1)
gc.set_threshold(20_000, 20, 20)  # tests make far more objects than they leave
SHIPPED = frozenset(architectures.REGISTRY)  # before tests and benchmarks add theirs
emoe.register_ffn("PlainNet", *SPECS)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the smoke suite and other slow tests first, so that no single worker ends with them."""

    def rank(item: pytest.Item) -> tuple[bool, bool]:
        is_slow = item.get_closest_marker("slow") is not None
        is_smoke = item.path.name == "test_smoke.py"
        return not is_slow, not is_smoke  # False comes before True

    items.sort(key=rank)


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    """Freeze imported objects, so that garbage collections skip them (0.1 s each)."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def registry() -> Iterator[None]:
    """Restore registries and environment variables after a test."""
    with ExitStack() as stack:
        for names in (architectures.REGISTRY, ROUTERS, TUNINGS, os.environ):
            # without values to set, `patch.dict` only restores the dictionary on exit
            stack.enter_context(mock.patch.dict(names))
        yield


@pytest.fixture
def always_sparse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the sparse products for tiny shapes too, although they are slower."""
    monkeypatch.setattr("emoe.sparse.module.pays_off", lambda *_args, **_options: True)


ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def archive() -> Path:
    """Return the file of the real sentiment set, fetched once per checkout."""
    return fetched(find_package("vaderSentiment"))


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Use an empty data root."""
    monkeypatch.setenv(DATA_ROOT, str(tmp_path))
    return tmp_path


@pytest.fixture
def pacs(root: Path) -> Path:
    """Use a data root with a small PACS."""
    from tests.image_sets import write_images

    write_images(root, "pacs", rows=3)
    return root


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to an empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def roots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write model and data roots, which tests only read.

    The models are narrow and have the paper's names. The sets are GLUE, GLUE-X, a small PACS and
    instructions.
    """
    from tests.image_sets import write_images
    from tests.instruction_runs import write_rows
    from tests.tiny_hub import LAYERS, write_data, write_glue_x, write_models, write_seq2seq

    root = tmp_path_factory.mktemp("roots")
    write_models(root / "models", [*LAYERS])
    write_seq2seq(root / "models", "t5-base", 12)
    write_rows(root / "data")
    write_data(root / "data")
    write_glue_x(root / "data")
    write_images(root / "data", "pacs", rows=8)
    return root


@pytest.fixture
def hub_here(roots: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to an empty folder, and use the model and data roots of :func:`roots`."""
    monkeypatch.setenv(MODEL_ROOT, str(roots / "models"))
    monkeypatch.setenv(DATA_ROOT, str(roots / "data"))
    return here


@pytest.fixture(scope="module")
def shared_here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Change to a working directory that the tests of a module share."""
    folder = tmp_path_factory.mktemp("shared")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


@pytest.fixture
def workdir(here: Path, archive: Path) -> Path:
    """Change to a working directory that holds only the real sentences."""
    path = find_package("vaderSentiment").path
    path.parent.mkdir(parents=True)
    path.symlink_to(archive)
    return here


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write a dot instead of each figure, for tests that need only the files."""
    from tests.drawn import undraw  # which imports Matplotlib

    undraw(monkeypatch)


@pytest.fixture
def checkout(tmp_path: Path, archive: Path) -> Checkout:
    """Copy the working tree, with the sentences fetched."""
    from tests.checkout import Checkout  # which takes ROOT from here

    made = Checkout(tmp_path / "checkout")
    made.put(archive)
    return made


def fetched(package: PackageFile) -> Path:
    """Return a package's file in the checkout; download it if it is missing."""
    path = ROOT / package.path
    if not path.exists():
        package.fetch(path)
    return path
