"""The suite's command line: imports, lists, errors of one line, and the numbers that `status` prints."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from filelock import FileLock

from benchmarks.__main__ import cli as suite_cli
from benchmarks.__main__ import main
from benchmarks.harness import base
from benchmarks.harness.base import DefinitionError
from benchmarks.harness.config.runs import Run
from benchmarks.harness.config.suite import suite_names
from benchmarks.harness.report import listing
from tests import fake_runs
from tests.checkout import seconds_of_children
from tests.conftest import ROOT
from tests.drawn import undraw
from tests.executed import prepare
from tests.planned import plan
from tests.programs import call

RUNS = Path("results/runs")


def test_every_command_of_the_suite_is_on_its_page() -> None:
    lines = (ROOT / "docs/commands.md").read_text().splitlines()
    for name, command in suite_cli.commands.items():
        assert (f"| `{name}` | {command.get_short_help_str(60)} |" in lines) != command.hidden


IMPORTS = re.findall(
    r"^(?:import benchmarks|from (?:benchmarks|emoe)).*",
    (ROOT / "workflow/rules/common.smk").read_text(),
    re.MULTILINE,
)
PLAN = "; ".join([*IMPORTS, "load_suite({'suite': 'paper'}).runs"])  # as Snakemake does
START = "sys.argv[1:] = {}; runpy.run_module('benchmarks', run_name='__main__')"


@pytest.mark.parametrize(
    "program",
    [
        PLAN,
        *(
            START.format(words)
            for words in (["list"], ["check", "--help"], ["status", "--suite", "smoke"])
        ),
    ],
)
def test_planning_and_listing_import_no_heavy_package(program: str) -> None:
    """PyTorch alone takes a second."""
    heavy = "{'torch', 'pandas', 'transformers', 'datasets', 'matplotlib'} & set(sys.modules)"
    program = f"import runpy, sys\ntry: {program}\nfinally: print({heavy})\n"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "set()"


@pytest.mark.parametrize("arguments", [["list"], ["list", "suites"], ["list", "paper"]])
def test_listing_takes_three_seconds(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "benchmarks", *arguments]
    # the first call in a new checkout also compiles the modules
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    before = seconds_of_children()
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    assert seconds_of_children() - before <= 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("status --suite smok", "there is no suite 'smok'; did you mean 'smoke'?"),
        ("list smok", "there is no kind or suite 'smok'; did you mean 'smoke'? Kinds: paper, "),
        ("list nothing-like-it", "there is no kind or suite 'nothing-like-it'; Kinds: paper, "),
        (
            "tables --benchmark speed",
            "suite mini: 'benchmark' is 'speed', which does not exist; choose from glue,",
        ),
        (
            "collect --suite smoke --benchmark glue",
            "1 of 15 runs of the suite smoke is missing; make it with ",
        ),
        (
            "claims --write --suite smoke",
            "results/smoke/numbers/glue.jsonl cannot be read: No such file or directory; ",
        ),
        ("mirror --suite mini", "196 of 196 runs are missing: make run SUITE=mini"),
        ("check --benchmark glue", "no run of glue in the suite 'mini' is finished: `make run "),
        (
            "bless --benchmark speed",
            "suite mini: 'benchmark' is 'speed', which does not exist; choose from glue,",
        ),
        (
            "report --suite smoke --output a.html",
            "results/smoke/sections/glue.json cannot be read: No such file or ",
        ),
    ],
)
def test_wrong_arguments_and_missing_runs_are_one_line(
    runs: list[Run],
    arguments: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (RUNS / runs[0].folder / "metrics.json").unlink()
    monkeypatch.setattr(sys, "argv", ["emoe-bench", *arguments.split()])
    with pytest.raises(SystemExit) as end:
        main()
    shown = capsys.readouterr().err
    assert shown.startswith(f"error: {message}")
    assert (end.value.code, len(shown.splitlines())) == (1, 1)


def test_each_listed_model_says_where_its_weights_come_from() -> None:
    sources = ("hub", "package", "rebuilt", "timm")
    for model in listing.LISTS["models"]():
        has_source = any(model[source] for source in sources)
        assert has_source or "random weights" in model["title"], model["name"]


def test_lists_have_every_name() -> None:
    for kind in listing.LISTS:
        text = call("list", kind)
        assert len(text.splitlines()) > 2
        assert all(row["name"] in text for row in listing.LISTS[kind]())


@pytest.mark.parametrize("arguments", [["list"], ["list", "--help"]])
def test_list_names_all_kinds_and_suites(arguments: list[str]) -> None:
    shown = call(*arguments)
    words = re.findall(r"[\w-]+", shown.partition("Kinds:")[2])
    assert words == ["paper", *listing.LISTS, "Suites", *suite_names()]


def test_a_wrong_word_for_list_is_answered_with_all_words() -> None:
    with pytest.raises(DefinitionError) as error:
        listing.check_list("smok")
    assert [word for word in [*listing.LISTS, *suite_names()] if word not in str(error.value)] == []


@pytest.fixture
def runs(here: Path) -> list[Run]:
    """Write finished runs of text classification in the smoke suite."""
    planned = plan(["glue"], "smoke")
    fake_runs.write_runs(planned)
    for run in planned:
        prepare(run, str(RUNS))
    return planned


def test_status_counts_runs_and_shows_the_last_line_of_those_that_run_or_failed(
    runs: list[Run],
) -> None:
    first, second, third = (RUNS / run.folder for run in runs[:3])
    for folder in (first, second, third):
        (folder / "metrics.json").unlink()
    (first / "log.txt").write_text("step 10\nstep 20\r\n\n")
    (second / "log.txt").write_text("Traceback\nValueError: odd\n")
    with FileLock(first / ".lock"):
        lines = call("status", "--suite", "smoke").splitlines()
    assert lines[2].split() == ["glue", str(len(runs) - 3), "1", "1", "1", "2"]
    benchmarks = [
        "glue",
        "glue_lora",
        "glue_ood",
        "multitask",
        "modularity",
        "domainbed",
        "llama",
        "speed",
    ]
    assert [line.split()[0] for line in lines[2:-2]] == benchmarks
    assert [line.rpartition(" (")[0] for line in lines[-2:]] == [
        f"running  {runs[0].name}: step 20",
        f"failed   {runs[1].name}: ValueError: odd",
    ]
    assert (
        call("status", "--suite", "smoke").splitlines()[2].split()[3] == "2"
    )  # whoever ran the first is gone


def test_status_tells_a_missing_log_from_an_empty_one(here: Path) -> None:
    without_log, with_empty_log = plan(["glue"], "smoke")[:2]
    folders = [RUNS / run.folder for run in (without_log, with_empty_log)]
    for folder in folders:
        folder.mkdir(parents=True)
    (folders[1] / "log.txt").touch()
    with FileLock(folders[0] / ".lock"), FileLock(folders[1] / ".lock"):
        lines = call("status", "--suite", "smoke").splitlines()
    assert lines[-2] == f"running  {without_log.name}: it has no log yet"
    assert lines[-1].startswith(f"running  {with_empty_log.name}: its log is empty (")


def test_status_before_the_first_run_says_how_to_start(here: Path) -> None:
    RUNS.mkdir(parents=True)
    next_step = "No run has started. Run the suite: make run SUITE=smoke"
    assert call("status", "--suite", "smoke").splitlines()[-1] == next_step
    first = plan(["glue"], "smoke")[0]
    fake_runs.write_runs([first])
    assert next_step not in call("status", "--suite", "smoke")


def test_tables_say_where_they_are_and_which_sets_have_their_own(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undraw(monkeypatch)
    fake_runs.write_runs(plan(["domainbed"], "smoke"))
    arguments = ["tables", "--suite", "smoke", "--benchmark", "domainbed"]
    place = "wrote tables to results/smoke/tables/, figures to results/smoke/figures/"
    of_all = CliRunner().invoke(suite_cli, arguments, obj=0.0)
    assert of_all.output.splitlines() == [
        place,
        "each set has its own tables and figures: --part rotated_mnist_5k, --part colored_mnist_5k",
    ]
    of_set = CliRunner().invoke(suite_cli, [*arguments, "--part", "rotated_mnist_5k"], obj=0.0)
    assert of_set.output.splitlines() == [place]
    assert Path("results/smoke/figures/domainbed_rotated_mnist_5k_accuracy.png").exists()


def test_the_help_says_how_an_export_with_experts_is_loaded() -> None:
    shown = " ".join(call("export", "--help").split())
    assert "emoe: with experts; transformers loads it after `import emoe`." in shown


def test_commands_work_in_the_checkout_from_a_folder_without_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(suite_cli, ["status", "--suite", "smoke"], catch_exceptions=False)
    assert f"there is no results/ here; working in {ROOT}" in result.output
    assert Path.cwd() == ROOT
    assert not list(tmp_path.iterdir())


@pytest.fixture
def folder_of_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a checkout with finished runs of the smoke suite, and work in a folder beside it."""
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    monkeypatch.chdir(checkout)
    fake_runs.write_runs(plan(["glue"], "smoke"))
    # only now, because the plan reads csv files of the real checkout
    monkeypatch.setattr(base, "ROOT", checkout)
    folder = tmp_path / "user"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def test_a_mirror_writes_its_summary_in_the_folder_of_the_user(
    folder_of_user: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks.harness.results import mlflow

    # a real mirror takes many seconds
    monkeypatch.setattr(mlflow, "mirror", lambda records, uri: {"added": len(records)})
    call("mirror", "--suite", "smoke", "--output", "summary.txt")
    assert Path.cwd() == base.ROOT
    assert (folder_of_user / "summary.txt").read_text() == "MLflow: 15 added\n"


def test_a_data_root_is_relative_to_the_folder_of_the_user(folder_of_user: Path) -> None:
    (folder_of_user / "sets").mkdir()
    shown = call("data", "--check", "--suite", "full", "--data-root", "sets", status=1)
    assert Path.cwd() == base.ROOT
    assert f"{folder_of_user}/sets/" in shown
