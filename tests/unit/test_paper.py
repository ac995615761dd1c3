"""Test the paper's tables and figures under its own numbers: their files, sources and rows."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from matplotlib import pyplot as plt

from benchmarks.harness.base import BENCHMARKS, DefinitionError
from benchmarks.harness.config.benchmark import benchmark_names, load_benchmark
from benchmarks.harness.config.suite import Suite, load_suite
from benchmarks.harness.config.yaml import Location
from benchmarks.harness.report.artifacts import all_artifacts
from benchmarks.harness.report.paper import draw_main, main_rows, write_paper_items
from benchmarks.harness.report.paper_index import paper_index
from benchmarks.harness.report.paper_items import (
    PaperSource,
    check_source,
    main_figure,
    outputs_of,
    paper_files,
    paper_outputs,
)
from benchmarks.harness.report.plots import save
from benchmarks.harness.report.presentation import check_presentations, present
from tests import fake_runs
from tests.drawn import watched
from tests.planned import edited_benchmark, edited_project


def test_every_output_of_the_paper_is_made_by_exactly_one_rule() -> None:
    made = [output.name for shown in all_artifacts() for output in outputs_of(shown)]
    assert sorted(made) == sorted(output.name for output in paper_outputs())
    assert len(made) == len(set(made))
    assert {"table_4a", "table_3a", "table_3d", "table_8_pacs", "figure_5b"} <= set(made)


def test_published_numbers_have_the_minus_sign_of_the_tables() -> None:
    files = list(BENCHMARKS.glob("*/*.csv"))
    assert files
    for file in files:
        assert "\N{MINUS SIGN}" not in file.read_text(encoding="utf-8"), file


def test_every_benchmark_names_tables_and_figures_that_exist() -> None:
    check_presentations(benchmark_names())
    for name, tables, wrong in (("glue", "tables", "test"), ("domainbed", "set_tables", "choice")):
        with pytest.raises(
            DefinitionError, match=rf"{tables}' is '{wrong}', .* did you mean '{wrong}s'"
        ):
            present(edited_benchmark(name, {tables: [wrong]}), [])


def test_a_mistyped_table_is_named_in_the_file_that_has_the_mistake(tmp_path: Path) -> None:
    where = Location("paper.yaml", "items.table_2.parts[0]")
    with pytest.raises(
        DefinitionError, match=r"paper\.yaml: .*table' is 'tsks', .* did you mean 'tasks'"
    ):
        check_source(PaperSource(benchmark="glue", table="tsks"), where)
    edit = edited_project(
        tmp_path, "benchmarks/glue/benchmark.yaml", "results, tasks,", "results, tsks,"
    )
    message = (
        r"^\S+/glue/benchmark\.yaml: 'tables' is 'tsks', which does not exist; did you mean 'tasks'"
    )
    with edit, pytest.raises(DefinitionError, match=message):
        check_source(PaperSource(benchmark="glue", table="tasks"), where)


@pytest.mark.usefixtures("undrawn")
def test_paper_tables_have_the_papers_rows(here: Path) -> None:
    suite = load_suite({"benchmarks": ["glue", "glue_lora", "glue_ood"]})
    fake_runs.write_runs(suite.runs)
    folder = Path("results/mini/paper")
    write_items(suite)
    draw_main({}, main_figure(suite.name))
    assert (folder / "figure_5a.pdf").read_text() == "glue_lora_settings"
    assert {path.name for path in folder.iterdir()} == {
        Path(file).name for file in paper_files(suite)
    }
    for name, rows, others in (
        ("4a", "bottom k", "all but the top k"),
        ("2a", "Vanilla", "random partition"),
    ):
        table = (folder / f"table_{name}.md").read_text()
        assert (rows in table, others in table) == (True, False)
    assert "all but the top k" in (folder / "table_17.md").read_text()
    status = {row["item"]: row["status"] for row in paper_index(suite)}
    assert (status["table_4"], status["table_mmlu"]) == (
        "made",
        "not in this suite (benchmark llama)",
    )


@pytest.mark.usefixtures("undrawn")
def test_a_paper_table_shows_the_clean_runs_if_the_published_protocol_lacks_some(
    here: Path,
) -> None:
    # in `full`, only two methods on one task have runs of the published protocol
    suite = load_suite({"suite": "full", "benchmarks": ["glue"]})
    fake_runs.write_runs(suite.runs)
    write_items(suite)
    rows = pd.read_csv("results/full/paper/table_2a.csv")
    assert set(rows["method"]) == {"vanilla", "gmoe", "emoe", "emoe_learn"}
    assert set(rows["protocol"]) == {"clean"}
    assert rows["STS-B mean"].notna().all()


def write_items(suite: Suite) -> None:
    """Write the paper's tables and figures of all benchmarks of a suite, with empty figures."""
    drawn = Path(f"results/{suite.name}/figures")
    drawn.mkdir(parents=True)
    for name in suite.settings.benchmarks:
        presented = present(load_benchmark(name), fake_runs.records(suite.runs_of(name)))
        for figure in presented.figures:
            save(plt.figure(), drawn / figure)  # test_figures draws them
            (drawn / f"{figure}.pdf").write_text(figure)
        write_paper_items(suite, presented)


def test_main_averages_are_those_of_the_runs_and_of_the_paper(here: Path) -> None:
    suite = load_suite({"benchmarks": ["glue", "glue_lora", "glue_ood", "domainbed"]})
    fake_runs.write_runs(suite.runs, {"emoe": 0.03})
    numbers = fake_runs.claim_numbers(suite)
    rows = main_rows(numbers)
    ours = rows[rows["is_ours"]]
    assert ours[["panel", "line"]].drop_duplicates().shape[0] == 4
    scores: dict[tuple[str, str, int], float] = {}
    for run in suite.runs_of("glue"):
        task, method = run.spec["task"], run.spec["method"]["name"]
        tested = fake_runs.metrics(run, 0.03 if method == "emoe" else 0.0)["scores"]["test"][
            task["name"]
        ]
        scores[method, task["name"], run.spec["seed"]] = tested[task["metric"]]
    full = ours[ours["panel"] == "Text in full"].set_index("method")
    # GMoE ran on tweets with five seeds alone
    for method, tasks, seeds in (("gmoe", ["tweets"], 5), ("emoe", ["tweets", "amazon"], 8)):
        pairs = [(task, seed) for task in tasks for seed in range(seeds)]
        difference = sum(scores[method, *pair] - scores["vanilla", *pair] for pair in pairs) / len(
            pairs
        )
        assert full.loc[method, ["delta", "n"]].to_list() == pytest.approx([difference, seeds])
        # the methods have other tasks and seeds, and the title says so
        assert full.loc[method, "line"] == (
            "MiniLM-L6 (22.7 M)\n(GMoE: Tweets; n = 5 pairs;\nEMoE: Tweets, Amazon; n = 8 pairs)"
        )
    paper = rows[~rows["is_ours"]].set_index(["panel", "line", "method"])
    assert paper.loc[("Text in full", "BERT-large", "emoe"), "delta"] == pytest.approx(0.0062)
    with watched() as faults:
        draw_main(numbers, here / "figure_2")
    assert faults == []
