"""The whole workflow on the smoke suite, in a copy of the checkout, as a user runs it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.harness.config.suite import load_suite
from benchmarks.harness.report.artifacts import suite_artifacts
from benchmarks.harness.sources.packages import find_package
from benchmarks.harness.workflow import targets
from tests.checkout import SNAKEMAKE, Checkout, wait_for
from tests.programs import call

pytestmark = pytest.mark.slow

SUITE = load_suite({"suite": "smoke"})
Action = Callable[[Checkout], object]


def metrics(checkout: Checkout, folder: str) -> dict[str, Any]:
    """Read the results of a run."""
    return json.loads((checkout.folder / "results/runs" / folder / "metrics.json").read_text())


def jobs(text: str) -> dict[str, int]:
    """Return the number of jobs by rule, from Snakemake's output."""
    counts = re.findall(r"^([a-z_0-9]+) +(\d+)$", text, re.M)
    return {name: int(count) for name, count in counts if name not in ("total", "all")}


def smoke(checkout: Checkout, *words: object, config: tuple[str, ...] = ()) -> str:
    """Run Snakemake on the smoke suite."""
    return checkout.snakemake(*words, "--config", "suite=smoke", *config)


def plan(checkout: Checkout, *words: object, config: tuple[str, ...] = ()) -> dict[str, int]:
    """Return the number of planned jobs by rule."""
    return jobs(smoke(checkout, "-n", *words, config=config))


@contextmanager
def kept(checkout: Checkout, *paths: str) -> Iterator[None]:
    """Restore files and folders of the checkout, with their times."""
    with tempfile.TemporaryDirectory() as folder:
        copies = {}
        for number, name in enumerate(paths):
            path = checkout.folder / name
            copies[path] = Path(folder, str(number))
            if path.is_dir():
                shutil.copytree(path, copies[path])
            else:
                shutil.copy2(path, copies[path])
        try:
            yield
        finally:
            for path, copy in copies.items():
                if copy.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                    shutil.copytree(copy, path)
                else:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy2(copy, path)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory, archive: Path) -> Checkout:
    made = Checkout(tmp_path_factory.mktemp("checkout"))
    made.put(archive)
    text = smoke(made)
    assert "Traceback" not in text
    return made


def test_everything_that_the_suite_promises_is_there(
    checkout: Checkout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(checkout.folder)
    for file in targets.suite_files(SUITE):
        assert Path(file).stat().st_size > 20, file
    first = SUITE.runs[0]
    assert Path("results/runs", first.folder, "log.txt").exists()
    assert first.name in Path("results/smoke/plan.tsv").read_text()
    assert "its scores mean nothing" in Path("results/smoke/report.html").read_text()


# what follows the tables of a benchmark
SHOWN = {"benchmark_report": 1, "table_of_claims": 1, "report": 1}
# what follows a changed run of a benchmark
COLLECTED = {"collect": 1, "mirror_to_mlflow": 1, **SHOWN}
ALL_TABLES = {f"tables_of_{shown.name}": 1 for shown in suite_artifacts(SUITE)}
EVALUATED = max(SUITE.runs_of("glue_ood"), key=lambda run: len(run.spec["candidates"]))
CANDIDATES = EVALUATED.spec["candidates"]
GLUE, TUNED = (
    SUITE.runs_of("glue")[0],
    next(run for run in SUITE.runs_of("llama") if run.keeps_weights),
)
SEEDS = "method: [vanilla, emoe], seed: [0, 1]"
LONG = "a-tiny-model-whose-name-has-many-more-than-forty-two-letters"


def edit(file: str, old: str, new: str) -> Action:
    return lambda checkout: checkout.edit(file, old, new)


def delete(*patterns: str) -> Action:
    def act(checkout: Checkout) -> None:
        for pattern in patterns:
            for path in checkout.folder.glob(pattern):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    return act


def renew(*patterns: str) -> Action:
    """Give files the present time."""

    def act(checkout: Checkout) -> None:
        for pattern in patterns:
            for path in checkout.folder.glob(pattern):
                os.utime(path)

    return act


# for each action: the files that it changes, the command line's values, and the expected plan
ACTIONS: dict[str, tuple[list[Action], list[str], tuple[str, ...], dict[str, int]]] = {
    "nothing is done": ([], [], (), {}),
    "what finished runs were made of is gone": (
        [delete("resources/packages/*", "resources/partitions/*", ".snakemake/metadata")],
        ["resources", ".snakemake"],
        (),
        {},
    ),
    "what finished runs were made of is newer": (
        [renew("resources/packages/*", "resources/partitions/*")],
        ["resources"],
        (),
        {},
    ),
    "a seed is added, and packages and partitions are gone": (
        [edit("config/smoke.yaml", SEEDS, SEEDS.replace("1]", "1, 2]")), delete("resources/*")],
        ["config/smoke.yaml", "resources"],
        (),
        {
            "fetch_package": 1,
            "partition_neurons": 1,
            "run_glue": 2,
            "tables_of_glue": 1,
            **COLLECTED,
        },
    ),
    "a seed is removed": (
        [edit("config/smoke.yaml", SEEDS, SEEDS.replace("0, 1]", "0]"))],
        ["config/smoke.yaml"],
        (),
        {"tables_of_glue": 1, **COLLECTED},
    ),
    "the command line sets the seeds": ([], [], ("seeds=1",), {"tables_of_glue": 1, **COLLECTED}),
    "the command line excludes a set": (
        [],
        [],
        ("exclude=rotated_mnist_5k",),
        {"tables_of_domainbed": 1, **SHOWN},
    ),
    "an evaluation is gone, and the spec and weights of what it evaluates": (
        [
            delete(
                str(EVALUATED.metrics_file),
                *(f"results/runs/{folder}/model" for folder in CANDIDATES[:1]),
            ),
            delete(*(f"results/runs/{folder}/run.json" for folder in CANDIDATES[1:])),
        ],
        ["results/runs"],
        (),
        {"run_glue_lora": 1, "run_glue_ood": 1, "tables_of_glue_lora": 1, "tables_of_glue_ood": 1}
        | {**COLLECTED, "collect": 2, "benchmark_report": 2}
        | ({"write_run_json": len(CANDIDATES) - 1} if CANDIDATES[1:] else {}),
    ),
    "a comment is added": (
        [edit("config/smoke.yaml", "  glue_ood:\n", "  glue_ood: # only a comment\n")],
        ["config/smoke.yaml"],
        (),
        {},
    ),
    "a run's spec is gone": (
        [delete(str(GLUE.spec_file))],
        [str(GLUE.spec_file)],
        (),
        {"write_run_json": 1},
    ),
    "a run's weights are gone": (
        [delete(str(TUNED.weights_file))],
        [str(TUNED.weights_file)],
        (),
        {"run_llama": 1, "tables_of_llama": 1, **COLLECTED},
    ),
    "records, a section and a page are gone": (
        [
            delete(
                "results/smoke/records/speed.jsonl",
                "results/smoke/sections/llama.json",
                "results/smoke/glue.html",
            )
        ],
        ["results/smoke"],
        (),
        {"collect": 1, "mirror_to_mlflow": 1, "tables_of_speed": 1, "tables_of_llama": 1}
        | {"benchmark_report": 3, "table_of_claims": 1, "report": 1},
    ),
    "a table and a title are edited": (
        [
            edit(
                "benchmarks/llama/presentation.py",
                "import annotations",
                "import annotations  # edited",
            ),
            edit("benchmarks/multitask/benchmark.yaml", "T5 on", "The T5 on"),
        ],
        ["benchmarks/llama/presentation.py", "benchmarks/multitask/benchmark.yaml"],
        (),
        {**SHOWN, "tables_of_llama": 1, "tables_of_multitask": 1, "benchmark_report": 2},
    ),
    "the titles of rows are edited": (
        [
            edit(
                "benchmarks/harness/config/method_specs.py",
                "import annotations",
                "import annotations  # edited",
            )
        ],
        ["benchmarks/harness/config/method_specs.py"],
        (),
        {**SHOWN, **ALL_TABLES, "benchmark_report": len(SUITE.settings.benchmarks)},
    ),
    "a claim is edited": (
        [edit("benchmarks/claims.yaml", "claims:\n", "claims: # edited\n")],
        ["benchmarks/claims.yaml"],
        (),
        {"table_of_claims": 1, "report": 1},
    ),
    "a model has a long name": (
        [
            edit("benchmarks/models.yaml", "  tiny-bert:", f"  {LONG}:"),
            edit("config/smoke.yaml", "[tiny-bert]", f"[{LONG}]"),
        ],
        ["benchmarks/models.yaml", "config/smoke.yaml"],
        (),
        {"run_glue": len(SUITE.runs_of("glue")), "run_modularity": 3, "partition_neurons": 1}
        | {
            **ALL_TABLES,
            **COLLECTED,
            "collect": 2,
            "benchmark_report": len(SUITE.settings.benchmarks),
        },
    ),
}


@pytest.mark.parametrize("action", ACTIONS)
def test_an_action_makes_again_exactly_what_it_affects(checkout: Checkout, action: str) -> None:
    """This is before the tests that repeat runs, because repeated runs are newer than their tables."""
    acts, changed, config, expected = ACTIONS[action]
    with kept(checkout, *changed):
        for act in acts:
            act(checkout)
        assert plan(checkout, config=config) == expected


def test_pdflatex_compiles_every_table(checkout: Checkout) -> None:
    if shutil.which("pdflatex") is None:
        pytest.skip("no LaTeX on this machine (Debian: apt-get install texlive-latex-recommended)")
    tables = sorted((checkout.folder / "results/smoke").glob("*/*.tex"))
    assert len(tables) > 60
    packages = r"\usepackage[T1]{fontenc}\usepackage{booktabs,longtable}"
    body = "\\clearpage\n".join(table.read_text() for table in tables)
    document = checkout.folder / "tables.tex"
    document.write_text(
        f"\\documentclass{{article}}{packages}\\begin{{document}}\n{body}\\end{{document}}\n"
    )
    result = checkout.run("pdflatex", "-interaction=nonstopmode", document.name, check=False)
    log = document.with_suffix(".log").read_text(errors="replace")
    assert result.returncode == 0, log
    assert re.findall(r".*multiply defined.*", log) == []


def test_the_numbers_are_the_blessed_ones_within_the_tolerances(
    checkout: Checkout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(checkout.folder)
    call("check", "--suite", "smoke", "--elsewhere")


def test_only_killed_or_deleted_runs_run_again_with_the_same_numbers(checkout: Checkout) -> None:
    """Delete two trainings (one is killed then), an evaluation with its training, and an evaluation alone.

    Another evaluation of the deleted training is finished, so it is not repeated.
    Before the killed run, another one fails, because its package is damaged.
    """
    evaluations = [run for run in SUITE.runs if run.benchmark == "glue_ood"]
    (trained,) = evaluations[0].spec["candidates"]
    alone = next(run for run in evaluations if trained not in run.spec["candidates"])
    other, killed = (SUITE.runs_of("glue")[number].folder for number in (0, 2))
    before = {}
    for folder in (killed, other, trained, evaluations[0].folder, alone.folder):
        before[folder] = metrics(checkout, folder)["scores"]
        (checkout.folder / "results/runs" / folder / "metrics.json").unlink()

    failing, target = (
        f"results/runs/{folder}/metrics.json"
        for folder in (SUITE.runs_of("llama")[0].folder, killed)
    )
    log = (checkout.folder / target).with_name("log.txt")
    log.unlink()
    with damaged(checkout, failing), (checkout.folder / "shown.txt").open("w+") as stream:
        words = (
            "--cores",
            1,
            "--prioritize",
            failing,
            "--config",
            "suite=smoke",
            "--",
            failing,
            target,
        )
        main = checkout.start(SNAKEMAKE, *words, stream=stream)
        wait_for(lambda: log.exists() and "training," in log.read_text())
        kill_all(main.pid)
        main.wait()
        stream.seek(0)
        assert "is damaged or another version" in stream.read()
        assert not (checkout.folder / failing).exists()
    assert list((checkout.folder / ".snakemake/locks").iterdir())
    locked = checkout.snakemake(target, "--config", "suite=smoke", check=False)
    assert "Directory cannot be locked" in locked
    assert "--unlock" in locked
    checkout.snakemake("--unlock")

    runs = {"run_glue": 2, "run_glue_lora": 1, "run_glue_ood": 2}
    shown = {f"tables_of_{name.removeprefix('run_')}" for name in runs}
    planned = plan(checkout)
    assert {name: count for name, count in planned.items() if name.startswith("run_")} == runs
    assert {name for name in planned if name.startswith("tables_of_")} == shown
    # each target that shows a deleted run repeats it, although its tables exist
    assert plan(checkout, "glue")["run_glue"] == 2
    assert plan(checkout, "table_4")["run_glue_lora"] == 1
    for rule, count in runs.items():
        assert plan(checkout, "tables")[rule] == count
    assert (
        jobs(smoke(checkout, *(f"results/runs/{folder}/metrics.json" for folder in before))) == runs
    )
    assert {folder: metrics(checkout, folder)["scores"] for folder in before} == before


def test_runs_that_an_interrupted_snakemake_finished_are_not_repeated(checkout: Checkout) -> None:
    """Only Snakemake gets the signal, so the run that it started goes on and finishes."""
    target = f"results/runs/{SUITE.runs_of('glue')[1].folder}/metrics.json"
    (checkout.folder / target).unlink()
    log = (checkout.folder / target).with_name("log.txt")
    log.unlink()
    with (checkout.folder / "shown.txt").open("w+") as stream:
        main = checkout.start(
            SNAKEMAKE, "--cores", 1, "--config", "suite=smoke", "--", target, stream=stream
        )
        wait_for(lambda: log.exists() and "training," in log.read_text())
        main.send_signal(signal.SIGINT)
        main.wait()
    assert main.returncode != 0
    assert (checkout.folder / target).exists()
    assert plan(checkout, target) == {}


def kill_all(pid: int) -> None:
    """Kill a process and all processes that it started, as a power cut does."""
    main = psutil.Process(pid)
    for process in (main, *main.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            process.kill()


@contextmanager
def damaged(checkout: Checkout, target: str) -> Iterator[None]:
    """Delete the results of a run and damage the package of its instructions; restore all its files."""
    folder, package = (
        (checkout.folder / target).parent,
        checkout.folder / find_package("llamafactory").path,
    )
    files = {file: (file.read_bytes(), file.stat()) for file in (package, *folder.glob("*.json"))}
    (checkout.folder / target).unlink()
    package.write_bytes(b"damaged")
    restore_times(package, files[package][1])
    try:
        yield
    finally:
        for file, (content, stat) in files.items():
            file.write_bytes(content)
            restore_times(file, stat)


def restore_times(file: Path, stat: os.stat_result) -> None:
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_a_wrong_suite_or_target_ends_with_one_clear_message(checkout: Checkout) -> None:
    for words, message in (
        (["--config", "suite=minni"], "there is no suite 'minni'; did you mean 'mini'?"),
        (
            ["table_multitask"],
            "error: the suite 'mini' does not run multitask; suites that do: smoke, paper",
        ),
        (["table_99"], "error: there is no target 'table_99'; did you mean 'table_"),
        (["full"], "error: 'full' is a suite: `snakemake --cores all --config suite=full`"),
        (
            ["results/smoke/report.html"],
            "belongs to the suite 'smoke', not to 'mini': add `--config suite=smoke`",
        ),
        (
            ["results/runs/glue/0123456789ab/metrics.json"],
            "error: no suite has the run 'glue/0123456789ab'",
        ),
    ):
        result = checkout.run(SNAKEMAKE, "--cores", 1, "-n", *words, check=False)
        assert result.returncode != 0
        assert message in result.stdout + result.stderr
        assert "Traceback" not in result.stderr


def test_runs_that_were_copied_from_another_machine_are_finished(
    checkout: Checkout, tmp_path: Path
) -> None:
    """The copies have new times, in any order, and what the runs were made of is newer or missing."""
    other = Checkout(tmp_path)
    copied = other.folder / "results/runs"
    shutil.copytree(checkout.folder / "results/runs", copied, copy_function=shutil.copyfile)
    shutil.copytree(checkout.folder / "resources/packages", other.folder / "resources/packages")
    for path in (other.folder / "resources/packages").iterdir():
        os.utime(path)
    assert plan(other, *targets.metric_files(SUITE)) == {}
