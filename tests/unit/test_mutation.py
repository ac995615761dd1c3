"""A sample of the mutation score: what `check` sees of swapped records and of mutated methods. All of it: `python -m tests.mutation`."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.harness.base.paths import RUNS
from benchmarks.harness.config.runs import Run, plan, run_from_spec
from benchmarks.harness.results.records import read_metrics
from benchmarks.harness.results.reference import Tolerances
from benchmarks.harness.results.regression import as_reference, judge
from benchmarks.harness.run.repetition import Repetition, prepare_folder, repeat
from tests.mutation.methods import MUTATIONS, affected, method_mutants
from tests.mutation.mutants import Verdict, table
from tests.mutation.records import record_mutants

# about what machines were seen to differ by
SPREADS = Tolerances({"first losses": 1e-6, "logits": 1e-5, "loss": 1e-3, "routing": 5e-3, "balanced_accuracy": 0.0})
SAMPLE = ("k halved", "another score", "a random partition instead of clusters", "learning rate × 1.1")


@pytest.fixture
def runs(workdir: Path) -> list[Run]:
    """Two short finished runs, in an empty working directory with the real sentences."""
    small = {"train_rows": 48, "eval_rows": 30, "epochs": 2}
    specs = [run.spec for run in plan(["glue"], "smoke") if run.spec["seed"] == 0]
    found = [
        run_from_spec({**spec, "training": {**spec["training"], **small}})
        for spec in specs
        if spec["method"]["name"] in ("emoe", "vanilla")
    ]
    assert repeat([Repetition(run, workdir) for run in found]) == []
    return found


def test_mutants_are_seen_on_both_kinds_of_machine_and_a_repetition_is_not(runs: list[Run], tmp_path: Path) -> None:
    chosen = [mutation for mutation in MUTATIONS if mutation.name in SAMPLE]
    verdicts = list(method_mutants(runs, chosen, tmp_path / "mutants", lambda: SPREADS, each=1, jobs=1))
    blessed = as_reference([(run, read_metrics(run)) for run in runs])
    verdicts += record_mutants(blessed, lambda: SPREADS)
    names = {verdict.mutation for verdict in verdicts}
    assert names == {
        *SAMPLE,
        "method A by B, whole records",
        "method A by B, scores alone",
        "a run or seed is lost",
        "a metric swapped",
        "an OOD set swapped",
    }
    real = [verdict for verdict in verdicts if not verdict.excluded]
    assert len(real) > 12
    assert [verdict for verdict in real if not verdict.same] == []
    of_methods = [verdict for verdict in real if verdict.mutation in (*SAMPLE, "method A by B, whole records")]
    assert [verdict for verdict in of_methods if not verdict.elsewhere] == []

    prepare_folder(tmp_path / "again")
    assert repeat([Repetition(run, tmp_path / "again", threads=1) for run in runs]) == []
    again = as_reference([(run, read_metrics(run, tmp_path / "again" / RUNS)) for run in runs])
    assert judge(blessed, again, lambda: SPREADS).passed


def test_what_has_nothing_to_change_is_no_mutant() -> None:
    runs = plan(["glue", "glue_ood", "speed", "llama"], "smoke")
    chosen = {mutation.name: affected(mutation, runs, 99) for mutation in MUTATIONS}
    methods = {name: {run.spec["method"]["name"] for run in found} for name, found in chosen.items()}
    assert methods["no balance loss"] >= {"gmoe", "emoe_published"}
    assert "emoe" not in methods["no balance loss"]
    assert "all_experts" not in methods["random experts"]
    assert methods["no noise on the weights"] == {"noisy_tuning"}
    assert {run.benchmark for found in chosen.values() for run in found} == {"glue", "llama"}


def test_the_table_counts_what_is_seen_and_says_what_is_not() -> None:
    seen = frozenset({"logits"})
    found = table(
        [
            Verdict("m", "a", seen, seen),
            Verdict("m", "b", seen),
            Verdict("m", "c", excluded="nothing there to change"),
        ]
    )
    assert "| m | 2 | 2 (100%) | 1 (50%) | logits 1 | 1: nothing there to change |" in found
    assert found.endswith("not seen: m: b")
