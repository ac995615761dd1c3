"""Ablations before anything runs: parts of the rows, what is planned, and what is refused."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from benchmarks.glue_ood.grid import KIND as EVALUATION
from benchmarks.harness.base.errors import DefinitionError
from benchmarks.harness.base.paths import BENCHMARKS
from benchmarks.harness.config.benchmark import Benchmark, check_references, load_benchmark
from benchmarks.harness.config.methods import ABLATION, setting_text, setting_values, without
from benchmarks.harness.config.runs import plan
from benchmarks.harness.config.yaml import read_yaml
from benchmarks.text.data import TextSplit
from tests.planned import evaluations

LORA, OOD = load_benchmark("glue_lora"), load_benchmark("glue_ood")

# a part of the rows


def split_of(labels: list[Any]) -> TextSplit:
    return TextSplit([(str(number),) for number in range(len(labels))], labels)


def test_a_part_has_every_class_in_proportion_and_a_smaller_one_lies_within() -> None:
    whole = split_of([0] * 70 + [1] * 20 + [2] * 10)
    parts = {share: whole.part(share, "t/train") for share in (0.1, 0.5, 0.8)}
    assert {share: Counter(part.labels) for share, part in parts.items()} == {
        0.1: {0: 7, 1: 2, 2: 1},
        0.5: {0: 35, 1: 10, 2: 5},
        0.8: {0: 56, 1: 16, 2: 8},
    }
    assert set(parts[0.1].texts) < set(parts[0.5].texts) < set(parts[0.8].texts) < set(whole.texts)
    assert parts[0.5].texts == whole.part(0.5, "t/train").texts != whole.part(0.5, "other/train").texts
    assert parts[0.5].texts == sorted(parts[0.5].texts, key=lambda row: int(row[0]))  # in the order of the set


def test_a_part_keeps_a_row_of_a_rare_class_and_divides_scores_by_their_whole_part() -> None:
    assert Counter(split_of([0] * 99 + [1]).part(0.1, "x").labels)[1] == 1
    assert Counter(split_of([0.1, 0.2] * 5 + [4.9, 5.0] * 5).part(0.2, "x").labels).total() == 4


# what is planned


def test_rows_of_ablations_keep_the_others_runs_and_stand_in_their_suites() -> None:
    planned = plan(["glue_lora", "glue_ood"], "mini")
    rows = Counter((run.benchmark, run.spec["method"]["name"], run.spec["method"]["variant"]) for run in planned)
    for row in ("lora_not_top", "lora_bottom"):
        assert rows["glue_lora", row, ""] == 5
    assert rows["glue_lora", "lora_emoe_part", "D0.8"] == rows["glue_lora", "lora_part", "D0.8"] == 5
    settings = {variant: count for (_, row, variant), count in rows.items() if row == "lora_emoe_settings"}
    assert settings == {"N16-k0.5": 5, "N32-k0.25": 5}
    # the chosen runs of another benchmark are evaluated, not those of its ablations
    evaluated = {row for benchmark, row, _ in rows if benchmark == "glue_ood"}
    assert evaluated == {
        "lora",
        "lora_block",
        "lora_gmoe",
        "lora_emoe",
        "lora_emoe_learn",
        "lora_random",
        "lora2emoe",
        "emoe2lora",
    }


@pytest.mark.parametrize("key", ["train_share", "epochs_factor"])
def test_only_rows_of_ablations_are_trained_otherwise(key: str) -> None:
    block = LORA.definition.suites["mini"].grid[0].model_copy(update={key: [0.5]})
    suite = LORA.definition.suites["mini"].model_copy(update={"grid": [block]})
    changed = LORA.definition.model_copy(update={"suites": {**LORA.definition.suites, "mini": suite}})
    with pytest.raises(
        DefinitionError, match=rf"suites\.mini\.grid\[0\]\.{key}' varies 'lora', whose runs would compete"
    ):
        list(LORA.kind.specs(Benchmark("glue_lora", changed, LORA.tasks), "mini", (), dict))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": ["lora", "lora_botom"]}, r"ablations\.selection\.rows' is 'lora_botom'.* did you mean 'lora_bottom'"),
        ({"rows": ["lora_emoe", "lora_bottom"]}, r"ablations\.selection\.rows' must begin with the baseline, 'lora'"),
        ({"rows": ["lora_emoe", "lora"]}, r"ablations\.selection\.rows' must begin with the baseline, 'lora'"),
        ({"rows": ["lora", "lora_emoe"]}, r"'methods\.lora_not_top' is an ablation, but no 'ablations' has it"),
        (
            {"paper": "selektion.csv"},
            r"ablations\.selection\.paper' is 'selektion\.csv'.*did you mean 'selection\.csv'",
        ),
    ],
)
def test_ablations_compare_what_exists(changes: dict[str, Any], message: str) -> None:
    found = LORA.definition.ablations["selection"].model_copy(update=changes)
    changed = LORA.definition.model_copy(update={"ablations": {**LORA.definition.ablations, "selection": found}})
    with pytest.raises(DefinitionError, match=message):
        check_references(changed, LORA.tasks, BENCHMARKS / "glue_lora")


def test_a_kind_without_ablations_refuses_their_rows() -> None:
    real = load_benchmark("domainbed")
    row = real.definition.methods["emoe"].model_copy(update={"role": ABLATION})
    changed = real.definition.model_copy(update={"methods": {**real.definition.methods, "emoe": row}})
    with pytest.raises(
        DefinitionError, match=r"'methods\.emoe' has role: ablation, which kind: domainbed does not know"
    ):
        check_references(changed, real.tasks, real.folder)


def test_a_model_is_used_as_one_row_and_not_as_several() -> None:
    row = OOD.definition.transformed["lora2emoe"].model_copy(update={"used_as": "lora_emoe_search"})
    with pytest.raises(DefinitionError, match=r"transformed\.lora2emoe\.used_as' runs with several N, k or layers"):
        evaluations(plan(["glue_lora"], "smoke"), transformed={"lora2emoe": row})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"trained": "lora", "used_as": "lora_gmoe"}, "must name a dense row and one with experts that are parts"),
        ({"trained": "lora", "used_as": "lora_block"}, "must name a dense row and one with experts that are parts"),
        ({"trained": "lora_emoe", "used_as": "lora_emoe"}, "must name a dense row and one with experts that are parts"),
        (
            {"trained": "lora", "used_as": "lora_emoe_learn"},
            r"used_as' is 'LoRA \+ EMoE-learn', whose router has state",
        ),
        ({"trained": "lora_block", "used_as": "lora_emoe"}, r"trained' is 'LoRA \+ Block', which trains another part"),
        ({"trained": "lora", "used_as": "lora_emo"}, r"used_as' is 'lora_emo'.*did you mean 'lora_emoe'"),
        ({"trained": "lora", "used_as": "lora_bottom"}, r"used_as' is 'lora_bottom', which does not exist"),
    ],
)
def test_weights_of_one_row_must_mean_the_same_in_the_other(row: dict[str, str], message: str) -> None:
    content = read_yaml(OOD.file)
    content["transformed"]["odd"] = {"title": "Odd", **row}
    content["ablations"]["transformation"]["rows"].append("odd")
    with pytest.raises(DefinitionError, match=r"'transformed\.odd.*" + message):
        EVALUATION.load(content, OOD.file)


def test_rows_that_are_ranked_are_main_rows() -> None:
    changed = OOD.definition.model_copy(update={"ranked": ["lora", "emoe2lora"]})
    with pytest.raises(DefinitionError, match=r"'ranked' is 'emoe2lora', which does not exist"):
        check_references(changed, OOD.tasks, OOD.folder)


# settings in words


def test_settings_are_read_back() -> None:
    assert setting_values("N16-k0.25-L-1-D0.8") == {"N": "16", "k": "0.25", "L": "-1", "D": "0.8"}
    assert setting_values("Llast-half:2") == {"L": "last-half:2"}
    assert setting_text("N16-k0.25-L3+5-D0.8") == "N 16, k/N 0.25, layers 3+5, 80 % of the rows"
    assert without("k0.5-L22", {"L22"}) == "k0.5"
