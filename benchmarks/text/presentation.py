"""Present text benchmarks: full fine-tuning, adapters, and benchmarks from a csv."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from benchmarks.harness.config.benchmark import AnyBenchmark
from benchmarks.harness.report.presentation import NOTE, Figure, Presentation
from benchmarks.harness.report.table import Table
from benchmarks.harness.results.records import Record
from benchmarks.text.ablations import ablation_figure, ablation_table
from benchmarks.text.figures import CURVES
from benchmarks.text.outcomes import TextOutcomes
from benchmarks.text.routing import TRACES, USAGE, trace_table, usage_table
from benchmarks.text.selection_gain import selection_gain_table
from benchmarks.text.tables import TABLES, verdicts

# These lines change the dictionary of tables.py itself instead of a copy, because plugins may add
# tables to it at any time.
TABLES["selection_gain"] = selection_gain_table
TABLES["usage"] = usage_table
TABLES["traces"] = trace_table
FIGURES = {"usage": USAGE, "traces": TRACES, "curves": CURVES}


def present(benchmark: AnyBenchmark, records: Sequence[Record]) -> Presentation:
    """Make the tables, figures and verdicts of a benchmark's finished runs."""
    outcomes = TextOutcomes(benchmark, records)
    return present_text(outcomes, TABLES, FIGURES, optimizer="AdamW, linear decay, no clipping")


def present_text(
    outcomes: TextOutcomes,
    tables: Mapping[str, Callable[..., Table]],
    figures: Mapping[str, Figure],
    optimizer: str,
) -> Presentation:
    """Make the tables, figures and verdicts of a text benchmark, and add those of its ablations.

    Args:
        outcomes: The results of the benchmark, whose definition has the ablations.
        tables: The functions that make a table of :class:`TextOutcomes`, by name.
        figures: The figures, by name.
        optimizer: A description of the optimizer, for the page; empty without training.
    """
    ablations = outcomes.benchmark.definition.ablations
    ablation_tables = {name: partial(ablation_table, name=name) for name in ablations}
    ablation_figures = {name: ablation_figure(outcomes, name) for name in ablations}
    return Presentation(
        benchmark=outcomes.benchmark,
        table_functions={**tables, **ablation_tables},
        figure_functions={**figures, **ablation_figures},
        outcomes=outcomes,
        verdicts=list(verdicts(outcomes)),
        note=NOTE,
        optimizer=optimizer,
    )
