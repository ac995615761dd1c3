"""Execute docs/adding.md in a copy of the project, and test every addition."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from benchmarks.harness.sources.vader import load_vader
from tests.conftest import ROOT
from tests.pages import code_blocks

PAGE = code_blocks("docs/adding.md")
pytestmark = pytest.mark.slow

# checks the architecture, counts the data, trains two planned runs for a few steps on a tiny model with random weights,
# makes the tables from made-up numbers of all runs, and prints the method's runs in another benchmark
PROGRAM = """
import sys
from pathlib import Path
import benchmarks.kinds
from benchmarks.__main__ import cli
from benchmarks.harness.config.catalogue import load_models
from benchmarks.harness.config.runs import run_from_spec
from benchmarks.harness.config.suite import load_suite
from benchmarks.harness.run.execution import execute
from tests.fake_runs import write_runs

cli(sys.argv[1:], standalone_mode=False)
planned = load_suite({"suite": "reviews"}).runs
write_runs(planned)
cli(["collect", "--suite", "reviews", "--benchmark", "reviews"], standalone_mode=False)
cli(["tables", "--suite", "reviews", "--benchmark", "reviews"], standalone_mode=False)
print(*(run.name for run in load_suite({"suite": "smoke"}).runs_of("glue")))
runs = {run.spec["method"]["name"]: run for run in planned}
for name in ("emoe_linear", "bitfit"):
    spec = runs[name].spec
    spec["model"] = load_models()["tiny-bert"].spec("tiny-bert")
    if spec["method"]["config"]:
        spec["method"]["config"] |= {"layers": [1], "num_experts": 8, "top_k": 4}
    spec["training"] |= {"epochs": 1, "train_rows": 16}
    run = run_from_spec(spec)
    file = Path("results/runs") / run.folder / "run.json"
    file.parent.mkdir(parents=True)
    file.write_text(run.to_json())
    print(execute(file, threads=1, log=file.with_name("log.txt")))
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, archive: Path) -> Path:
    """Copy the project, and do everything on the page in its order."""
    root = tmp_path_factory.mktemp("project")
    skip = shutil.ignore_patterns("__pycache__")
    for name in ("benchmarks", "config", "workflow"):
        shutil.copytree(ROOT / name, root / name, ignore=skip)
    shutil.copy(ROOT / "Snakefile", root)
    with contextlib.chdir(ROOT):
        texts, labels, _ = load_vader("tweets", "train")
    rows = [
        (text, ("negative", "positive")[label]) for text, label in zip(texts, labels, strict=True)
    ][:200]
    write(root / "reviews.csv", rows)

    run(root, commands(PAGE["A benchmark from a csv"][0])[0])

    files = {name: root / "benchmarks" / name for name in ("methods.yaml", "metrics.yaml")}
    mine = {name: root / "benchmarks/reviews" / name for name in ("benchmark.yaml", "tasks.yaml")}
    plugin, suite = root / "my_plugin.py", root / "config/reviews.yaml"
    method, row, block, elsewhere, elsewhere_block = PAGE["A method"]
    router, plugins, linear, _ = PAGE["A router"]
    tuning, bitfit = PAGE["A way of tuning"]
    task, task_block = PAGE["A task"]
    score, metric, metric_of_task = PAGE["A metric"]
    table, tables = PAGE["A table"]
    _, _, architecture, _ = PAGE["An architecture"]

    append(files["methods.yaml"], method)
    append(suite, block)
    append(mine["tasks.yaml"], task)
    append(suite, task_block)
    topics = [
        (text, label, split) for split in ("train", "dev", "test") for text, label in TOPICS * 8
    ]
    write(root / "benchmarks/reviews/topics.csv", topics, ("text", "label", "split"))
    append(plugin, router)
    replace(files["methods.yaml"], quoted("plugins: []\n"), plugins)
    append(files["methods.yaml"], linear)
    append(plugin, tuning)
    append(files["methods.yaml"], bitfit)
    # like any other method: one row and one block
    for name in ("emoe_linear", "bitfit"):
        append(suite, block.replace("emoe_bottom", name))
        replace(
            mine["benchmark.yaml"],
            "\nmethods:\n",
            f"\nmethods:\n{row.replace('emoe_bottom', name)}",
        )
    replace(mine["benchmark.yaml"], "\nmethods:\n", f"\nmethods:\n{row}")
    glue = root / "benchmarks/glue/benchmark.yaml"
    replace(glue, "\nmethods:\n", f"\nmethods:\n{elsewhere}")
    replace(
        root / "config/smoke.yaml", "\n\n  glue_lora:\n", f"\n{elsewhere_block}\n  glue_lora:\n"
    )
    append(plugin, table)
    line = quoted("tables: [results, tasks, tests, cost, choices]\n")
    replace(mine["benchmark.yaml"], line, tables)
    append(plugin, score)
    append(plugin, architecture)
    append(files["metrics.yaml"], metric)
    text = mine["tasks.yaml"].read_text()
    line = quoted("    metric: accuracy\n")
    mine["tasks.yaml"].write_text(text.replace(line, metric_of_task, 1))
    return root


TOPICS = [("A goal.", "sport"), ("A vote.", "politics")]


def commands(block: str) -> list[list[str]]:
    """Split a block of shell into commands for this Python."""
    return [
        [{"python": sys.executable}.get(word, word) for word in line.split()]
        for line in block.splitlines()
    ]


def run(root: Path, command: list[str]) -> str:
    places = [str(root), str(ROOT)]  # the copy's benchmarks, the library of here
    paths = {
        "PYTHONPATH": os.pathsep.join(places),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    result = subprocess.run(
        command, cwd=root, env={**os.environ, **paths}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def write(
    file: Path, rows: list[tuple[str, ...]], columns: tuple[str, ...] = ("text", "label")
) -> None:
    with file.open("w", newline="") as opened:
        csv.writer(opened).writerows([columns, *rows])


def append(file: Path, block: str) -> None:
    before = file.read_text() if file.exists() else ""
    file.write_text(before + block)


def quoted(line: str) -> str:
    """Return a line of a file, after a check that the page tells its readers to replace it."""
    assert f"line `{line.strip()}` with" in (ROOT / "docs/adding.md").read_text()
    return line


def replace(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert text.count(old) == 1
    file.write_text(text.replace(old, new))


def test_snakemake_plans_all_of_it(project: Path) -> None:
    planned = run(project, [*commands(PAGE["A benchmark from a csv"][0])[2], "-n"])
    names = ["vanilla", "emoe", "random_partition", "emoe_bottom", "emoe_linear", "bitfit"]
    assert [
        name for name in names if f"Run minilm-reviews-{name}-lr0.0001-s1-" not in planned
    ] == []
    assert "Run minilm-topics-emoe-lr0.0001-s0-" in planned


def test_a_plugin_may_import_the_figures_before_it_adds_a_table(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from benchmarks.text import presentation, tables

    monkeypatch.setitem(tables.TABLES, "trained", tables.TABLES["results"])
    assert "trained" in presentation.TABLES
    assert "usage" in tables.TABLES


def test_its_data_router_tuning_metric_architecture_and_table_work(project: Path) -> None:
    look, printed, _, check = PAGE["An architecture"]
    imports = "import torch, emoe\nfrom benchmarks.harness.config.methods import import_plugins\nimport_plugins()\n"
    python, module, _, *data = commands(PAGE["A benchmark from a csv"][0])[1]
    assert (python, module, data[0]) == (sys.executable, "-m", "data")
    output = run(project, [sys.executable, "-c", imports + look + check + PROGRAM, *data])
    assert "6 of 6 parts (splits, environments or whole sets) are present" in output
    assert "politics 8, sport 8" in output
    assert printed in output
    assert "tiny-bert-tweets-emoe_bottom-lr0.003-s1-" in output
    assert "BitFit" in set(
        pd.read_csv(project / "results/reviews/tables/reviews_trained.csv")["title"]
    )
    paths = [project / line for line in output.splitlines() if line.endswith("metrics.json")]
    linear, bitfit = (json.loads(path.read_text()) for path in paths)
    for metrics in (linear, bitfit):
        assert -1 <= metrics["scores"]["test"]["reviews"]["kappa"] <= 1
    assert (
        json.loads(paths[0].with_name("run.json").read_text())["method"]["config"]["router"]
        == "linear"
    )
    assert linear["model"]["parameters"] - linear["model"]["dense_parameters"] == 8 * 32
    model = bitfit["model"]
    assert set(model["trained"]) == {"head", "bias"}
    assert 0 < model["trained"]["bias"]["parameters"] < model["parameters"] / 100
    assert model["trainable_parameters"] == sum(
        group["parameters"] for group in model["trained"].values()
    )


def test_an_edit_of_the_plugin_makes_the_tables_again(project: Path) -> None:
    program = (
        "import benchmarks.kinds\nfrom benchmarks.harness.workflow.sources import table_sources\n"
    )
    program += "print('my_plugin.py' in table_sources('reviews'))"
    assert run(project, [sys.executable, "-c", program]).splitlines()[-1] == "True"
