"""Choose hyper-parameters of finished runs, and collect a text benchmark's scores in one frame.

Tables and claims call a protocol the "selection", because it is the rule that selects the
hyper-parameters. They call the protocol ``published`` the "authors' selection". In frames, the
column ``scope`` has the text of :meth:`TextOutcomes.pair_title`: a task, or a pair of tasks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import pandas as pd

from benchmarks.harness.config.benchmark import OOD_MEAN, AnyBenchmark, resolve_methods
from benchmarks.harness.config.method_specs import remove_settings, setting_values
from benchmarks.harness.config.methods import ABLATION, Method
from benchmarks.harness.report.common import (
    SETTING_SEPARATOR,
    Outcomes,
    join_claim_numbers,
    parameter_counts,
    summarize_scores,
)
from benchmarks.harness.results.content import Metrics
from benchmarks.harness.results.records import AS, Record, scores_of, tabulate_numbers
from benchmarks.harness.results.statistics import paired_differences, shared_pairs, with_verdicts
from benchmarks.text.definition import (
    CLEAN,
    ID,
    INFORMATION,
    LOSSES,
    MEMORY,
    MEMORY_RATIO,
    OOD,
    PUBLISHED,
    ROUTING,
    TRAINING,
    TaskEntry,
)
from benchmarks.text.traces import mean_load_change

# A cell is what tables compare. It has runs of several hyper-parameters and seeds.
CELL = ["model", "task", "method"]
HEADINGS = {  # of the columns that identify a row
    "model_title": "Model",
    "task_title": "Trained on",
    "method_title": "Method",
}
CHOICE = ["variant", "learning_rate"]  # the hyper-parameters that are chosen in each cell
PROTOCOL_TITLES = {CLEAN: "clean", PUBLISHED: "authors'"}
SELECTION = {"protocol": "selection"}  # the name of the column of protocols in claim numbers
DOMAIN_TITLES = {ID: "in domain", OOD: "out of domain"}
ARROW = " → "  # between the titles of training set and evaluation set
_MODEL_AND_TASKS = ["model", "task", "eval_task"]
# rows with the same values of these keys are compared
_KEYS_OF_SET = ["protocol", "domain", *_MODEL_AND_TASKS, "scope"]
_KEYS_OF_ROW = [*_KEYS_OF_SET, "method"]
_KEYS_OF_RUN = ["protocol", *CELL, "seed"]


class RowName(NamedTuple):
    """The name of a table row: a method, and its setting if every setting has a row of its own."""

    method: str
    setting: str


def split_name(name: str) -> RowName:
    """Split the name of a table row into its method and its setting; most rows have no setting.

    >>> split_name("emoe_settings|N16")
    RowName(method='emoe_settings', setting='N16')
    """
    method, _, setting = name.partition(SETTING_SEPARATOR)
    return RowName(method, setting)


def shown_deviation(rows: pd.DataFrame) -> pd.Series[float]:
    """Return the standard deviation that tables show for each row.

    It is the sample deviation. Rows of the protocol ``published`` have the population deviation, as
    in the authors' code.
    """
    return rows["std"].where(rows["protocol"] == CLEAN, rows["population_std"])


def selection_scores(records: pd.DataFrame, protocol: str) -> pd.DataFrame:
    """Return the dev score of every run, for the choice of hyper-parameters under a protocol.

    A task with a test split has only clean runs. Under the protocol ``published``, the score of
    such a run is the dev score of its best epoch.
    """
    dev = scores_of(records[records["protocol"] == protocol], "dev")
    if protocol == CLEAN:
        return dev
    # only clean runs of a task with a test split have the part `dev_best`
    return pd.concat([dev, scores_of(records, "dev_best")])


def choices(records: pd.DataFrame, protocol: str) -> pd.DataFrame:
    """Average the dev score of every choice over seeds. A choice is a variant and a learning rate.

    Returns:
        One row per choice of each cell (model, task and method), with the columns :data:`CELL`,
        :data:`CHOICE`, ``mean``, ``std``, ``n``, and ``chosen``. ``chosen`` is True for the best
        choice of the cell. If several choices are equally good, it is True for the first.
    """
    scores = selection_scores(records, protocol)
    by_choice = scores.groupby([*CELL, *CHOICE], sort=False)["value"]
    table = by_choice.agg(mean="mean", std="std", n="count").reset_index()
    # the index of the best choice of each cell; idxmax returns the first of equal means
    best = table.groupby(CELL, sort=False)["mean"].idxmax()
    return table.assign(chosen=table.index.isin(best))


def select_runs(records: pd.DataFrame, protocol: str) -> pd.DataFrame:
    """Return the records of the runs with the hyper-parameters that ``protocol`` chooses.

    A run may be chosen under another protocol than its own. In the result, ``protocol`` is the
    argument in all rows. ``run_protocol`` is the run's own.
    """
    all_choices = choices(records, protocol)
    best_choices = all_choices.loc[all_choices["chosen"], [*CELL, *CHOICE]]
    # A run of the other protocol may have the best hyper-parameters, too. It is left out if it has
    # no dev score under this protocol.
    scored_runs = selection_scores(records, protocol)["run_id"]
    scored = records[records["run_id"].isin(scored_runs)]
    # the inner join keeps the records with the best hyper-parameters of their cell
    selected = scored.merge(best_choices, on=[*CELL, *CHOICE], how="inner")
    # keep the run's own protocol in a new column before its column is overwritten
    with_run_protocol = selected.assign(run_protocol=selected["protocol"])
    return with_run_protocol.assign(protocol=protocol)


def with_own_protocol(chosen: pd.DataFrame) -> pd.DataFrame:
    """Keep the records of runs that were trained under the protocol that chose them.

    A clean run that the protocol ``published`` chooses is left out: apart from its dev scores, it
    has no number of this protocol.

    Args:
        chosen: The records from :func:`select_runs`.
    """
    return chosen[chosen["run_protocol"] == chosen["protocol"]]


def reported_scores(chosen: pd.DataFrame) -> pd.DataFrame:
    """Return the in-domain scores that are reported, a row per protocol, cell and seed.

    They are scores on the reported split. If a task has a test split, the protocol ``published``
    reports the dev score of the best epoch instead.

    Args:
        chosen: The records from :func:`select_runs`.
    """
    test = scores_of(with_own_protocol(chosen), "test")
    dev_best = scores_of(chosen[chosen["protocol"] == PUBLISHED], "dev_best")
    return pd.concat([test, dev_best])


class _LoadChange(NamedTuple):
    """How much the expert loads of a run change over training.

    Attributes:
        experts: The numbers k and N of the experts, such as "4 of 16 experts".
        value: The change, from :func:`.traces.mean_load_change`; nan if it is unknown.
    """

    experts: str
    value: float


class TextOutcomes(Outcomes):
    """The results of one text benchmark's finished runs.

    Args:
        benchmark: The benchmark.
        finished: The finished runs with their metrics.
        records: The numbers of these runs, as in :func:`.records.tabulate_numbers`; None to
            collect them from ``finished``.
        include_ablations: True to add the rows of ablations. Then each setting of a row with
            several variants becomes a separate row ``<row>|<setting>``. If False, a row has only
            its best variant.

    Attributes:
        recorded_numbers: Every number of the shown runs, a row for each, as in
            :func:`.records.tabulate_numbers`.
        chosen: The records of the runs with chosen hyper-parameters, see :func:`select_runs`.
        seeds: The scores of the chosen runs, a row for each protocol, ``domain`` (``id``, ``ood``,
            ``ood_mean``), model, training task, evaluation task, method and seed. The column
            ``scope`` has the titles of both tasks.
        shared: The rows of ``seeds`` that can be compared. For each protocol, domain, model,
            training task and evaluation task, only the seeds that all methods have are kept.
        protocols: The protocols that have scores.
        run_protocols: The protocols under which runs were trained.
        rows: Mean and deviation of the ``n`` scores in ``shared``, from
            :func:`~benchmarks.harness.report.common.summarize_scores`, and the difference to the
            baseline over the seeds that both have, which ``pairs`` counts (nan for the baseline). A
            method without shared seeds has a row without mean, and its ``n`` is 0.
        tests: The paired differences to the baseline in and out of domain, over all seeds that a
            method shares with the baseline. Each row has a verdict. The p values are Holm-corrected
            over all rows.
    """

    benchmark: AnyBenchmark

    def __init__(
        self,
        benchmark: AnyBenchmark,
        finished: Sequence[Record],
        records: pd.DataFrame | None = None,
        *,
        include_ablations: bool = False,
    ) -> None:
        methods = resolve_methods(benchmark.definition)
        shown_methods = []
        for name, method in methods.items():
            # main tables leave out the rows of ablations
            if include_ablations or method.role != ABLATION:
                shown_methods.append(name)
        super().__init__(
            benchmark,
            runs=[record.run for record in finished if record.run.method in shown_methods],
            keys=["method", *_MODEL_AND_TASKS, "protocol"],
            protocol=PROTOCOL_TITLES,
        )
        self._include_ablations = include_ablations
        self._finished = finished
        if records is None:
            records = tabulate_numbers(finished)
        # also has the records of the methods that are not shown, which `ablated` needs
        self._all_records = records

        # each of the following attributes is computed from those before it
        self.recorded_numbers = self._shown_records(shown_methods)
        if include_ablations:
            # each setting gets a row of its own, so the rows need other names than the methods
            self.recorded_numbers = self._name_rows(self.recorded_numbers)
            self.methods = self._methods_by_row_name()
        self.chosen = pd.concat([self._chosen(protocol) for protocol in PROTOCOL_TITLES])
        self.seeds = self._with_scopes(self._collect_seeds())
        self.protocols = _protocols_of(self.seeds)
        self.run_protocols = _protocols_of(self.recorded_numbers)
        self.shared = shared_pairs(
            self.seeds, within=_KEYS_OF_SET, compared=["method"], pair="seed"
        )
        paired = paired_differences(
            self.seeds, cell_columns=_KEYS_OF_ROW, reference={"method": self.baseline}, pair="seed"
        )
        # with one score per seed, the count of scores in `values` repeats the count of seeds
        differences = paired.drop(columns="values")
        self.rows = self._summarise_rows(differences)
        self.tests = self._test_differences(differences)

    @cached_property
    def ablated(self) -> TextOutcomes:
        """Return the outcomes of the same runs, including the rows of ablations."""
        return TextOutcomes(
            self.benchmark, self._finished, self._all_records, include_ablations=True
        )

    def _shown_records(self, methods: Sequence[str]) -> pd.DataFrame:
        """Return the numbers of the shown runs, and of their models after a conversion.

        Only the numbers of ``methods`` are kept.
        """
        run_ids = {run.id for run in self.runs}
        of_runs = self._all_records[self._all_records["run_id"].isin(run_ids)]
        # a shown run may also be evaluated as a method that is not shown, such as an ablation
        records = add_transformed_rows(of_runs)
        return records[records["method"].isin(methods)].reset_index(drop=True)

    def _with_scopes(self, scores: pd.DataFrame) -> pd.DataFrame:
        """Add ``scope``, the title of training and evaluation task, and renumber the rows."""
        pairs = zip(scores["task"], scores["eval_task"], strict=True)
        scopes = [self.pair_title(task, eval_task) for task, eval_task in pairs]
        # the type is given, because pandas cannot infer it if there are no scores
        return scores.reset_index(drop=True).assign(scope=pd.Series(scopes, dtype=str))

    def _name_rows(self, records: pd.DataFrame) -> pd.DataFrame:
        """Replace the method of each record by the name of its table row, see :func:`split_name`.

        Every setting of an ablation, and of a row with several variants, gets a name of its own.

        Args:
            records: The numbers of the shown runs.
        """
        methods = records["method"]
        settings = self._settings_in_names(records)
        has_setting = settings != ""
        names_with_setting = methods + SETTING_SEPARATOR + settings
        # without a setting, the name is only the method
        names = names_with_setting.where(has_setting, methods)
        # Later, the best variant of each row is chosen. Rows of ablations, and rows with a setting
        # in their name, have nothing to choose. So their variant becomes an empty text.
        is_ablation = methods.map(self.role) == ABLATION
        shows_one_setting = is_ablation | has_setting
        variants = records["variant"].mask(shows_one_setting, "")
        return records.assign(method=names, variant=variants)

    def _settings_in_names(self, records: pd.DataFrame) -> pd.Series[str]:
        """Return for each record the setting in the name of its table row, or an empty text.

        A variant is a text with settings of the method, such as ``N16-L22``. The name of an
        ablation contains its variant, without the usual settings of the model. Other names contain
        the variant if the row has several. Rows of models that are converted after training are not
        treated as ablations, because they have the variants of the training.
        """
        usual_by_model = self._usual_settings_by_model(records)
        transformed = self.benchmark.definition.transformed
        rows = records.groupby(["protocol", "model", "task", "method"])
        # for each record: the number of variants in its row
        num_variants = rows["variant"].transform("nunique")

        settings = []
        for record in records.assign(num_variants=num_variants).itertuples():
            is_ablation = self.role(record.method) == ABLATION
            if is_ablation and record.method not in transformed:
                # a model may have only ablations, and so no usual settings
                usual = usual_by_model.get(record.model, set())
                settings.append(remove_settings(record.variant, usual))
            elif record.num_variants > 1:
                settings.append(record.variant)
            else:
                settings.append("")
        return pd.Series(settings, records.index, dtype=str)

    def _usual_settings_by_model(self, records: pd.DataFrame) -> dict[str, set[str]]:
        """Map each model to the settings that all its main rows with experts share.

        An example is ``L22``, if all of them convert layer 22. A model without main rows is left
        out.
        """
        kind_by_method = {name: method.kind for name, method in self.methods.items()}
        is_main = records["method"].map(self.role) != ABLATION
        usual_by_model: dict[str, set[str]] = {}
        for model, main_records in records[is_main].groupby("model", sort=False):
            kinds = main_records["method"].map(kind_by_method)
            with_experts = main_records[kinds != "dense"]
            settings_of_variants = []
            for variant in with_experts["variant"].unique():
                # the variant N16-L22 has the settings N16 and L22
                values = setting_values(variant)
                settings = {f"{letter}{value}" for letter, value in values.items()}
                settings_of_variants.append(settings)
            if settings_of_variants:
                # the settings that occur in every variant
                usual_by_model[str(model)] = set.intersection(*settings_of_variants)
            else:
                # a model with only dense rows has no usual settings
                usual_by_model[str(model)] = set()
        return usual_by_model

    def _methods_by_row_name(self) -> dict[str, Method]:
        """Map the names of methods and of the rows in ``recorded_numbers`` to methods."""
        methods = dict(self.methods)
        for name in self.recorded_numbers["method"].unique():
            methods[name] = self.methods[split_name(name).method]
        return methods

    @property
    def origins(self) -> pd.DataFrame:
        """Return the records of the chosen runs. Tables use them to link their rows to runs."""
        return self.chosen

    @cached_property
    def shared_origins(self) -> pd.DataFrame:
        """Return the records of the chosen runs that have a score in :attr:`shared`."""
        return self.chosen.merge(self.shared[_KEYS_OF_RUN].drop_duplicates(), on=_KEYS_OF_RUN)

    def chosen_runs(self) -> Iterator[tuple[Any, Metrics]]:
        """Yield each chosen run under the first protocol with runs, and its ``metrics.json``.

        A run is a named tuple with ``model``, ``task``, ``method``, ``seed`` and their titles.
        """
        # without runs, there is no first protocol
        if not self.run_protocols:
            return
        first_protocol = self.run_protocols[0]
        metrics_by_id = {record.run.id: record.metrics for record in self._finished}
        records = self.chosen[self.chosen["protocol"] == first_protocol]
        # a run has many records, one for each number
        runs = records.drop_duplicates("run_id")
        for run in self.order(runs, [*CELL, "seed"]).itertuples():
            yield run, metrics_by_id[str(run.run_id)]

    @property
    def _shows_in_domain(self) -> bool:
        """Return True if in-domain numbers are shown.

        A benchmark that evaluates the runs of another shows them only in ablations.
        """
        return self._include_ablations or self.benchmark.evaluated_benchmark is None

    def _chosen(self, protocol: str) -> pd.DataFrame:
        """Return the records of the runs that ``protocol`` chooses."""
        if self.benchmark.evaluated_benchmark is None:
            return select_runs(self.recorded_numbers, protocol)
        # every run of this benchmark evaluates a chosen run, so there is nothing to choose
        of_protocol = self.recorded_numbers[self.recorded_numbers["protocol"] == protocol]
        return of_protocol.assign(run_protocol=protocol)

    def _collect_seeds(self) -> pd.DataFrame:
        """Return the scores of the chosen runs under each protocol, a row for each set and seed.

        A score is in domain, on one OOD set, or a mean over the OOD sets.

        Returns:
            The columns ``protocol``, ``domain``, ``model``, ``task``, ``eval_task``, ``method``,
            ``seed`` and ``value``.
        """
        scores = []
        if self._shows_in_domain:
            scores.append(reported_scores(self.chosen).assign(domain=ID))
        records = with_own_protocol(self.chosen)
        for domain in (OOD, OOD_MEAN):
            scores.append(scores_of(records, domain).assign(domain=domain))
        columns = ["protocol", "domain", *_MODEL_AND_TASKS, "method", "seed", "value"]
        seeds = pd.concat(scores)[columns]
        # a stable sort keeps the order of the rows of a protocol
        return seeds.sort_values("protocol", kind="stable")

    def _summarise_rows(self, differences: pd.DataFrame) -> pd.DataFrame:
        """Summarise the scores of each row in ``shared``, and add its difference to the baseline.

        ``n`` counts the seeds of the scores, and ``pairs`` those of the difference.
        """
        summaries = summarize_scores(self.shared, cell_columns=_KEYS_OF_ROW)
        # the summaries have a column `n`, too
        renamed = differences.rename(columns={"n": "pairs"}).drop(columns="p")
        # the left joins keep rows without shared seeds, and the baseline, which has no difference
        all_rows = self.seeds[_KEYS_OF_ROW].drop_duplicates()
        with_scores = all_rows.merge(summaries, how="left", on=_KEYS_OF_ROW)
        with_differences = with_scores.merge(renamed, how="left", on=_KEYS_OF_ROW)
        rows = with_differences.fillna({"n": 0}).astype({"n": int})
        return self._by_set(rows)

    def _test_differences(self, differences: pd.DataFrame) -> pd.DataFrame:
        """Test the differences to the baseline on single sets, in domain and out of domain.

        The p values are Holm-corrected over all rows.
        """
        of_sets = differences[differences["domain"].isin([ID, OOD])]
        return self._by_set(with_verdicts(of_sets))

    def _by_set(self, rows: pd.DataFrame) -> pd.DataFrame:
        """Group the rows that are compared, sort each group by method, and add titles.

        The groups keep the order in which they occur.
        """
        # number the groups in the order in which they occur
        numbered = rows.assign(set_number=rows.groupby(_KEYS_OF_SET, sort=False).ngroup())
        return self.order(numbered, ["set_number", "method"]).drop(columns="set_number")

    def of(self, domain: str, protocol: str) -> pd.DataFrame:
        """Return the statistics in :attr:`rows` that are of one domain and one protocol."""
        has_domain = self.rows["domain"] == domain
        has_protocol = self.rows["protocol"] == protocol
        return self.rows[has_domain & has_protocol]

    def claim_numbers(self) -> pd.DataFrame:
        """Return the numbers that claims may compare. Most of them are of a single seed.

        These are scores, losses, the information in the choice of an expert, how expert loads
        change over training, ratios of memory, and parameter counts. They include the rows of
        ablations. The columns are those of
        :func:`~benchmarks.harness.report.common.join_claim_numbers`.
        """
        joined = join_claim_numbers(
            self.seeds.assign(metric="score").rename(columns=SELECTION),
            self._losses().rename(columns=SELECTION),
            self._information().rename(columns=SELECTION),
            self._load_changes().rename(columns=SELECTION),
            self._memory_ratios(),
            parameter_counts(self.recorded_numbers),
        )
        row_names = [split_name(name) for name in joined["method"]]
        numbers = joined.assign(
            method=[row_name.method for row_name in row_names],
            setting=[row_name.setting for row_name in row_names],
        )
        if self._include_ablations or not self.benchmark.definition.ablations:
            return numbers

        # Add what only ablations have: methods, settings, and the domain `id` if this benchmark
        # evaluates the runs of another. Main rows also occur in ablations. Their copies are left
        # out: an index of the three columns finds the combinations that `numbers` already has.
        with_ablations = self.ablated.claim_numbers()
        keys = ["method", "setting", "domain"]
        main_keys = pd.MultiIndex.from_frame(numbers[keys])
        is_copy = pd.MultiIndex.from_frame(with_ablations[keys]).isin(main_keys)
        only_in_ablations = with_ablations[~is_copy]
        return pd.concat([numbers, only_in_ablations], ignore_index=True)

    def _losses(self) -> pd.DataFrame:
        """Return the losses of the chosen runs in domain, and their means over the OOD sets.

        The losses are the metrics :data:`.definition.LOSSES`, in nat. A regression is left out,
        because its loss, the squared error, has another unit. A set whose classes are merged has no
        loss, so the mean leaves it out. The loss of a run that diverged is nan.

        The columns are ``metric`` and those of :attr:`seeds`, without ``scope``.
        """
        records = with_own_protocol(self.chosen)
        tasks: Mapping[str, TaskEntry] = self.benchmark.tasks
        regressions = [name for name, task in tasks.items() if not task.labels]
        is_loss = records["metric"].isin(LOSSES) & ~records["eval_task"].isin(regressions)
        losses = records[is_loss]
        columns = [*_KEYS_OF_RUN, "eval_task", "domain", "metric", "value"]
        frames = []
        if self._shows_in_domain:
            in_domain = losses[losses["part"] == "test"].assign(domain=ID)
            frames.append(in_domain[columns])

        on_ood_sets = losses[losses["part"] == OOD]
        by_run = on_ood_sets.groupby([*_KEYS_OF_RUN, "metric"], sort=False)["value"]
        # a run that diverged on one set has no mean
        means = by_run.mean(skipna=False).reset_index()
        frames.append(means.assign(domain=OOD_MEAN, eval_task="")[columns])
        return pd.concat(frames)

    def _information(self) -> pd.DataFrame:
        """Return the mutual information of expert and class, and of expert and data set, in bits.

        The rows are those of the chosen runs that evaluated several sets with experts.
        """
        records = with_own_protocol(self.chosen)
        information = records[records["metric"].isin(INFORMATION)]
        return information.assign(domain=ROUTING)

    def _load_changes(self) -> pd.DataFrame:
        """Return how much expert loads change between windows of training, for each chosen run.

        The number is that of :func:`.traces.mean_load_change`. It depends on N and k, because it
        grows if a window has fewer choices. So ``eval_task`` contains N and k: claims compare only
        runs with the same ``eval_task``.
        """
        change_by_run_and_method: dict[tuple[str, str], _LoadChange] = {}
        for record in self._finished:
            routing = record.metrics.routing
            if routing is None or routing.windows is None:
                continue
            run = record.run
            experts = f"{run.config['top_k']} of {run.config['num_experts']} experts"
            value = mean_load_change(routing.windows)
            change_by_run_and_method[run.id, run.method] = _LoadChange(experts, value)

        records = with_own_protocol(self.chosen)
        # A run with a conversion occurs twice here: as the method that was trained, and as the
        # method after the conversion. Only the method that was trained has a load change.
        runs = records[[*_KEYS_OF_RUN, "run_id"]].drop_duplicates()
        unknown = _LoadChange(experts="", value=math.nan)
        changes = []
        for row in runs.itertuples():
            run_and_method = (row.run_id, split_name(row.method).method)
            changes.append(change_by_run_and_method.get(run_and_method, unknown))
        # the types are given, because pandas cannot infer them if there are no runs
        with_changes = runs.assign(
            domain=TRAINING,
            metric="load_change",
            eval_task=pd.Series([change.experts for change in changes], runs.index, dtype=str),
            value=pd.Series([change.value for change in changes], runs.index, dtype=float),
        )
        # a run with a single window has no change either
        return with_changes[with_changes["value"].notna()]

    def _memory_ratios(self) -> pd.DataFrame:
        """Return the peak memory of each method, divided by the baseline's, for runs on a GPU.

        A run is compared with the baseline's run of the same model, task, protocol, learning rate
        and seed. The numbers are the median, the lowest and the highest ratio of each method, model
        and task. Runs on a CPU are left out: there the peak is that of the whole process, mostly of
        libraries and the evaluation.
        """
        runs_on_gpu = []
        for record in self._finished:
            if record.metrics.environment.gpus:
                runs_on_gpu.append(record.run.id)
        numbers = self.recorded_numbers
        is_peak = numbers["metric"].eq("peak_memory_mb") & numbers["run_id"].isin(runs_on_gpu)
        peaks = numbers[is_peak]
        # put the peak of the baseline's run beside the peak of each run, as `value_baseline`
        shared_keys = ["model", "task", "protocol", "learning_rate", "seed"]
        baseline_peaks = peaks.loc[peaks["method"] == self.baseline, [*shared_keys, "value"]]
        paired = peaks.merge(baseline_peaks, on=shared_keys, suffixes=("", "_baseline"))
        ratios = paired.assign(ratio=paired["value"] / paired["value_baseline"])

        by_cell = ratios.groupby(CELL, sort=False)["ratio"]
        values_by_metric = {
            MEMORY_RATIO: by_cell.median(),
            f"{MEMORY_RATIO}_low": by_cell.min(),
            f"{MEMORY_RATIO}_high": by_cell.max(),
        }
        rows = []
        for metric, values in values_by_metric.items():
            of_metric = values.rename("value").reset_index()
            rows.append(of_metric.assign(domain=MEMORY, metric=metric))
        return pd.concat(rows)

    def with_titles(self, frame: pd.DataFrame) -> pd.DataFrame:
        """Add the columns of titles; the titles of protocols are in the column ``selection``."""
        return super().with_titles(frame).rename(columns={"protocol_title": "selection"})

    def pair_title(self, task: str, eval_task: str) -> str:
        """Return the titles of a training and an evaluation task, such as ``SST-2 → IMDB``.

        If both are the same task, or ``eval_task`` is empty, return one title.
        """
        trained = self.title("task", task)
        # a mean over sets has no evaluation task
        if eval_task in ("", task):
            return trained
        return trained + ARROW + self.title("task", eval_task)


def _protocols_of(frame: pd.DataFrame) -> list[str]:
    """List the protocols that a frame contains, in the order of :data:`PROTOCOL_TITLES`."""
    contained = set(frame["protocol"])
    return [protocol for protocol in PROTOCOL_TITLES if protocol in contained]


def add_transformed_rows(records: pd.DataFrame) -> pd.DataFrame:
    """Give the numbers of models that were converted after training to their new method.

    A run evaluates the model that it trained, and may then convert it to another method and
    evaluate it again. In ``records``, the second evaluation still has the trained method, and a
    part such as "test as emoe". In the result, it has the method "emoe" and the part "test".

    The new method also gets a copy of the run's dev scores, for the choice of hyper-parameters.

    Args:
        records: The numbers of runs, a row for each, as in :func:`.records.tabulate_numbers`.

    Returns:
        The numbers of the trained models, the copied dev scores, and the numbers of the converted
        models.
    """
    is_converted = pd.Series([AS in part for part in records["part"]], records.index, dtype=bool)
    trained = records[~is_converted]
    converted = records[is_converted]
    parts = []
    new_methods = []
    for part_and_method in converted["part"]:
        part, _, method = part_and_method.partition(AS)
        parts.append(part)
        new_methods.append(method)
    # the type is given, because pandas cannot infer it if no model was converted
    renamed = converted.assign(
        part=pd.Series(parts, converted.index, dtype=str),
        method=pd.Series(new_methods, converted.index, dtype=str),
    )

    # a run has many numbers, but was converted to one method, so it has one row here
    new_method_of_run = renamed[["run_id", "method"]].drop_duplicates()
    dev = trained[trained["part"] == "dev"]
    # the join gives each copy its new method, and leaves out runs without a conversion
    copied_dev = dev.drop(columns="method").merge(new_method_of_run, on="run_id")
    return pd.concat([trained, copied_dev, renamed], ignore_index=True)
