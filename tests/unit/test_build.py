"""The kernels are compiled by ``set_backend_`` or ``python -m emoe build``, never by a conversion or a forward pass."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from click.testing import CliRunner

import emoe
from emoe.__main__ import cli
from emoe.sparse import build
from tests.converted import assert_same, inputs, net, step

pytestmark = pytest.mark.usefixtures("always_sparse")


@pytest.fixture
def nothing_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Use an empty cache of compiled kernels."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for cached in (build.prepare_kernels, build.compiled_kernels):
        cached.cache_clear()
    yield
    for cached in (build.prepare_kernels, build.compiled_kernels):
        cached.cache_clear()


@pytest.fixture
def compilations(nothing_compiled: None, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Collect the calls of the compiler, which fails."""
    commands: list[Any] = []

    def fail(command: list[str], **_options: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 1, "", "ninja: in a folder\nno compiler\n")

    monkeypatch.setattr(build.subprocess, "run", fail)
    return commands


def test_only_set_backend_compiles(compilations: list[Any], caplog: pytest.LogCaptureFixture) -> None:
    masked, *sparse = (net() for _ in range(3))
    expected = step(masked, inputs())
    assert compilations == []
    for model in sparse:
        emoe.set_backend_(model, "sparse")
        assert len(compilations) == 1
        assert_same(step(model, inputs()), expected)
    emoe.for_inference_(sparse[0])
    sparse[0](inputs(1))
    assert len(compilations) == 1
    messages = [record.message for record in caplog.records if "no compiler" in record.message]
    assert len(messages) == 1


def test_build_prints_the_library_or_why_it_fails(request: pytest.FixtureRequest) -> None:
    if build.compiled_kernels() is not None:
        assert str(build.library_file()) in CliRunner().invoke(cli, ["build"]).output
    request.getfixturevalue("compilations")
    result = CliRunner().invoke(cli, ["build"])
    assert result.exit_code == 1
    assert "no compiler" in result.output
    assert result.output.count("\n") == 1


def test_a_damaged_library_is_named_and_not_used(compilations: list[Any], caplog: pytest.LogCaptureFixture) -> None:
    build.library_file().parent.mkdir(parents=True)
    build.library_file().write_bytes(b"damaged")
    expected = step(net(), inputs())
    assert_same(step(net("sparse"), inputs()), expected)
    assert [record for record in caplog.records if str(build.library_file()) in record.message]
    assert not compilations


def test_without_a_readable_cache_pytorch_computes(nothing_compiled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, model = step(net(), inputs()), net()
    monkeypatch.setattr(Path, "exists", mock.Mock(side_effect=PermissionError(13, "Permission denied")))
    emoe.set_backend_(model, "sparse")
    assert_same(step(model, inputs()), expected)
