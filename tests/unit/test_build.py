"""When the sparse backend's kernels are compiled: at a conversion or by hand, never in a forward pass."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import emoe
from emoe.__main__ import cli
from emoe.sparse import build
from tests.plain_net import plain_net


@pytest.fixture
def compilations(tmp_path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What is asked of the compiler, on a machine where nothing was compiled before and nothing can be."""
    asked: list[Any] = []

    def fail(command: list[str], **_options: Any) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        return subprocess.CompletedProcess(command, 1, "", "ninja: in a folder\nno compiler\n")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build.subprocess, "run", fail)
    for cached in (build.prepare_kernels, build.compiled_kernels):
        cached.cache_clear()
    yield asked
    for cached in (build.prepare_kernels, build.compiled_kernels):
        cached.cache_clear()


def test_a_conversion_compiles_once_and_a_forward_pass_never(compilations, caplog: pytest.LogCaptureFixture) -> None:
    nets = [plain_net(16, 64) for _ in range(3)]
    backends = ("masked", "sparse", "sparse")
    for place, (net, backend) in enumerate(zip(nets, backends, strict=True)):
        emoe.convert_(net, emoe.EMoEConfig(num_experts=8, top_k=2, layers=[0], backend=backend))
        assert len(compilations) == min(place, 1)
    told = [record.message for record in caplog.records]
    assert told.count("emoe: no compiled kernels, the sparse backend uses PyTorch: no compiler") == 1
    x = torch.randn(40, 16, requires_grad=True)
    results = [net(x) for net in nets]
    results[1].sum().backward()
    with torch.no_grad():
        results += [net(x[:1]) for net in nets]
    for masked, sparse in ((0, 1), (0, 2), (3, 4), (3, 5)):
        torch.testing.assert_close(results[sparse], results[masked], atol=1e-4, rtol=1e-4)
    assert len(compilations) == 1


def test_build_says_why_it_cannot(compilations) -> None:
    found = CliRunner().invoke(cli, ["build"])
    assert found.exit_code == 1
    assert found.output == "Error: the kernels cannot be built: no compiler; the sparse backend uses PyTorch\n"


def test_build_tells_what_it_built() -> None:
    if build.compiled_kernels() is None:
        pytest.skip("no compiler on this machine")
    found = CliRunner().invoke(cli, ["build"])
    assert found.output == f"Kernels: {build.library_file()}\n"


def test_a_damaged_library_is_named_and_not_used(compilations, caplog: pytest.LogCaptureFixture) -> None:
    build.library_file().parent.mkdir(parents=True)
    build.library_file().write_bytes(b"no library")
    net = plain_net(16, 64)
    dense = net(torch.ones(1, 16))
    emoe.convert_(net, emoe.EMoEConfig(num_experts=8, top_k=8, layers=[0], backend="sparse"))
    torch.testing.assert_close(net(torch.ones(1, 16)), dense)
    assert [record.message for record in caplog.records if f"{build.library_file()} does not load" in record.message]
    assert not compilations
