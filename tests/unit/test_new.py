"""Make a benchmark from a csv, or write nothing and say why in one line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from benchmarks.harness.base import DataError, DefinitionError
from benchmarks.harness.config.benchmark import load_benchmark
from benchmarks.harness.config.runs import Run
from benchmarks.harness.config.suite import load_suite
from benchmarks.harness.sources.packages import sha256
from benchmarks.text import new
from benchmarks.text.new import new_benchmark
from tests.executed import recorded
from tests.programs import call

CSV = "text,label\n" + "".join(f"sentence number {i},{('bad', 'good')[i % 2]}\n" for i in range(80))


@pytest.fixture
def project(here: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Prepare a project with folders of benchmarks and suites to write into."""
    (here / "config").mkdir()
    (here / "benchmarks/glue").mkdir(parents=True)
    monkeypatch.setattr(new, "BENCHMARKS", here / "benchmarks")
    monkeypatch.setattr(new, "CONFIG", here / "config")
    monkeypatch.setattr("benchmarks.harness.config.benchmark.BENCHMARKS", here / "benchmarks")
    monkeypatch.setattr("benchmarks.harness.base.CONFIG", here / "config")
    for module in ("harness.sources.local", "harness.base", "text.data"):
        monkeypatch.setattr(f"benchmarks.{module}.ROOT", here)
    load_benchmark.cache_clear()
    yield here
    load_benchmark.cache_clear()


def written(folder: Path, content: str) -> Path:
    file = folder / "mine.csv"
    file.write_text(content, encoding="utf-8")
    return file


def tiny_runs(project: Path) -> list[Run]:
    """Make a benchmark of the csv, and plan its runs with a tiny model."""
    new_benchmark("mine", written(project, CSV))
    file = project / "benchmarks/mine/benchmark.yaml"
    file.write_text(file.read_text().replace("layers: [5]", "layers: [1]"))
    file = project / "config/mine.yaml"
    file.write_text(file.read_text().replace("[minilm]", "[tiny-bert]"))
    return load_suite({"suite": "mine"}).runs


def test_a_csv_becomes_a_benchmark_that_runs(project: Path) -> None:
    runs = tiny_runs(project)
    assert [(run.spec["method"]["name"], run.spec["seed"]) for run in runs] == [
        (name, seed) for name in ("vanilla", "emoe", "random_partition") for seed in (0, 1)
    ]
    metrics = recorded(next(run for run in runs if run.spec["method"]["name"] == "emoe"))
    assert 0 <= metrics["scores"]["test"]["mine"]["accuracy"] <= 1
    assert sum(metrics["data"][part]["rows"] for part in ("train", "dev", "test")) == 80


def test_a_csv_that_changed_after_planning_is_refused(project: Path) -> None:
    """Its id is that of the planned rows. A finished run keeps its numbers."""
    finished, queued, *_ = tiny_runs(project)
    metrics = recorded(finished)
    ((name, digest),) = queued.spec["files"].items()
    file = project / name
    text = file.read_text()
    file.write_text(text.replace("bad", "good", 1))
    message = (
        f"{file} is damaged or another version: sha256 {sha256(file)}, expected {digest}; "
        "the run was planned with other rows: restore the file, or start the workflow again, "
        "which plans runs with the present rows"
    )
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        recorded(queued)
    assert not queued.metrics_file.exists()
    assert recorded(finished) == metrics
    file.write_text(text)
    assert recorded(queued)["data"] == metrics["data"]


def test_the_command_prints_how_to_run_the_new_suite(project: Path) -> None:
    shown = call("new", "mine", "--csv", str(written(project, CSV)))
    assert shown.splitlines()[-1] == "run it: snakemake --cores 2 --config suite=mine"
    for file in ("benchmarks/mine/README.md", "config/mine.yaml"):
        assert "snakemake --cores 2 --config suite=mine" in (project / file).read_text()


@pytest.mark.parametrize(
    ("content", "labels"),
    [
        ("text,label\na,10\nb,9\nc,-1\nd,nan\ne,\nf,9.0\n", ["-1", "9", "10"]),
        (
            '\ufefftext,label\na,größer\nb,"x, y"\nc,yes\n',
            ["größer", "x, y", "yes"],
        ),  # YAML would read yes as true
    ],
)
def test_labels_are_read_from_the_csv(project: Path, content: str, labels: list[str]) -> None:
    new_benchmark("mine", written(project, content))
    assert (
        yaml.safe_load((project / "benchmarks/mine/tasks.yaml").read_text())["tasks"]["mine"][
            "labels"
        ]
        == labels
    )


def test_columns_are_named_and_other_rows_are_other_runs(project: Path) -> None:
    sources = []
    for name, content in (
        ("one", CSV),
        ("two", CSV),
        ("three", CSV.replace("number 3", "number three")),
    ):
        new_benchmark(
            name,
            written(project, content.replace("text,label", "Review: a,class")),
            "Review: a",
            "class",
        )
        task = yaml.safe_load((project / f"benchmarks/{name}/tasks.yaml").read_text())["tasks"][
            name
        ]
        assert (task["fields"], task["label"]) == (["Review: a"], "class")
        sources.append(Path(task["source"]["csv"]).name)
    assert sources[0] == sources[1] != sources[2]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("../x", CSV, "is not a valid name"),
        ("glue", CSV, r"benchmarks/glue exists; choose another name than 'glue'"),
        ("mine", "txt,label\na,b\n", r"mine\.csv has no column 'text'; did you mean 'txt'"),
        ("mine", "text;label\na;b\n", r"has no column 'text'; .*; set it with --text or --label"),
        ("mine", "text,label\na,b\nc,b\n", "the only label is 'b'"),
        ("mine", 'text,label\na,b\n"c,d\n', r"mine\.csv cannot be read: unexpected end of data"),
        ("mine", "", r"cannot be read: No columns"),
    ],
)
def test_unusable_names_and_csv_files_are_one_line_and_write_nothing(
    project: Path, name: str, content: str, message: str
) -> None:
    file, before = written(project, content), sorted((project / "benchmarks").rglob("*"))
    with pytest.raises((DataError, DefinitionError), match=message) as error:
        new_benchmark(name, file)
    assert "\n" not in str(error.value)
    assert sorted((project / "benchmarks").rglob("*")) == before
    assert not list((project / "config").iterdir())
