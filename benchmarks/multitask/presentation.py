"""Collect, tabulate and draw the scores of models that learn several tasks at once."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from benchmarks.harness.config.benchmark import OOD_MEAN, AnyBenchmark
from benchmarks.harness.report import common
from benchmarks.harness.report.presentation import NOTE, Presentation
from benchmarks.harness.report.table import MISSING, RUNS_COLUMN, Column, Table
from benchmarks.harness.results.records import Record
from benchmarks.text.definition import CLEAN, ID, OOD
from benchmarks.text.outcomes import CELL, DOMAIN_TITLES, HEADINGS, SELECTION, TextOutcomes
from benchmarks.text.tables import cost_table, ood_table, pairs_note, tests_table, verdicts

# groups of scores (domains) besides those of TextOutcomes
ID_MEAN = "id_mean"
TRANSFER = "transfer"
# the domains of means, each with the domain of the averaged sets
_MEANS = {ID_MEAN: ID, OOD_MEAN: OOD}
_KEYS_OF_GAIN = [*CELL, "domain"]  # the columns that identify a row of the table `gains`


class MultitaskOutcomes(TextOutcomes):
    """The results of finished multi-task runs, with two more groups of scores (domains).

    The column ``task`` has the mixture, or the task that is learned alone. The domain ``id_mean``
    has the mean score over the tasks of a mixture. The domain ``transfer`` has the score of a task
    in a mixture, minus the score of the same task if it is learned alone.
    """

    # T5 has no head, the whole model is trained, and only `rows_per_epoch` limits the rows
    seeds_cover = (
        "Intervals over seeds cover what a seed draws: order of the rows, dropout, random "
        "partitions and routers, and the rows of each epoch if their number is limited."
    )

    def select_mixtures(self, frame: pd.DataFrame) -> pd.DataFrame:
        """Select the rows of mixtures, without tasks that are learned alone."""
        return frame[frame["task"].isin(self.benchmark.definition.mixtures)]

    def _collect_seeds(self) -> pd.DataFrame:
        """Return the scores by seed, with two more domains.

        ``id_mean`` is the mean of a run over the tasks of its mixture. ``transfer`` is the score of
        a task in a mixture, minus its score if it is learned alone.
        """
        seeds = super()._collect_seeds()
        learned = seeds[seeds["domain"] == ID]
        together = self.select_mixtures(learned)
        # in a run that learns a task alone, `task` is this task and not a mixture
        alone = learned[learned["task"] == learned["eval_task"]]

        # one mean for each run, over the tasks of its mixture
        runs = together.groupby(["protocol", *CELL, "seed"], sort=False)
        run_means = runs["value"].mean().reset_index()
        means = run_means.assign(domain=ID_MEAN, eval_task="")

        # beside each score in a mixture: `value_alone`, the score of the same task learned alone
        paired = together.merge(
            alone,
            on=["protocol", "model", "eval_task", "method", "seed"],
            suffixes=("", "_alone"),
        )
        gain = paired["value"] - paired["value_alone"]
        with_gains = paired.assign(domain=TRANSFER, value=gain)
        transfer_scores = with_gains[list(seeds.columns)]  # without the columns of `alone`
        return pd.concat([seeds, means, transfer_scores])

    def claim_numbers(self) -> pd.DataFrame:
        """Return the scores and losses of mixtures by seed, and parameter counts, for claims."""
        scores = self.select_mixtures(self.seeds).assign(metric="score")
        losses = self.select_mixtures(self._losses())
        return common.join_claim_numbers(
            scores.rename(columns=SELECTION),
            losses.rename(columns=SELECTION),
            common.parameter_counts(self.recorded_numbers),
        )


def gains(outcomes: MultitaskOutcomes) -> Table:
    """Make a table of mean scores over sets, and of the gains over the baseline.

    It has a row for each mixture and method, in domain and out of domain. A row also shows the set
    with the largest gain, and the gain that the paper reports.
    """
    rows = _gain_rows(outcomes)
    return Table(
        title="Means over tasks and over other sets, and the paper's best gains",
        caption=_gains_caption(outcomes),
        keys={**HEADINGS, "where": "Where", "sets": "Sets", "n": "n", "pairs": "n of Δ"},
        columns=[
            Column(metric="score", value="mean", label="Mean", std="std", marks_best=True),
            Column(
                metric="score",
                value="delta",
                label="Δ, mean",
                interval=("low", "high"),
                signed=True,
            ),
            Column(
                metric="score",
                value="best_delta",
                label="Δ, best set",
                interval=("best_low", "best_high"),
                signed=True,
            ),
            Column(
                metric="score", value="paper", label="Paper, best gain", signed=True, decimals=2
            ),
        ],
        frame=outcomes.order(rows, ["model", "task", "domain", "method"]),
        group=("model", "task", "where"),
        notes={"best_set": "Best set"},
        origins=outcomes.shared_origins,
    )


def _gains_caption(outcomes: MultitaskOutcomes) -> str:
    """Write the caption of :func:`gains`."""
    return (
        "Means over the tasks of a mixture (in domain) and over the sets that the models are not "
        f"trained on (out of domain), ± sample standard deviation. {pairs_note(outcomes)} They "
        "have a 95 % confidence interval (Student's t), not corrected for multiple tests. "
        f"{outcomes.seeds_cover} Best set: the largest of several differences, so an optimistic "
        "number. The paper gives only its largest gains with T5-Base: on six tasks in domain "
        "(N = 32 and k = 8), and with two NLI sets out of domain (sources in paper.csv). Its tasks "
        "and absolute scores are unknown, so the gains cannot be compared with ours. Epoch and "
        "learning rate are chosen by the mean dev score, which is not reported. Bold marks the "
        "best method, without controls."
    )


def _gain_rows(outcomes: MultitaskOutcomes) -> pd.DataFrame:
    """Compute the rows of :func:`gains`, not yet in order.

    Each row has the mean score of a method over several data sets. These are the tasks of a mixture
    (domain ``id``) or their OOD sets (domain ``ood``). A row also has:

    - ``pairs``: the number of seeds of the gain, as text
    - ``sets``: the number of data sets
    - ``best_set`` and columns ``best_…``: the set with the largest gain, and this gain
    - ``paper``: the paper's gain, as a share of 1
    """
    rows = outcomes.select_mixtures(outcomes.rows)
    means = _mean_rows(rows)
    single_sets = rows[rows["domain"].isin(DOMAIN_TITLES)]

    # Four frames to join to the means: seed counts, set counts, best sets and the paper's gains.
    # Each has at most one row for a combination of the keys.
    seed_counts = common.format_counts(means, _KEYS_OF_GAIN, count="pairs")
    sets_of_rows = single_sets.groupby(_KEYS_OF_GAIN, sort=False)
    set_counts = sets_of_rows.size().rename("sets").reset_index()
    best_sets = _best_sets(single_sets)
    published = common.read_published(outcomes.benchmark)
    published_gains = published[[*_KEYS_OF_GAIN, "value"]]

    # the text `pairs` of `seed_counts` replaces the numbers in the column of this name
    means_without_pairs = means.drop(columns="pairs")
    with_seed_counts = common.with_numbers(means_without_pairs, _KEYS_OF_GAIN, seed_counts)
    with_set_counts = common.with_numbers(with_seed_counts, _KEYS_OF_GAIN, set_counts)
    with_best_sets = common.with_numbers(with_set_counts, _KEYS_OF_GAIN, best_sets, prefix="best_")
    with_paper = common.with_numbers(
        with_best_sets, _KEYS_OF_GAIN, published_gains, prefix="paper_"
    )

    where = with_paper["domain"].map(DOMAIN_TITLES)
    gain_in_points = with_paper["paper_value"].astype(float)
    # the baseline has no gain, and so no best set
    best_set = with_paper["best_eval_task_title"].fillna(MISSING)
    return with_paper.assign(where=where, paper=gain_in_points / 100, best_set=best_set)


def _mean_rows(rows: pd.DataFrame) -> pd.DataFrame:
    """Select the means over several data sets, and give them the domain of these sets.

    The domain ``id_mean`` becomes ``id``, and ``ood_mean`` becomes ``ood``. So a mean has the same
    keys as the numbers of single sets, and can be joined with them.

    Args:
        rows: Rows of :attr:`MultitaskOutcomes.rows`, of single sets and of means.
    """
    means = rows[rows["domain"].isin(_MEANS)]
    domain_of_sets = means["domain"].map(_MEANS)
    with_domain_of_sets = means.assign(domain=domain_of_sets)
    return with_domain_of_sets[
        [*_KEYS_OF_GAIN, "mean", "std", "n", "delta", "low", "high", "pairs"]
    ]


def _best_sets(sets: pd.DataFrame) -> pd.DataFrame:
    """Return the set with the largest difference to the baseline, for each row of :func:`gains`.

    Args:
        sets: The results on single sets. The baseline has no difference to itself.
    """
    compared = sets[sets["delta"].notna()]
    differences = compared.groupby(_KEYS_OF_GAIN, sort=False)["delta"]
    index_of_largest = differences.idxmax()
    best = compared.loc[index_of_largest]
    return best[[*_KEYS_OF_GAIN, "delta", "low", "high", "eval_task_title"]]


def transfer(outcomes: MultitaskOutcomes) -> Table:
    """Make a table of the scores of tasks in a mixture minus their scores if learned alone.

    It has a row for each mixture, task and method. A second number is this difference minus that of
    the baseline.
    """
    differences = outcomes.of(TRANSFER, CLEAN)
    keys = [*CELL, "eval_task"]
    # its column `pairs` is text, and replaces the numbers in the column of this name
    seed_counts = common.format_counts(differences, keys, count="pairs")
    # `scope` only repeats the titles of the mixture and the task
    without_counts = differences.drop(columns=["scope", "pairs"])
    rows = common.with_numbers(without_counts, keys, seed_counts)
    run_folders = _folders_of_compared_runs(outcomes, rows)
    return Table(
        title="Learned together against learned alone",
        caption=_transfer_caption(outcomes),
        keys={**HEADINGS, "eval_task_title": "Task", "n": "n", "pairs": "n of Δ"},
        columns=[
            Column(metric="score", value="mean", label="Δ to alone", std="std", signed=True),
            Column(
                metric="score",
                value="delta",
                label=f"Δ minus that of {outcomes.baseline_title}",
                interval=("low", "high"),
                signed=True,
            ),
        ],
        # each row links to the runs that it compares
        frame=rows.assign(**{RUNS_COLUMN: run_folders}),
    )


def _transfer_caption(outcomes: MultitaskOutcomes) -> str:
    """Write the caption of :func:`transfer`."""
    return (
        "Score of a task that is learned with the others minus its score if it is learned alone, "
        "with as many passes over as many rows: mean ± sample standard deviation over the n seeds "
        "that all compared rows have. Epoch and learning rate are chosen by the mean dev score of "
        "the tasks if they are learned together, but by the dev score of the task itself if it is "
        "learned alone. This biases the difference downwards, so a value below 0 does not prove "
        "that the other tasks do harm. The second Δ compares a method with "
        f"{outcomes.baseline_title}, over all seeds that both rows have (n of Δ), with a 95 % "
        "confidence interval (Student's t), not corrected for multiple tests: the paper explains "
        f"its gains with this difference. {outcomes.seeds_cover}"
    )


def _folders_of_compared_runs(outcomes: MultitaskOutcomes, rows: pd.DataFrame) -> pd.Series[str]:
    """Return the folders of the runs that each row of :func:`transfer` compares.

    A text has the folders of one row, separated by blanks. The runs that learn the whole mixture
    come first, then the runs that learn only the row's task.
    """
    # the folders of all runs, by model, method and task; `task` is a mixture or a single task
    folders: dict[tuple[str, str, str], list[str]] = {}
    runs = outcomes.origins[["model", "method", "task", "run_id"]].drop_duplicates()
    for run in runs.itertuples():
        folders_of_cell = folders.setdefault((run.model, run.method, run.task), [])
        folders_of_cell.append(f"{outcomes.name}/{run.run_id}")

    folders_of_rows = []
    for row in rows.itertuples():
        together = folders[row.model, row.method, row.task]
        # a run that learns a single task has the name of this task in place of a mixture's
        alone = folders[row.model, row.method, row.eval_task]
        folders_of_rows.append(" ".join([*together, *alone]))
    # the type is given, because pandas cannot infer it if there are no rows
    return pd.Series(folders_of_rows, rows.index, dtype=str)


TABLES = {
    "gains": gains,
    "sets": ood_table,
    "tests": tests_table,
    "transfer": transfer,
    "cost": cost_table,
}


def present(benchmark: AnyBenchmark, records: Sequence[Record]) -> Presentation:
    """Make the tables and verdicts of a benchmark's finished runs. It has no figures."""
    outcomes = MultitaskOutcomes(benchmark, records)
    return Presentation(
        benchmark=benchmark,
        table_functions=TABLES,
        figure_functions={},  # no figures
        outcomes=outcomes,
        verdicts=list(verdicts(outcomes)),
        note=NOTE,
        optimizer="AdamW, linear decay, no clipping",
    )
