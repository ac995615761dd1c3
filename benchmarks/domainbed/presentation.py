"""Present domain generalisation: tables, figures and verdicts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.domainbed.figures import SET_FIGURES
from benchmarks.domainbed.outcomes import CELL, DomainOutcomes
from benchmarks.harness.config.benchmark import AnyBenchmark
from benchmarks.harness.config.runs import Run
from benchmarks.harness.report import common
from benchmarks.harness.report.presentation import Presentation
from benchmarks.harness.report.table import Column, Table
from benchmarks.harness.results.records import Record
from benchmarks.harness.results.statistics import PERMUTATIONS

# the image sets of the paper's average, and the name of the average in the column ``task``
FOUR = ("pacs", "vlcs", "office_home", "terra_incognita")
_AVERAGE_NAME = "average of four"
# the columns that sort the rows of a table, for several image sets and for one
_ORDER = ["model", "selection", "task", "method"]
_ORDER_OF_SET = ["model", "selection", "method"]
# the headings of the columns that name a row, for several image sets and for one
_HEADINGS = {
    "model_title": "Model",
    "selection_title": "Selection",
    "task_title": "Set",
    "method_title": "Method",
}
_HEADINGS_OF_SET = {
    "model_title": "Model",
    "selection_title": "Selection",
    "method_title": "Method",
}
_SELECTIONS_NOTE = (
    "Selections are DomainBed's. Training-domain validation: the step with the highest mean "
    "accuracy on held-out images of the training environments. Leave-one-domain-out: the step with "
    "the highest mean accuracy over the other environments, each measured in a run that also holds "
    "out that environment; only if such runs exist. Test-domain validation (an oracle): the run "
    "whose last step is best on images of the test environment."
)
# the note for each value of training.val_augment
_VALIDATION_NOTES = {
    True: (
        "Images of training environments are augmented for validation too, as DomainBed and the "
        "paper's authors do."
    ),
    False: (
        "Images of training environments are not augmented for validation, unlike in DomainBed and "
        "the paper."
    ),
}
_ERROR_NOTE = (
    "± is DomainBed's: the population standard deviation over trials, divided by the root of their "
    "number"
)

# what intervals over trials cover, for captions
_TRIALS_COVER = (
    "Intervals over trials cover what a trial draws: the split of the images, the new head and the "
    "order of the images."
)


def results(outcomes: DomainOutcomes, data_set: str) -> Table:
    """Make the table of accuracies on one image set in DomainBed's layout.

    It has a row for each model, selection and method. It has a column for each held-out
    environment, their average, and the difference to the baseline.
    """
    accuracies, columns = _with_accuracies(outcomes, data_set)
    differences = outcomes.differences[[*CELL, "delta", "low", "high"]]
    with_differences = common.with_numbers(accuracies, on=CELL, numbers=differences)
    delta = Column(
        "accuracy",
        "delta",
        f"Δ to {outcomes.baseline_title}",
        interval=("low", "high"),
        signed=True,
    )
    return Table(
        title=f"{outcomes.title('task', data_set)}: accuracy by held-out environment",
        caption=_results_caption(outcomes, data_set),
        keys={**_HEADINGS_OF_SET, "n": "n"},
        columns=[*columns, delta],
        frame=outcomes.order(with_differences, _ORDER_OF_SET),
        group=("model", "selection"),
        origins=outcomes.shared_origins,
    )


def _with_accuracies(outcomes: DomainOutcomes, data_set: str) -> tuple[pd.DataFrame, list[Column]]:
    """Average the accuracies on each held-out environment of an image set over trials.

    Returns:
        - a frame with a row for each selection, model and method: the mean accuracies, their
          errors, and the number of trials ``n``.
        - the printed columns: one for each held-out environment, and their average.
    """
    cells = outcomes.shared[outcomes.shared["task"] == data_set]
    # the accuracies of all trials, for each row of the table and each held-out environment
    accuracies = cells.groupby([*CELL, "eval_task"], sort=False)["value"]
    means = accuracies.agg(mean="mean", error=_domainbed_error).reset_index()

    # the rows of the table, with the number of trials
    trial_counts = cells.groupby(CELL, sort=False).agg(n=("seed", "nunique")).reset_index()
    # the printed environments: those that runs hold out, in DomainBed's order
    held_out = set(cells["eval_task"])
    headings = {}
    for env_name in outcomes.environments(data_set):
        if env_name in held_out:
            headings[env_name] = outcomes.env_title(data_set, env_name)
    with_envs, env_columns = common.spread_over_columns(
        trial_counts,
        on=CELL,
        numbers=means,
        name_column="eval_task",
        headings=headings,
        metric="accuracy",
        std="error",
    )
    return common.with_average(with_envs, env_columns, metric="accuracy")


def _results_caption(outcomes: DomainOutcomes, data_set: str) -> str:
    """Return the caption of :func:`results`."""
    return _sentences(
        "Accuracy on the in split of the held-out environment (80 % of its images"
        f"{_limit_note(outcomes, data_set)}). Mean over n trials. {_ERROR_NOTE}.",
        outcomes.shared_note,
        _held_out_note(outcomes, [data_set]),
        "A dash: the row lacks the environment. The average needs a row with all environments.",
        _selections_note(outcomes, [data_set]),
        _experts_note(outcomes, [data_set]),
        "Δ is paired by trial, with a 95 % confidence interval (Student's t), not corrected "
        f"for multiple tests. {_TRIALS_COVER} Bold marks the best method, without controls.",
    )


def choices(outcomes: DomainOutcomes, data_set: str) -> Table:
    """Make the table of the steps and hyper-parameters that selections chose on one image set.

    It has a row for each model, selection, method, held-out environment and trial.
    """
    of_set = outcomes.cells[outcomes.cells["task"] == data_set]
    ordered = outcomes.order(of_set, _ORDER_OF_SET)
    env_titles = [outcomes.env_title(data_set, env_name) for env_name in ordered["eval_task"]]
    # hparams_seed 0 stands for the default hyper-parameters
    draw_titles = ordered["hparams_seed"].astype(str).replace("0", "defaults")
    frame = ordered.assign(eval_task_title=env_titles, draw=draw_titles)
    # the columns that name a row, with their headings
    keys = {
        **_HEADINGS_OF_SET,
        "eval_task_title": "Held out",
        "seed": "Trial",
        "step": "Step",
        "draw": "Draw",
    }
    # the variant of a run is empty if its method has the usual settings
    if frame["variant"].any():
        keys["variant"] = "Variant"
    return Table(
        title=f"{outcomes.title('task', data_set)}: choices",
        caption=_choices_caption(outcomes, data_set),
        keys=keys,
        columns=[
            Column("accuracy", "chosen_by", "Chosen by"),
            Column("accuracy", "value", "Accuracy"),
        ],
        frame=frame,
        # without the seed, a row of one trial is linked to the runs of all trials
        origins=outcomes.recorded_numbers.drop(columns="seed"),
    )


def _choices_caption(outcomes: DomainOutcomes, data_set: str) -> str:
    """Return the caption of :func:`choices`."""
    return _sentences(
        "Step and draw of hyper-parameters (DomainBed's hparams_seed) that each selection chose, "
        "by held-out environment and trial; the selection's value, and the reported accuracy on "
        "the held-out environment.",
        _selections_note(outcomes, [data_set]),
    )


def summary(outcomes: DomainOutcomes) -> Table:
    """Make DomainBed's summary table: a column for each image set, and their average.

    It has a row for each selection, model and method. With one image set, there is no average.
    """
    keys = ["selection", "model", "method"]
    # the means of all trials, for each selection, model, image set and method
    trial_means = outcomes.trial_means()
    by_cell = trial_means.groupby(CELL, sort=False)
    # size also counts trials whose mean is nan (printed as a dash), as the table of each set does
    means = by_cell.agg(mean="mean", error=_domainbed_error, n="size").reset_index()
    numbers = means[["task", *keys, "mean", "error"]]

    # a row for each selection, model and method, and a column for each image set
    counts = common.format_counts(means, keys)
    headings = {data_set: outcomes.title("task", data_set) for data_set in outcomes.sets}
    with_sets, set_columns = common.spread_over_columns(
        counts,
        on=keys,
        numbers=numbers,
        name_column="task",
        headings=headings,
        metric="accuracy",
        std="error",
    )
    if len(set_columns) > 1:
        frame, columns = common.with_average(with_sets, set_columns, metric="accuracy")
    else:
        # one set needs no average
        frame = with_sets
        columns = set_columns
    return Table(
        title="Accuracy on held-out environments, by set",
        caption=_summary_caption(outcomes),
        keys={**_HEADINGS_OF_SET, "n": "n"},
        columns=columns,
        frame=outcomes.order(frame, _ORDER_OF_SET),
        group=("model", "selection"),
        origins=outcomes.shared_origins,
    )


def _summary_caption(outcomes: DomainOutcomes) -> str:
    """Return the caption of :func:`summary`."""
    return _sentences(
        "Mean over the held-out environments of a trial, then over n trials.",
        f"{_ERROR_NOTE}.",
        outcomes.shared_note,
        _held_out_note(outcomes, outcomes.sets),
        "A dash: the row lacks the set, or a held-out environment of it that another row has. The "
        "average needs a row with all sets.",
        _selections_note(outcomes, outcomes.sets),
        _experts_note(outcomes, outcomes.sets),
    )


def tests_table(outcomes: DomainOutcomes) -> Table:
    """Make the table of significance tests against the baseline, paired by trial."""
    baseline = outcomes.baseline_title
    return common.tests_table(
        against=baseline,
        caption=f"Differences to {baseline} of the mean over held-out environments, paired by "
        "trial, over all n trials of both rows. Other tables use the trials that all their rows "
        f"share. {_TRIALS_COVER}",
        keys={**_HEADINGS, "n": "n"},
        metric="accuracy",
        frame=outcomes.order(outcomes.tests, _ORDER),
    )


_MEASURED_ON = (
    "the out splits of all environments at the last step. Mutual information with class "
    "(environment): that of a token's expert and its image's class (environment). By chance: its "
    f"mean and 95 % quantile over {PERMUTATIONS} shuffles. Classes are shuffled among the images "
    "of an environment, and environments among the images of a class. Only values above the "
    "quantile are meaningful"
)


def cost(outcomes: DomainOutcomes) -> Table:
    """Make the table of costs and expert use.

    It includes the mutual information of experts with class and environment.
    """
    cell = ["model", "task", "method"]
    cells = outcomes.recorded_numbers[cell].drop_duplicates()
    return common.cost_table(
        keys={"model_title": "Model", "task_title": "Set", "method_title": "Method"},
        frame=outcomes.order(cells, cell),
        cell_columns=cell,
        numbers=outcomes.recorded_numbers,
        averaged="Means over all runs; step times exclude reading and augmenting images",
        measured_on=_MEASURED_ON,
    )


_PAPER_CAPTION = (
    "Accuracy, mean over the environments of a set, each held out in turn; the average of four is "
    "over PACS, VLCS, OfficeHome and TerraIncognita. Status: published (from the authors' "
    "notebooks, or quoted), inferred (published, but the selection or the row is our "
    "interpretation). A dash: not run by this suite, or unavailable. Results with another model "
    "and other data neither confirm nor refute a published value."
)


def paper_table(outcomes: DomainOutcomes) -> Table:
    """Make the table of our averages over environments and the published ones."""
    published = common.read_published(outcomes.benchmark)
    # published values are in percent, ours are shares
    shares = published.assign(value=published["value"] / 100)
    means = common.our_means(outcomes.complete_trial_means(), CELL)
    # keep only the image sets that the paper has
    comparable = means[means["task"].isin(published["task"])]
    ours = pd.concat([comparable, _averages_of_four(outcomes)])

    # an outer join keeps the rows that only the paper has, or only we have
    keys = ["model", "task", "method", "selection"]
    both = shares.merge(ours, on=keys, how="outer", sort=False)
    compared = both.assign(difference=both["ours"] - both["value"])
    return common.published_table(
        title="Published averages beside ours",
        caption=_sentences(
            _PAPER_CAPTION,
            outcomes.shared_note,
            _experts_note(outcomes, outcomes.sets),
            _TRIALS_COVER,
        ),
        keys={
            "selection_title": "Selection",
            "task_title": "Set",
            "model_title": "Model",
            "method_title": "Method",
        },
        frame=outcomes.order(compared, ["selection", "task", "model", "method"]),
        origins=outcomes.shared_origins,
    )


def _averages_of_four(outcomes: DomainOutcomes) -> pd.DataFrame:
    """Average our accuracies over the paper's four image sets, then over trials.

    Only trials with all four image sets are used.

    Returns:
        A row for each selection, model and method: the mean ``ours``, its 95 % interval ``low`` and
        ``high``, and the number of trials ``n``. The column ``task`` has the name of the average.
    """
    # one accuracy for each selection, model, image set, method and trial
    accuracies = outcomes.complete_trial_means()
    is_of_four = accuracies.index.get_level_values("task").isin(FOUR)
    keys = ["selection", "model", "method"]
    by_trial = accuracies[is_of_four].groupby([*keys, "seed"], sort=False)
    num_sets = by_trial.count()
    average_by_trial = by_trial.mean()
    complete_trials = average_by_trial[num_sets == len(FOUR)]
    return common.our_means(complete_trials, keys).assign(task=_AVERAGE_NAME)


def verdicts(outcomes: DomainOutcomes) -> Iterator[str]:
    """Yield a sentence for each model, image set and selection.

    It has the difference of each method to the baseline. Controls are omitted.
    """
    ordered = outcomes.order(outcomes.tests, _ORDER)
    has_method_role = ordered["method"].map(outcomes.role) == "method"
    compared = ordered[has_method_role]
    titles = ["model_title", "selection_title", "task_title"]
    for (model, selection, image_set), rows in compared.groupby(titles, sort=False):
        differences = []
        for row in rows.itertuples():
            difference = common.difference_text(row)
            differences.append(f"{row.method_title} {difference} (n = {row.n})")
        yield f"{model}, {image_set}, {selection}: {'; '.join(differences)}."


TABLES = {"summary": summary, "tests": tests_table, "cost": cost, "paper": paper_table}
SET_TABLES = {"results": results, "choices": choices}


def _runs_on(outcomes: DomainOutcomes, data_sets: list[str]) -> list[Run]:
    """Return the runs on some image sets."""
    return [run for run in outcomes.runs if run.task in data_sets]


def _sentences(*texts: str) -> str:
    """Join texts with spaces. Empty texts are left out."""
    return " ".join(text for text in texts if text)


def _limit_note(outcomes: DomainOutcomes, data_set: str) -> str:
    """Return a clause on the number of evaluated images (``eval_rows``); empty if all are used."""
    limits: set[int] = set()
    for run in _runs_on(outcomes, [data_set]):
        limit = outcomes.specs[run.id].training.eval_rows
        if limit is not None:
            limits.add(limit)
    # sorted, because the order of a set is not defined
    counts = " or ".join(str(limit) for limit in sorted(limits))
    if not counts:
        return ""
    return f", of which {counts} are used"


def _selections_note(outcomes: DomainOutcomes, data_sets: list[str]) -> str:
    """Return sentences on the selections, and on the augmentation of validation images, if any."""
    # True if a run augments validation images, False if a run does not; maybe both
    val_augments = set()
    for run in _runs_on(outcomes, data_sets):
        spec = outcomes.specs[run.id]
        # MNIST's digits are never augmented
        if spec.hparams.data_augmentation and not spec.task.source.mnist:
            val_augments.add(spec.training.val_augment)
    # in the order of _VALIDATION_NOTES
    notes = [note for augments, note in _VALIDATION_NOTES.items() if augments in val_augments]
    return _sentences(_SELECTIONS_NOTE, *notes)


def _experts_note(outcomes: DomainOutcomes, data_sets: list[str]) -> str:
    """Return a sentence on the experts per token and the converted blocks of each method.

    The text is empty if no method has experts.
    """
    # the distinct settings of a method's runs, by title of the method
    settings_by_title: dict[str, list[str]] = {}
    for run in _runs_on(outcomes, data_sets):
        if not run.config:  # a dense model
            continue
        settings = settings_by_title.setdefault(outcomes.title("method", run.method), [])
        setting = _experts_setting(run.config)
        if setting not in settings:
            settings.append(setting)
    if not settings_by_title:
        return ""
    methods = []
    for title, settings in settings_by_title.items():
        methods.append(f"{title} {' or '.join(settings)}")
    return f"Experts per token, and blocks with experts: {'; '.join(methods)}."


def _experts_setting(config: Mapping[str, Any]) -> str:
    """Describe the experts of a run.

    In ``2 of 8 in 8, 10``, each token uses 2 of 8 experts in the blocks 8 and 10.
    """
    layers = config["layers"]
    # numbers, or a word such as "all"
    if isinstance(layers, list):
        layers = ", ".join(str(layer) for layer in layers)
    return f"{config['top_k']} of {config['num_experts']} in {layers}"


def _held_out_note(outcomes: DomainOutcomes, data_sets: list[str]) -> str:
    """Return a sentence for each image set of which only some environments were held out."""
    sentences = []
    for data_set in data_sets:
        num_held_out = outcomes.num_held_out(data_set)
        num_environments = len(outcomes.environments(data_set))
        if num_held_out < num_environments:
            title = outcomes.title("task", data_set)
            sentences.append(
                f"Of {title} {num_held_out} of {num_environments} environments were held out."
            )
    return _sentences(*sentences)


def _domainbed_error(values: pd.Series[float]) -> float:
    """Return DomainBed's ±: the population deviation, divided by the root of the count of values.

    There is one value for each trial. The result is nan for a single trial.
    """
    if len(values) < 2:
        return math.nan
    # pandas' std would divide by n - 1
    deviation = np.std(list(values))
    return float(deviation / math.sqrt(len(values)))


_NOTE = (
    "Differences are in points: means over held-out environments, then over paired trials, with "
    "95 % confidence intervals. Verdicts use paired t-tests at 5 %, corrected with Holm's "
    "procedure over all rows of the table of tests. With two trials a test has only two "
    "differences: read it as a hint."
)


def present(benchmark: AnyBenchmark, records: Sequence[Record]) -> Presentation:
    """Make the tables, figures and verdicts of finished runs.

    Each image set has its own presentation, with its own tables and figures.
    """
    outcomes = DomainOutcomes(benchmark, records)
    presentations_of_sets = {}
    for data_set in outcomes.sets:
        presentations_of_sets[data_set] = Presentation(
            benchmark=benchmark,
            table_functions=SET_TABLES,
            figure_functions=SET_FIGURES,
            outcomes=outcomes,
            data_set=data_set,
        )
    return Presentation(
        benchmark=benchmark,
        table_functions=TABLES,
        figure_functions={},
        outcomes=outcomes,
        verdicts=list(verdicts(outcomes)),
        note=_NOTE,
        optimizer="Adam, constant rate, no clipping",
        presentations_of_sets=presentations_of_sets,
    )
