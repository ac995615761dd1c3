"""Both programs' command lines: help, completion, lists, and what `status` and `compare` say of runs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import click
import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner
from filelock import FileLock

from benchmarks.__main__ import cli as suite_cli
from benchmarks.__main__ import main
from benchmarks.harness.base.errors import DefinitionError
from benchmarks.harness.config import listing
from benchmarks.harness.config.runs import Run, plan, run_from_spec
from emoe import __main__ as library
from tests import fake_runs
from tests.conftest import ROOT
from tests.executed import prepare
from tests.programs import call

RUNS = Path("results/runs")
PROGRAMS = {"emoe-bench": suite_cli, "emoe": library.cli}
COMMANDS = [(program, name) for program, cli in PROGRAMS.items() for name in cli.commands]


def shown(program: str, *path: str) -> str:
    """A help page at 80 columns."""
    command: click.Command = PROGRAMS[program]
    for name in path:
        assert isinstance(command, click.Group)
        command = command.commands[name]
    return command.get_help(click.Context(command, info_name=program, terminal_width=80, max_content_width=80))


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_help_of_a_program_is_whole_at_80_columns(program: str) -> None:
    text, cli = shown(program), PROGRAMS[program]
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80
    rows = [" ".join(line.split()) for line in text.splitlines()]
    for name, command in cli.commands.items():
        assert (f"{name} {command.short_help}" in rows) != command.hidden
    assert all(str(code) in text for code in (0, 1, 2, 130))


@pytest.mark.parametrize(("program", "name"), COMMANDS)
def test_every_command_and_option_is_explained(program: str, name: str) -> None:
    command = PROGRAMS[program].commands[name]
    assert command.help
    unexplained = [one.name for one in command.params if isinstance(one, click.Option) and not one.help]
    assert unexplained == []
    assert max(map(len, shown(program, name).splitlines())) <= 80


def test_the_page_of_the_commands_has_each_as_its_program_says_it() -> None:
    lines = (ROOT / "docs" / "commands.md").read_text().splitlines()
    for cli in PROGRAMS.values():
        for name, command in cli.commands.items():
            assert (f"| `{name}` | {command.short_help} |" in lines) != command.hidden


def imports_nothing_heavy(program: str) -> None:
    """Neither PyTorch, which takes a second, nor what takes longer."""
    heavy = "{'torch', 'pandas', 'transformers', 'datasets', 'matplotlib'} & set(sys.modules)"
    program = f"import runpy, sys\ntry: {program}\nfinally: print({heavy})\n"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


@pytest.mark.parametrize("words", [["check", "--help"], ["list"], ["list", "methods"], ["status", "--suite", "smoke"]])
def test_what_computes_nothing_comes_at_once(words: list[str]) -> None:
    imports_nothing_heavy(f"sys.argv[1:] = {words}; runpy.run_module('benchmarks', run_name='__main__')")


def test_snakemake_plans_without_waiting_for_what_trains() -> None:
    file = (ROOT / "workflow/rules/common.smk").read_text()
    needed = [line for line in file.splitlines() if line.startswith(("from benchmarks", "from emoe"))]
    assert len(needed) > 5
    imports_nothing_heavy("; ".join([*needed, "suites.load_suite({'suite': 'paper'}).runs"]))


@pytest.mark.parametrize(
    ("program", "words", "begun", "offered"),
    [
        ("emoe-bench", ["check", "--suite"], "smo", ["smoke"]),
        ("emoe-bench", ["report", "--benchmark"], "glue_", ["glue_lora", "glue_ood"]),
        ("emoe-bench", ["list"], "m", ["methods", "models", "metrics"]),
        ("emoe", ["convert"], "--part", ["--partition"]),
        ("emoe", ["convert", "--kind"], "g", ["gmoe"]),
    ],
)
def test_a_shell_completes_names(program: str, words: list[str], begun: str, offered: list[str]) -> None:
    found = ShellComplete(PROGRAMS[program], {}, program, "_COMPLETE").get_completions(words, begun)
    assert [item.value for item in found] == offered


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_knows_its_version(program: str) -> None:
    done = CliRunner().invoke(PROGRAMS[program], ["--version"], prog_name=program)
    assert done.output == f"{program} {library.emoe.__version__}\n"


def test_the_packages_scripts_start_the_programs() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    started = {name: EntryPoint(name, target, "console_scripts").load() for name, target in scripts.items()}
    assert started == {"emoe": library.main, "emoe-bench": main}


def test_an_interrupt_ends_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(library, "build_kernels", interrupted)
    monkeypatch.setattr(sys, "argv", ["emoe", "build"])
    with pytest.raises(SystemExit) as end:
        library.main()
    assert end.value.code == 130


@pytest.mark.parametrize("arguments", [["status", "--suite", "smok"], ["bless", "--suite", "smok"]])
def test_a_wrong_suite_is_one_line_with_the_nearest(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refusal(arguments, monkeypatch, capsys)
    assert said.startswith("error: there is no suite 'smok'; did you mean 'smoke'?")


# lists


def test_what_there_is_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "suite_names", lambda: ["emoji"])  # planning the others takes seconds
    amounts = {row["kind"]: row["how many"] for row in json.loads(call("list", "--json"))}
    assert list(amounts) == list(listing.LISTS)
    for kind, many in amounts.items():
        rows = json.loads(call("list", kind, "--json"))
        assert len(rows) == many
        text = call("list", kind)
        assert all(row["name"] in text for row in rows)
    suites = json.loads(call("list", "suites", "--json"))
    assert suites == [{"name": "emoji", "runs": len(plan(["domainbed"], "emoji")), "benchmarks": ["domainbed"]}]


# runs


@pytest.fixture
def runs(here: Path) -> list[Run]:
    """Smoke's finished runs of text classification."""
    found = plan(["glue"], "smoke")
    fake_runs.write_runs(found)
    for run in found:
        prepare(run, str(RUNS))
    return found


def state_of(suite: str = "smoke") -> dict[str, Any]:
    found: dict[str, Any] = json.loads(call("status", "--suite", suite, "--json"))
    return found


def test_status_tells_running_from_failed_and_shows_the_last_line(runs: list[Run]) -> None:
    first, second, third = (RUNS / run.folder for run in runs[:3])
    for folder in (first, second, third):
        (folder / "metrics.json").unlink()
    (first / "log.txt").write_text("step 10\nstep 20\r\n\n")
    (second / "log.txt").write_text("Traceback\nValueError: odd\n")
    with FileLock(first / ".lock"):
        found = state_of()
        text = call("status", "--suite", "smoke")
    glue = next(row for row in found["benchmarks"] if row["benchmark"] == "glue")
    assert glue == {"benchmark": "glue", "done": len(runs) - 3, "running": 1, "failed": 1, "waiting": 1}
    assert [(one["run"], one["state"], one["last"]) for one in found["runs"]] == [
        (runs[0].folder, "running", "step 20"),
        (runs[1].folder, "failed", "ValueError: odd"),
    ]
    assert "ValueError: odd (0:" in text
    assert state_of()["total"]["failed"] == 2  # whoever ran it is gone


def test_a_benchmark_that_the_suite_does_not_run_is_one_line_with_those_that_it_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refusal(["tables", "--suite", "mini", "--benchmark", "speed"], monkeypatch, capsys)
    assert said.startswith("error: suite mini: 'benchmark' is 'speed', which does not exist; choose from glue,")


@pytest.mark.parametrize("command", [["claims"], ["report", "--output", "r.html"], ["mirror"]])
def test_runs_that_are_missing_are_counted(
    runs: list[Run], command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    missing, wanted = (86 - len(runs), "86") if command == ["claims"] else (89 - len(runs), "89")
    assert refusal([*command, "--suite", "smoke"], monkeypatch, capsys).startswith(
        f"error: {missing} of {wanted} runs of the suite smoke "
    )
    (RUNS / runs[0].folder / "metrics.json").unlink()
    of_one = refusal(["tables", "--suite", "smoke", "--benchmark", "glue"], monkeypatch, capsys)
    assert of_one == (
        f"error: 1 of {len(runs)} runs of glue in the suite smoke is missing; make it with `make run SUITE=smoke`\n"
    )


def refusal(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What the suite's program says when it ends with status 1."""
    monkeypatch.setattr(sys, "argv", ["emoe-bench", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 1
    return capsys.readouterr().err


def test_compare_shows_settings_environment_and_numbers(runs: list[Run], tmp_path: Path) -> None:
    (tmp_path / "copy").mkdir()
    for file in ("run.json", "metrics.json"):
        (tmp_path / "copy" / file).write_text((RUNS / runs[0].folder / file).read_text())
    same = json.loads(call("compare", runs[0].id, str(tmp_path / "copy"), "--json"))
    assert (same["settings"], same["environment"]) == ([], [])
    assert all(pair["first"] == pair["second"] for pair in same["numbers"])

    other = next(run for run in runs if run.spec["method"]["name"] == "emoe")
    file = RUNS / other.folder / "metrics.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "environment": {**content["environment"], "threads": 2}}))
    found = json.loads(call("compare", runs[0].folder, str(file), "--json"))
    assert {"name": "threads", "first": 1, "second": 2, "difference": None} in found["environment"]
    assert "method.name" in [pair["name"] for pair in found["settings"]]
    scores = [pair for pair in found["numbers"] if pair["difference"]]
    assert all(pair["difference"] == float(pair["second"]) - float(pair["first"]) for pair in scores)
    assert scores
    differing = sum(pair["first"] != pair["second"] for pair in found["numbers"])
    assert f"numbers that differ: {differing} of" in call("compare", runs[0].id, other.id)


def test_compare_takes_two_suites_blessed_numbers() -> None:
    mini, smoke = (str(ROOT / "results" / "reference" / f"{name}.json") for name in ("mini", "smoke"))
    found = json.loads(call("compare", mini, smoke, "--json"))
    assert found["numbers"]
    assert all(pair["first"] == pair["second"] for pair in json.loads(call("compare", mini, mini, "--json"))["numbers"])


def test_what_cannot_be_compared_is_named(runs: list[Run]) -> None:
    def refused(first: str, second: str, match: str) -> None:
        with pytest.raises(DefinitionError, match=match):
            call("compare", first, second)

    folder = RUNS / runs[1].folder
    refused(runs[0].id[:-1], runs[0].id, f"did you mean '{runs[0].id}'")
    refused(runs[0].id, str(ROOT / "results" / "reference" / "mini.json"), "compare two of a kind")
    refused(runs[0].id, "nothing.json", "nothing.json does not exist")
    (folder / "metrics.json").unlink()
    refused(runs[0].id, str(folder), "the run is not finished")
    (folder / "run.json").write_text("[")
    refused(runs[0].id, str(folder), "is no run specification")


def test_results_of_another_version_are_listed(workdir: Path) -> None:
    planned = plan(["modularity"], "smoke")
    old = run_from_spec({**planned[0].spec, "version": 99})
    broken = prepare(planned[2], str(RUNS))
    broken.write_text("{")
    for run in (old, planned[1]):
        prepare(run, str(RUNS))
    found = json.loads(call("stale", "--json"))
    assert {one["folder"] for one in found} == {old.folder, planned[2].folder}
    said = call("stale")
    assert "of version 99 of modularity, which has" in said
    assert planned[1].folder not in said
    shutil.rmtree(RUNS)
    assert call("stale") == "no results of other versions\n"
