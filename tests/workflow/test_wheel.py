"""The wheel holds only the library and works with its requirements."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.conftest import ROOT

pytestmark = pytest.mark.slow
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
USE = """
import pathlib
import sys
import tempfile

import safetensors.torch
import torch

seen = set(sys.modules)
import emoe


for name in emoe.__all__:  # most are imported when they are asked for
    getattr(emoe, name)
others = {name.partition(".")[0] for name in set(sys.modules) - seen} - set(sys.stdlib_module_names)
assert others == {"emoe"}, f"`import emoe` imports {others}"


def build():
    layer = torch.nn.TransformerEncoderLayer(8, 2, 32, batch_first=True)
    return torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()


model, rows = build(), torch.randn(2, 3, 8)
before = model(rows)
print(emoe.convert_(model, emoe.EMoEConfig(num_experts=4, top_k=2, layers="all"), progress=True))
with tempfile.TemporaryDirectory() as folder:
    emoe.save_pretrained(model, folder)
    again = emoe.from_pretrained(build, folder)
assert torch.equal(again(rows), model(rows)) and not torch.allclose(model(rows), before)
emoe.set_top_k_(model, 4)
torch.testing.assert_close(model(rows), before)
print(emoe.__version__, emoe.__file__)

import runpy

(pathlib.Path(FOLDER) / "config.json").write_text('{"architectures": ["BertModel"]}')
safetensors.torch.save_file({"weight": torch.zeros(1)}, FOLDER + "/model.safetensors")
for words in (["--help"], ["convert", FOLDER, "--output", FOLDER + "/out", "--num-experts=4", "--top-k=2"]):
    sys.argv[:] = ["emoe", *words]
    try:
        runpy.run_path(SCRIPT, run_name="__main__")
    except SystemExit as end:
        print("ended with", end.code)
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the files that the distribution is made of."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("emoe", "benchmarks"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def pip(*words: object) -> None:
    """Run pip without the package index."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "--quiet",
        "--disable-pip-version-check",
        *map(str, words),
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    pip("wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", folder, checkout)
    (file,) = folder.iterdir()
    return file


def all_required(requirements: list[str]) -> set[str]:
    """Return all distributions that these requirements need, without extras."""
    names: set[str] = set()
    for requirement in map(Requirement, requirements):
        name = canonicalize_name(requirement.name)
        if name in names or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        names |= {name, *all_required(importlib.metadata.requires(name) or [])}
    return names


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return an environment with only the wheel and its requirements."""
    target, others = tmp_path_factory.mktemp("target"), tmp_path_factory.mktemp("others")
    pip("install", "--no-deps", "--no-index", "--target", target, wheel)
    (installed,) = importlib.metadata.distributions(name="emoe", path=[str(target)])
    for name in all_required(installed.requires or []):
        distribution = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or () if file.parts[0] != ".."}:
            if not (others / top).exists():
                (others / top).symlink_to(Path(str(distribution.locate_file(top))))
    return {**os.environ, "PYTHONPATH": f"{target}{os.pathsep}{others}"}


def test_the_wheel_holds_the_library_alone(wheel: Path) -> None:
    assert wheel.name == f"emoe-{VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    files = {
        path
        for path in (ROOT / "emoe").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert names == {path.relative_to(ROOT).as_posix() for path in files}
    assert {"emoe/py.typed", "emoe/compiled/kernels.cpp"} <= names


def test_the_wheel_works_with_its_requirements_alone(
    environment: dict[str, str], tmp_path: Path
) -> None:
    target = environment["PYTHONPATH"].split(os.pathsep)[0]
    code = f"SCRIPT, FOLDER = {target + '/bin/emoe'!r}, {str(tmp_path)!r}\n{USE}"
    result = subprocess.run(
        [sys.executable, "-S", "-c", code],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert "2 of 2 FFNs converted" in result.stdout
    assert f"{VERSION} {target}/emoe/__init__.py" in lines
    assert all(command in result.stdout for command in ("convert", "inspect", "to-dense"))
    assert lines[-1] == "ended with 1"
    assert (
        result.stderr.splitlines()[-1]
        == "error: this needs the package 'transformers': pip install transformers"
    )
