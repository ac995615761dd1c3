"""Test that only ``set_backend_`` and ``python -m emoe build`` compile the kernels."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import emoe
from emoe.__main__ import cli
from emoe.compiled import build
from tests.converted import assert_same, inputs, net, step

pytestmark = pytest.mark.usefixtures("always_sparse")


@pytest.fixture
def compilations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Use an empty cache of compiled kernels, and collect the calls of the compiler, which fails."""
    commands: list[Any] = []

    def fail(command: list[str], **_options: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 1, "", "ninja: in a folder\nno compiler\n")

    def forget() -> None:
        build.prepare_kernels.cache_clear()
        build.compiled_kernels.cache_clear()

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build.subprocess, "run", fail)
    forget()
    yield commands
    forget()


def test_only_set_backend_compiles(
    compilations: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
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
