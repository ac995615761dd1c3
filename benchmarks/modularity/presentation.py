"""Present pre-trained models as they are: tables, figures and verdicts."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.harness.config.benchmark import AnyBenchmark
from benchmarks.harness.config.runs import Run
from benchmarks.harness.report.presentation import Figure, Presentation, make
from benchmarks.harness.report.table import Column, Table
from benchmarks.harness.results.records import information_numbers
from benchmarks.harness.results.statistics import PERMUTATIONS
from benchmarks.modularity.figures import draw_activations, draw_activations_3d, draw_concentration, draw_experts
from benchmarks.modularity.outcomes import CELL, PLACE, ModularityOutcomes

_KEYS = {"model_title": "Model", "layer": "Layer", "num_experts": "N", "method_title": "Neurons in blocks", "n": "n"}


def concentration(outcomes: ModularityOutcomes) -> Table:
    """Make a table of the concentration by construction, beside the paper's matrices."""
    published = outcomes.paper.pivot(index=["method", "num_experts"], columns="metric", values="value")
    published = published[["best_quarter", "usage_gini"]].add_suffix("_paper")
    frame = outcomes.means.join(published, on=["method", "num_experts"])
    (share,) = {run.spec["reading"]["active_share"] for run in outcomes.runs}
    return Table(
        "Activations in blocks of neurons, nothing trained",
        "Means over n random partitions ± standard deviation; the other constructions have no seed. A neuron is active "
        f"for a token if |activation| is among the {share * 100:g} % largest of all tokens and neurons, as many as are "
        "not zero in the paper's matrix. Best quarter: share of a token's active neurons that are in the N/4 blocks "
        "with most of them, mean over tokens; of their magnitudes, all neurons counted. Gini: of the blocks' active "
        "neurons over all tokens. What avg-k keeps is the share of all magnitude in the top k experts. Unexplained "
        "variance is that of the keys. The paper's two matrices are of a model, layer and set that it does not name, "
        "so directions compare and values do not.",
        dict(_KEYS),
        [
            *(
                Column(metric, metric, std=f"{metric}_std")
                for metric in ("best_quarter", "best_quarter_mass", "usage_gini", "kept_top", "inertia")
            ),
            Column("best_quarter", "best_quarter_paper", "Paper: best quarter"),
            Column("usage_gini", "usage_gini_paper", "Paper: Gini"),
        ],
        frame,
    )


def selected(outcomes: ModularityOutcomes) -> Table:
    """Make a table of the neurons that the top k and the bottom k experts use."""
    names = ["dead", *(f"{name}_{selection}" for name in ("dead", "active", "kept") for selection in ("top", "bottom"))]
    return Table(
        "Neurons in use by the top and the bottom k experts, nothing trained",
        "Are the experts with the lowest scores dead, which would explain that using them does harm (the paper's Table "
        "4)? A neuron is dead if it is active, as above, for no token. Shares are of the neurons of the experts in "
        "use, means over tokens. Kept is the share of all magnitude. Means over n random partitions ± standard "
        "deviation.",
        dict(_KEYS),
        [Column(name, name, std=f"{name}_std") for name in names],
        outcomes.means,
    )


def usage(outcomes: ModularityOutcomes) -> Table:
    """Make a table of the mutual information of experts with task and class, beside chance."""
    metrics = [*information_numbers("task", "class"), "specialised_experts", "shared_experts"]
    frame = outcomes.means.reindex(columns=list(dict.fromkeys([*_KEYS, *CELL, *metrics])))
    return Table(
        "Information in the choice of an expert, nothing trained",
        "Mutual information of a token's expert with the task of its row, and with the row's class (within a task, "
        f"mean over the tasks with classes). Chance: mean and 95 % quantile of {PERMUTATIONS} shuffles of rows over "
        "the tasks, or within their task. Specialised experts: a task uses them more than by chance (5 %, over all "
        "experts and tasks). Shared experts: every task uses them above 1/N, and no task differs from chance. Means "
        "over random partitions.",
        {key: label for key, label in _KEYS.items() if key != "n"},
        [Column(metric, metric) for metric in metrics],
        frame,
    )


def verdicts(outcomes: ModularityOutcomes) -> Iterator[str]:
    """Yield a sentence per model and layer, for its largest N."""
    means = outcomes.means
    for key, rows in means.groupby(PLACE, sort=False):
        largest = rows[rows["num_experts"] == rows["num_experts"].max()].set_index("method")
        if outcomes.baseline not in largest.index:
            continue
        baseline = largest.loc[outcomes.baseline]
        others = ", ".join(
            f"{row.method_title.lower()} {row.best_quarter * 100:.0f} %"
            for row in largest.drop(index=outcomes.baseline).itertuples()
        )
        bits, chance, most = (baseline[name] for name in information_numbers("task"))
        yield (
            f"{baseline['model_title']}, layer {key[1]}, N = {baseline['num_experts']}: a token has "
            f"{baseline['best_quarter'] * 100:.0f} % of its active neurons in the best quarter of the clusters"
            f"{f' ({others})' if others else ''}; the choice of an expert tells {'more' if bits > most else 'no more'} "
            f"than chance of the task ({bits:.3f} bit, chance {chance:.3f})."
        )


TABLES = {"concentration": concentration, "selected": selected, "usage": usage}
FIGURES = {
    "activations": Figure(
        draw_activations,
        "Active neurons of tokens of several tasks. Neurons are in the order of the experts: the checkpoint's order, "
        "clusters of similar keys, or random. Each row is a token, task by task; vertical lines separate experts. If "
        "few experts hold most of a token's activations, its row shows a few dashes instead of scattered dots.",
    ),
    "activations_3d": Figure(
        draw_activations_3d,
        "The same as the paper draws it (Fig. 4 of the first version): height is the activation's "
        "magnitude, before clustering and after.",
    ),
    "concentration": Figure(
        draw_concentration,
        "Share of a token's active neurons that are in the best quarter of the experts. Bars span the seeds "
        "of random partitions; crosses are the paper's two matrices. The line at a quarter is where every "
        "expert has as many.",
    ),
    "experts": Figure(
        draw_experts,
        "Use of experts by task, divided by the expert's mean use. Triangles mark use above (▲) or below (▼) chance, "
        "by shuffled rows at 5 % over the whole panel. Dots mark shared experts: every task uses them above the "
        "average and equally.",
    ),
}
_NOTE = (
    "Nothing is trained, so only random partitions vary. A mark, or information above chance, shows that experts are "
    "used differently, not that this helps."
)


def present(benchmark: AnyBenchmark, runs: list[Run]) -> Presentation:
    """Present finished runs."""
    outcomes = ModularityOutcomes(benchmark, runs)
    return make(benchmark, TABLES, FIGURES, outcomes, verdicts=list(verdicts(outcomes)), note=_NOTE)
