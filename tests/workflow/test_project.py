"""Check the repository: environments, images, configuration keys, and the files that runs ask for."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import replace
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from benchmarks.harness.base import PACKAGES
from benchmarks.harness.config.runs import run_inputs
from benchmarks.harness.config.suite import SuiteSettings, load_suite
from benchmarks.harness.sources.packages import find_package
from benchmarks.harness.workflow.plan import write_plan
from benchmarks.harness.workflow.targets import metric_files, weight_files
from tests.checkout import SNAKEMAKE, Checkout
from tests.conftest import ROOT

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.mark.parametrize("file", ["environment.yml", "workflow/envs/emoe.yaml"])
def test_conda_environments_follow_pyproject(file: str) -> None:
    listed = yaml.safe_load((ROOT / file).read_text())["dependencies"]
    assert listed[:2] == [f"python{PYPROJECT['project']['requires-python']}", "pip"]
    install = ["--constraint constraints.txt", "--editable .[suite,mini,dev]"]
    assert listed[2:] == ([{"pip": install}] if file == "environment.yml" else [])
    for name in ("workflow/envs/emoe.post-deploy.sh", "Makefile"):
        assert "--editable '.[suite,mini,dev]'" in (ROOT / name).read_text()


def requirements(*extras: str) -> list[Requirement]:
    """Return what the library needs, and what these extras need besides."""
    lines = list(PYPROJECT["project"]["dependencies"])
    for extra in extras:
        lines += PYPROJECT["project"]["optional-dependencies"][extra]
    return [Requirement(line) for line in lines]


def names(listed: list[Requirement]) -> set[str]:
    return {canonicalize_name(requirement.name) for requirement in listed}


def imported_modules(folder: str) -> set[str]:
    """Return the top-level modules that the files of a folder import, also inside functions."""
    modules = set()
    for file in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                modules.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.module, f"{file} imports relatively"
                modules.add(node.module)
    return {module.partition(".")[0] for module in modules}


@pytest.mark.parametrize("folder", ["emoe", "benchmarks", "tools"])
def test_every_imported_distribution_is_declared(folder: str) -> None:
    declared = names(requirements("suite", "mini"))
    distributions = packages_distributions()
    undeclared = []
    for module in imported_modules(folder) - sys.stdlib_module_names - {"emoe", "benchmarks"}:
        providers = {canonicalize_name(name) for name in distributions.get(module, [module])}
        if not providers & declared:
            undeclared.append(module)
    assert undeclared == []


@pytest.mark.parametrize(
    "name", ["datasets", "lm-eval", "mlflow", "peft", "snakemake", "transformers"]
)
def test_a_package_whose_new_majors_break_the_suite_has_an_upper_bound(name: str) -> None:
    (requirement,) = (known for known in requirements("suite") if known.name == name)
    assert "<" in {bound.operator for bound in requirement.specifier}


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = [line.split("==") for line in lines if not line.startswith("#")]
    assert len(dict(pinned)) == len(pinned)
    return dict(pinned)


def test_every_declared_distribution_has_a_pin_that_fits_except_torch() -> None:
    pinned = pins()
    assert all(
        re.fullmatch(r"[\w.!]+", version) for version in pinned.values()
    )  # no build of one machine, as 2.0+cpu
    left_to_the_machine = {"torch", "torchvision"}
    assert not left_to_the_machine & set(pinned)
    extras = PYPROJECT["project"]["optional-dependencies"]
    declared = requirements(*(extra for extra in extras if extra != "quantized"))
    assert names(declared) - left_to_the_machine - {"emoe"} <= set(pinned)
    for requirement in declared:
        name = canonicalize_name(requirement.name)
        if name in pinned:
            assert requirement.specifier.contains(pinned[name], prereleases=True), (
                f"{name} {pinned[name]}"
            )


def planned_by_make(*words: str) -> str:
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("CONSTRAINTS", "MAKEFLAGS")
    }
    return subprocess.check_output(
        ["make", "--dry-run", *words], cwd=ROOT, env=environment, text=True
    )


def test_make_setup_installs_the_pinned_versions_unless_told_otherwise() -> None:
    assert "'.[suite,mini,dev]' --constraint constraints.txt\n" in planned_by_make(
        "--always-make", "setup"
    )
    newest = planned_by_make("--always-make", "setup", "CONSTRAINTS=")
    assert "'.[suite,mini,dev]'" in newest
    assert "--constraint" not in newest


def test_new_pins_are_installed_by_the_next_command() -> None:
    assert "pip install" in planned_by_make(
        "--old-file", "pyproject.toml", "--what-if", "constraints.txt", "setup"
    )


def test_make_run_hands_its_words_to_snakemake() -> None:
    planned = planned_by_make("run", "SUITE=full", "SEEDS=2", "DATA_ROOT=/data")
    assert "--config suite=full seeds=2 data_root=/data\n" in planned
    assert "--config suite=mini\n" in planned_by_make("run")


def test_make_run_counts_the_runs_of_its_seeds_only() -> None:
    status = ".venv/bin/python -m benchmarks status --suite full\n"
    with_seeds = planned_by_make("run", "SUITE=full", "SEEDS=2")
    assert f"""EMOE_OVERRIDES='{{"suite": "full", "seeds": 2}}' {status}""" in with_seeds
    assert f"\n{status}" in planned_by_make("run", "SUITE=full")


def test_snakemake_plans_a_part_of_the_paper(tmp_path: Path) -> None:
    command = [SNAKEMAKE, "--snakefile", ROOT / "Snakefile", "--directory", tmp_path]
    command += [
        "--cores",
        "1",
        "-n",
        "--quiet",
        "all",
        "--config",
        "suite=paper",
        "benchmarks=[llama]",
    ]
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_job_on_a_cluster_plans_no_runs(here: Path) -> None:
    """With this set excluded, a suite loads but cannot be planned."""
    unplannable = load_suite({"suite": "smoke", "exclude": "amazon"})
    # the runs of the whole suite, in the file of the other one
    write_plan(replace(load_suite({"suite": "smoke"}), overrides=unplannable.overrides))
    command = [SNAKEMAKE, "--snakefile", ROOT / "Snakefile", "--cores", "1", "-n", "--quiet", "all"]
    words = ["--config", "suite=smoke", "exclude=amazon", "--", find_package("mlxtend").path]
    done = {}
    for mode in ("default", "subprocess"):
        arguments = [str(word) for word in (*command, "--mode", mode, *words)]
        done[mode] = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert "'exclude' leaves no run of 'multitask'" in done["default"].stderr
    assert done["subprocess"].returncode == 0, done["subprocess"].stderr


@pytest.mark.slow
def test_a_benchmark_with_the_name_of_anothers_set_is_refused_at_the_start(
    checkout: Checkout,
) -> None:
    shutil.copytree(
        checkout.folder / "benchmarks/glue", checkout.folder / "benchmarks/domainbed_pacs"
    )
    shown = checkout.snakemake("-n", check=False)
    assert "'domainbed_pacs' is also the target of the set 'pacs' of 'domainbed'" in shown
    assert "Traceback" not in shown


@pytest.mark.parametrize("name", ["mini_search", "paper"])
def test_every_input_of_a_run_is_made_by_a_rule(name: str) -> None:
    """Check the files of all runs without Snakemake's graph of thousands of jobs."""
    suite = load_suite({"suite": name})
    made = {
        *metric_files(suite),
        *weight_files(suite),
        *(job.file for job in suite.partitions.values()),
    }
    needed = {
        file for run in suite.runs for file in run_inputs(run) if not file.startswith(str(PACKAGES))
    }
    assert needed <= made
    assert {"threads", "mem_mb", "runtime"} <= set.intersection(
        *(set(run.resources) for run in suite.runs)
    )


def test_every_configuration_key_is_documented() -> None:
    text = (ROOT / "config/README.md").read_text()
    assert [key for key in SuiteSettings.model_fields if f"`{key}`" not in text] == []


_APPTAINER = """#!/bin/sh
[ "$1" = --version ] && { echo "apptainer version 1.4.0"; exit; }
echo "$* by ${EMOE_FORKSERVER-itself}" >> {folder}/calls.txt
while [ $# -gt 3 ]; do shift; done
exec "$@"
"""


@pytest.mark.slow
def test_apptainer_runs_the_jobs_in_the_image(
    checkout: Checkout, tmp_path: Path, monkeypatch
) -> None:
    """Use a script in place of Apptainer."""
    program = tmp_path / "bin/apptainer"
    program.parent.mkdir()
    program.write_text(_APPTAINER.replace("{folder}", str(tmp_path)))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    partition = next(iter(load_suite({"suite": "smoke"}).partitions.values())).file
    words = (
        "--sdm",
        "apptainer",
        "--apptainer-args=--nv",
        "--config",
        "suite=smoke",
        "--",
        partition,
    )
    checkout.snakemake(*words)
    (call,) = (tmp_path / "calls.txt").read_text().splitlines()
    home = re.escape(str(checkout.folder))
    assert re.match(rf"exec --home {home} +--nv .*emoe\.sif bash -c ", call)
    assert "python -m benchmarks partition " in call
    assert call.endswith(" by itself")  # the image's Python, and no fork of this one
    assert (checkout.folder / partition).exists()


def test_the_image_has_a_python_extras_and_a_user_that_fit() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    oldest = PYPROJECT["project"]["requires-python"].split(",")[0].removeprefix(">=")
    assert (
        f"FROM python:{oldest}-slim" in dockerfile
    )  # the oldest, by which the numbers were blessed
    (extras,) = re.findall(r"pip install .*'/tmp/dependencies\[(.+)\]'", dockerfile)
    assert set(extras.split(",")) <= set(PYPROJECT["project"]["optional-dependencies"])
    (user,) = re.findall(r"^USER (\d+)$", dockerfile, re.MULTILINE)
    assert int(user) > 0
