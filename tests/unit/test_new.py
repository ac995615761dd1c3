"""A csv becomes a benchmark, or one sentence says why not and nothing is written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from benchmarks.harness.base.errors import DataError, DefinitionError
from benchmarks.harness.base.paths import ROOT
from benchmarks.harness.config.benchmark import kind_of, load_benchmark
from benchmarks.harness.config.suite import load_suite
from benchmarks.text import new
from benchmarks.text.datasets import load_split
from benchmarks.text.new import divided, new_benchmark, read_rows

LINES = [f"sentence number {number},{('bad', 'good')[number % 2]}" for number in range(80)]
CSV = "\n".join(["text,label", *LINES]) + "\n"


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Folders of benchmarks and suites to write into."""
    for name in ("benchmarks", "config"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(new, name.upper(), tmp_path / name)
    yield
    load_benchmark.cache_clear()
    kind_of.cache_clear()


def written(root: Path, content: str | bytes, name: str = "mine.csv") -> Path:
    file = root / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


def listed(root: Path) -> list[str]:
    return sorted(
        str(path.relative_to(root)) for folder in ("benchmarks", "config") for path in (root / folder).rglob("*")
    )


def test_a_csv_becomes_a_benchmark_that_plans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("harness.config.definition", "harness.config.kinds"):
        monkeypatch.setattr(f"benchmarks.{module}.BENCHMARKS", tmp_path / "benchmarks")
    (tmp_path / "benchmarks/text").mkdir()
    for file in ("text/grid.py", "glue/pipeline.py"):
        (tmp_path / "benchmarks" / file).parent.mkdir(exist_ok=True)
        (tmp_path / "benchmarks" / file).touch()
    monkeypatch.setattr("benchmarks.harness.base.paths.CONFIG", tmp_path / "config")
    monkeypatch.setattr("benchmarks.harness.sources.local.ROOT", tmp_path)

    said = new_benchmark("mine", written(tmp_path, CSV))
    assert said.startswith("wrote benchmarks/mine (")
    assert said.endswith(" test rows; labels bad, good) and config/mine.yaml")
    entry = load_benchmark.__wrapped__("mine").tasks["mine"]
    splits = {part: load_split(entry.as_run("mine"), part) for part in ("train", "dev", "test")}
    assert {part: len(split) for part, split in splits.items()} == entry.rows.model_dump()
    assert sum(len(split) for split in splits.values()) == 80
    runs = load_suite({"suite": "mine"}).runs
    assert [(run.spec["method"]["name"], run.spec["seed"]) for run in runs] == [
        (name, seed) for name in ("vanilla", "emoe", "random_partition") for seed in (0, 1)
    ]


@pytest.mark.parametrize(
    "content",
    [
        CSV.replace(",", ";"),
        CSV.replace(",", "\t"),
        CSV.replace(",", "|"),
        "﻿" + CSV,
        CSV.replace("\n", "\r\n"),
        CSV.replace("\n", "\n\n"),
        CSV + ",\n , \nonly text,\n",
    ],
)
def test_how_a_file_is_written_changes_no_row(tmp_path: Path, content: str) -> None:
    assert read_rows(written(tmp_path, content)).rows == read_rows(written(tmp_path, CSV, "plain.csv")).rows


def test_quoted_cells_may_hold_lines_and_separators_and_rows_without_text_or_label_are_counted(tmp_path: Path) -> None:
    found = read_rows(
        written(tmp_path, 'id;Review;class\n1;"a ""b"";\nc \u2028 d";2.0\n2;;1\n3;e;\n4;f;NaN\n5;g;null\n'), "Review"
    )
    assert found.rows == {None: [('a "b";\nc \u2028 d', "2")]}
    assert found.dropped == 4


def test_labels_that_are_numbers_are_in_their_order(tmp_path: Path) -> None:
    lines = [f"sentence {number},{(10, 9, -1)[number % 3]}" for number in range(90)]
    new_benchmark("mine", written(tmp_path, "\n".join(["text,label", *lines])))
    task = yaml.safe_load((tmp_path / "benchmarks/mine/tasks.yaml").read_text())["tasks"]["mine"]
    assert task["labels"] == ["-1", "9", "10"]


def test_labels_that_yaml_reads_otherwise_stay_names(tmp_path: Path) -> None:
    new_benchmark("mine", written(tmp_path, CSV.replace(",good", ",yes").replace(",bad", ",no")))
    task = yaml.safe_load((tmp_path / "benchmarks/mine/tasks.yaml").read_text())["tasks"]["mine"]
    assert task["labels"] == ["no", "yes"]


def test_the_hash_of_a_text_decides_its_split() -> None:
    rows = [(f"sentence {number}", "a") for number in range(2000)]
    shares = {"dev": 0.15, "test": 0.15}
    found = divided(rows, shares)
    assert {part: round(len(rows) / 2000, 1) for part, rows in found.items()} == {"train": 0.7, "dev": 0.1, "test": 0.2}
    again = divided([*rows[1000:], ("another", "b"), *rows[:10]], shares)
    for part in found:
        assert set(again[part]) - {("another", "b")} <= set(found[part])


def test_splits_that_a_column_or_files_name_are_kept(tmp_path: Path) -> None:
    parts = ("train", "train", "Validation", "test")
    lines = [f"{line},{parts[number // 2 % 4]}" for number, line in enumerate(LINES)]
    said = new_benchmark("one", written(tmp_path, "\n".join(["text,label,split", *lines])))
    assert "(40 train, 20 dev, 20 test rows" in said
    said = new_benchmark("two", written(tmp_path, CSV), others={"dev": written(tmp_path, CSV, "dev.csv")})
    assert "(80 train, 80 dev rows" in said
    task = yaml.safe_load((tmp_path / "benchmarks/two/tasks.yaml").read_text())["tasks"]["two"]
    assert task["splits"] == {"train": "train", "dev": "dev"}


def test_other_rows_are_other_runs(tmp_path: Path) -> None:
    places = []
    for name, content in (("one", CSV), ("two", CSV), ("three", CSV.replace("number 3", "number three"))):
        new_benchmark(name, written(tmp_path, content))
        task = yaml.safe_load((tmp_path / f"benchmarks/{name}/tasks.yaml").read_text())["tasks"][name]
        places.append(Path(task["source"]["path"]).name)
    assert places[0] == places[1] != places[2]


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("text\nhello\n", {}, r"mine\.csv has one column, 'text'"),
        ("", {}, r"mine\.csv is empty"),
        (b"text,label\n\xff\xfe,a\n", {}, r"mine\.csv is not UTF-8: byte 11 is 0xff"),
        ("a,b,c\n1,2,3\n", {}, r"no column named like the text; say by --text which of a, b, c it is"),
        ("text,b\n1,2\n", {}, r"no column named like the label; say by --label which of text, b it is"),
        ("text,review,label\n1,2,3\n", {}, r"2 columns that may be the text; say by --text"),
        (CSV, {"text": "txt"}, r"mine\.csv has no column 'txt'; did you mean 'text'\?"),
        (CSV, {"label": "lable"}, r"mine\.csv has no column 'lable'; did you mean 'label'\?"),
        (CSV, {"label": "text"}, r"text and label are both the column 'text'"),
        ("text,label,text\n1,2,3\n", {}, r"has two columns 'text'"),
        ('text,label\n"a\nb",c\nd,e,f\n', {}, r"mine\.csv, line 4 has 3 cells, and the first line 2"),
        ('text,label\na,b\n"c,d\n', {}, r"mine\.csv, line 3: unexpected end of data"),
        ("\n".join(CSV.splitlines()[:21]), {}, r"20 rows with text and label; it takes 40 at least"),
        (CSV.replace("good", "bad"), {}, r"all rows have the label 'bad'; there is nothing to tell apart"),
        (
            "text,label\n" + "".join(f"t{i},l{i % 50}\n" for i in range(300)),
            {},
            r"50 labels in 300 rows, fewer than 10",
        ),
        (
            "text,label,split\n" + "".join(f"{line},dev\n" for line in LINES),
            {},
            r"'split' has only dev; it needs train",
        ),
        (
            "text,label,split\n" + "".join(f"{line},trian\n" for line in LINES),
            {},
            r"line 2: 'trian' .* did you mean 'train'",
        ),
        (
            "text,label,split\n" + "".join(f"{line},{'train' if 'bad' in line else 'test'}\n" for line in LINES),
            {},
            r"no row with the label 'good' is in train, so it cannot be learned",
        ),
    ],
)
def test_what_is_no_set_is_one_sentence_and_nothing_written(
    tmp_path: Path, content: str | bytes, options: dict[str, str], message: str
) -> None:
    with pytest.raises(DataError, match=message) as error:
        new_benchmark("mine", written(tmp_path, content), **options)
    assert "\n" not in str(error.value)
    assert listed(tmp_path) == []


def test_a_file_that_is_not_there_names_its_neighbour(tmp_path: Path) -> None:
    written(tmp_path, CSV)
    with pytest.raises(DataError, match=r"mien\.csv is no file; did you mean 'mine\.csv'"):
        new_benchmark("mine", tmp_path / "mien.csv")
    with pytest.raises(DataError, match="is a folder"):
        new_benchmark("mine", tmp_path)
    assert listed(tmp_path) == []


@pytest.mark.parametrize("name", ["My", "2nd", "a-b", "../x", "", "import", "größe"])
def test_names_that_cannot_be_modules_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DefinitionError, match="is no name for a benchmark"):
        new_benchmark(name, written(tmp_path, CSV))
    assert listed(tmp_path) == []


@pytest.mark.parametrize("name", ["smoke", "tables", "figures", "partition_neurons", "run_mine", "tables_of_mine"])
def test_names_of_rules_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DefinitionError, match="is a rule of the workflow"):
        new_benchmark(name, written(tmp_path, CSV))


def test_names_that_are_taken_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new_benchmark("mine", written(tmp_path, CSV))
    before = listed(tmp_path)
    with pytest.raises(DefinitionError, match=r"benchmarks/mine exists; take another name"):
        new_benchmark("mine", written(tmp_path, CSV))
    assert listed(tmp_path) == before
    monkeypatch.setattr(new, "CONFIG", ROOT / "config")
    with pytest.raises(DefinitionError, match=r"config/mini\.yaml exists"):
        new_benchmark("mini", written(tmp_path, CSV))
