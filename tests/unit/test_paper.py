"""Test the paper's tables and figures under its own numbers: their files, sources and rows."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from benchmarks.harness.base import ROOT, DefinitionError
from benchmarks.harness.config.artifacts import FIGURE_FORMATS, all_artifacts, artifacts_of, code_files
from benchmarks.harness.config.benchmark import benchmark_names, load_benchmark
from benchmarks.harness.config.paper_items import (
    PaperPart,
    check_part,
    load_paper_items,
    outputs_of,
    paper_files,
    paper_outputs,
)
from benchmarks.harness.config.suite import load_suite
from benchmarks.harness.report.claims import claimed_numbers, write_claims
from benchmarks.harness.report.paper import draw_main, main_rows, paper_index, write_paper_items
from benchmarks.harness.report.presentation import check_presentations, present
from tests import fake_runs
from tests.drawn import watched
from tests.planned import edited_benchmark
from tests.programs import call


def test_the_code_of_a_table_is_its_package_its_kind_and_the_report() -> None:
    glue_ood, llama = ({Path(file).as_posix() for file in code_files(name)} for name in ("glue_ood", "llama"))
    assert {"benchmarks/glue_ood/presentation.py", "benchmarks/text/tables.py"} <= glue_ood - llama
    assert "benchmarks/llama/presentation.py" in llama - glue_ood
    assert {"benchmarks/harness/report/table.py", "benchmarks/harness/results/statistics.py"} <= glue_ood & llama


def test_every_part_is_made_by_one_rule() -> None:
    made = [output.name for shown in all_artifacts() for output in outputs_of(shown)]
    assert sorted(made) == sorted(output.name for output in paper_outputs())
    assert len(made) == len(set(made))
    assert {"table_4a", "table_3a", "table_3d", "table_8_pacs", "figure_5b"} <= set(made)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"benchmark": "gleu", "table": "tasks"}, r"'items\.table_9\.benchmark' is 'gleu'.* did you mean 'glue'"),
        ({"benchmark": "glue", "table": "taks"}, r"'items\.table_9\.table' is 'taks'.* did you mean 'tasks'"),
        ({"benchmark": "glue", "table": "tasks", "rows": ["emo"]}, r"rows' is 'emo'.* did you mean 'emoe'"),
    ],
)
def test_parts_name_what_exists(part: dict[str, object], message: str) -> None:
    with pytest.raises(DefinitionError, match=message):
        check_part(PaperPart.model_validate(part), "paper.yaml: 'items.table_9")


def test_every_benchmark_names_tables_and_figures_that_exist() -> None:
    check_presentations(benchmark_names())


@pytest.mark.parametrize(
    ("name", "key", "value", "message"),
    [
        ("glue", "tables", ["results", "test"], r"tables' is 'test', .* did you mean 'tests'"),
        ("domainbed", "set_tables", ["choice"], r"set_tables' is 'choice', .* did you mean 'choices'"),
    ],
)
def test_a_misspelt_table_or_figure_names_the_nearest(name: str, key: str, value: object, message: str) -> None:
    with pytest.raises(DefinitionError, match=message):
        present(edited_benchmark(name, {key: value}), [])


@pytest.mark.parametrize(("name", "file"), [("glue", "paper.csv"), ("domainbed", "costs.csv")])
def test_other_columns_of_published_numbers_are_refused_before_runs_start(
    name: str, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = load_benchmark(name)
    folder = Path(shutil.copytree(real.folder, tmp_path / name))
    (folder / file).write_text("model,b\n")
    message = rf"{file}: the columns are \['model', 'b'\], but must be \[.*'value', 'status', 'source'\]$"
    monkeypatch.setattr("benchmarks.harness.config.benchmark.BENCHMARKS", tmp_path)
    with pytest.raises(DefinitionError, match=message):
        edited_benchmark(name, {})


def test_a_suite_makes_what_it_runs() -> None:
    suite = load_suite({"suite": "mini"})
    names = {Path(file).stem for file in paper_files(suite)}
    assert "table_8_rotated_mnist_5k" in names
    assert "table_8_pacs" not in names
    assert {Path(file).name for file in paper_files(suite, "table_4")} == {
        f"table_4{part}.{end}" for part in "ab" for end in ("csv", "md", "tex", "html")
    }
    assert paper_files(load_suite({"suite": "speed"})) == []


@pytest.mark.usefixtures("undrawn")
def test_paper_tables_have_the_papers_rows_by_one_selection(here: Path) -> None:
    suite = load_suite({"benchmarks": ["glue", "glue_lora", "glue_ood"]})
    fake_runs.write_runs(suite.runs)
    folder, drawn = Path("results/mini/paper"), Path("results/mini/figures")
    drawn.mkdir(parents=True)
    for name in suite.settings.benchmarks:
        presented = present(load_benchmark(name), suite.runs_of(name))
        for figure in presented.figures:
            for end in FIGURE_FORMATS:  # test_figures draws them
                (drawn / f"{figure}.{end}").write_text(f"{figure}, {end}")
        write_paper_items(suite, artifacts_of(name), presented)
    write_claims(suite)
    assert (folder / "figure_5a.pdf").read_text() == "glue_settings, pdf"
    assert {path.name for path in folder.iterdir()} == {Path(file).name for file in paper_files(suite)}
    table = (folder / "table_4a.md").read_text()
    assert table.startswith("### Table 4 of the paper (first version): Clustered and random experts")
    assert "bottom k" in table
    assert "all but the top k" not in table  # of table 17
    assert "all but the top k" in (folder / "table_17.md").read_text()
    assert "`snakemake --cores all table_4 --config suite=mini`" in table
    assert "| authors'" not in (folder / "table_3a.md").read_text()  # mini has clean runs alone
    assert "Vanilla" in (folder / "table_2a.md").read_text()
    assert "random partition" not in (folder / "table_2a.md").read_text()
    status = {row["item"]: row["status"] for row in paper_index(suite)}
    assert status["table_1"].startswith("not in this suite")
    assert status["table_mmlu"] == "not in this suite (benchmark llama)"
    assert status["table_4"] == "made"
    assert status["table_multitask"] == "not in this suite (benchmark multitask)"


def test_the_command_lists_every_item() -> None:
    said = call("list", "paper", "--suite", "mini")
    for name in load_paper_items():
        assert f"\n{name} " in said


def test_the_documents_have_a_row_for_every_item() -> None:
    text = (ROOT / "docs" / "reproducing.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("|")]
    for name, item in load_paper_items().items():
        (row,) = (line for line in rows if line.startswith(f"| `{name}` |"))
        assert item.title in row
        assert ("not made" in row) == (item.missing is not None)


def test_main_averages_are_those_of_the_runs_and_of_the_paper(here: Path) -> None:
    suite = load_suite({"benchmarks": ["glue", "glue_lora", "glue_ood", "domainbed"]})
    fake_runs.write_runs(suite.runs, {"emoe": 0.03})
    rows = main_rows(claimed_numbers(suite))
    ours = rows[rows["whose"] == "ours"]
    assert list(ours["axis"].unique()) == [
        "Images, held-out domains, DINOv2-initialised ViT-S/14 (22 M)",
        "Text in full, MiniLM-L6 (22.7 M)",
        "Text by LoRA, MiniLM-L6 (22.7 M)",
        "Text by LoRA, OOD, MiniLM-L6 (22.7 M)",
    ]
    scores: dict[tuple[str, str, int], float] = {}
    for run in suite.runs_of("glue"):
        task, method = run.spec["task"], run.spec["method"]["name"]
        found = fake_runs.metrics(run, 0.03 if method == "emoe" else 0.0)["scores"]["test"][task["name"]]
        scores[method, task["name"], run.spec["seed"]] = 100 * found[task["metric"]]

    def mean(method: str, tasks: tuple[str, ...], seeds: int) -> float:
        return sum(scores[method, task, seed] for task in tasks for seed in range(seeds)) / len(tasks) / seeds

    both = ("tweets", "amazon")
    full = ours[ours["axis"].str.startswith("Text in full")].set_index("method")
    # GMoE ran on tweets with five seeds alone: means are over these, differences over all pairs with the dense model
    rows_of = (("dense", "vanilla"), ("gmoe", "gmoe"), ("emoe", "emoe"))
    assert full["mean"].to_dict() == pytest.approx({name: mean(method, ("tweets",), 5) for name, method in rows_of})
    difference = mean("emoe", both, 8) - mean("vanilla", both, 8)
    assert (full.loc["emoe", "delta"], full.loc["emoe", "n"]) == pytest.approx((difference, 8))
    paper = rows[rows["whose"] == "paper"].set_index(["axis", "method"])
    assert paper.loc[("Text in full, BERT-large", "emoe"), "delta"] == pytest.approx(0.62)
    assert paper.loc[("Text by LoRA, OOD, GPT2-XL", "emoe"), "is_rank"]
    # every row says what it is of, and so does every axis of the radar
    assert full["of"].to_dict() == dict.fromkeys(full.index, "Tweets; n = 5 pairs")
    assert full.loc[["gmoe", "emoe"], "compared"].to_list() == ["Tweets; n = 5 pairs", "Amazon, Tweets; n = 8 pairs"]
    with watched() as found:
        draw_main(rows, here)
    assert found == []
    draw_main(rows, here)
    draw_main(rows[rows["whose"] == "paper"], here / "none")
    assert (here / "figure_2a.png").stat().st_size > 2 * (here / "none" / "figure_2a.png").stat().st_size
