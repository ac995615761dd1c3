"""Make the tables and figures of ablations: differences to the baseline and to the paper."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.harness.config.method_specs import setting_text, setting_values
from benchmarks.harness.config.methods import ABLATION, CONTROL
from benchmarks.harness.config.yaml import NUMBER_COLUMNS
from benchmarks.harness.report import plots
from benchmarks.harness.report.common import (
    OTHER_MODELS,
    SEEDS_COVER,
    SETTING_SEPARATOR,
    cell_means,
    name_or_count,
    published_delta,
    read_published,
    summarize_scores,
    with_numbers,
)
from benchmarks.harness.report.presentation import Figure
from benchmarks.harness.report.style import MethodStyle
from benchmarks.harness.report.table import MISSING, Column, Table
from benchmarks.harness.results.statistics import (
    Difference,
    paired_differences,
    shared_pairs,
    with_verdicts,
)
from benchmarks.text.definition import ABLATION_COLUMNS, ID, OOD, PUBLISHED, Ablation
from benchmarks.text.outcomes import ARROW, DOMAIN_TITLES, TextOutcomes, shown_deviation, split_name

_AVERAGE_OF = "average of "
_MAIN_MARK = " (main)"  # ends the title of a main row, which may have the setting of another row
_MAIN_ROWS = "Rows with (main), if any, are also in the main tables."
# Rows with the same values in these columns form a group, and are compared with each other. A scope
# is a task, a pair of tasks, or an average.
_KEYS_OF_GROUP = ["protocol", "domain", "model", "scope"]
_KEYS_OF_ROW = [*_KEYS_OF_GROUP, "method"]


def ablation_rows(outcomes: TextOutcomes, ablation: Ablation) -> pd.DataFrame:
    """Compute the numbers of an ablation, a row per protocol, domain, model, scope and method.

    A scope is a task, a pair of tasks (training and evaluation), or an average. Rows that differ
    only in the method are compared with each other.

    Returns:
        A frame with these columns:

        - the five keys and their titles
        - the columns of :func:`_tested_rows`
        - ``active_neurons``: the mean share over runs
        - ``paper``, ``paper_delta``, ``status`` and ``source``: the paper's numbers
        - ``is_ours``: False for rows that only the paper has
        - ``is_average``: True if the scope is an average
    """
    # `ablated` has a row for every setting of a method; `outcomes` has only the best setting
    ablated = outcomes.ablated
    tested = _tested_rows(ablated, ablation)

    # Add the active neurons, a mean over runs. Runs on other tasks than those of the ablation are
    # left out, because a main row may have other settings there.
    records = _records_of_ablated_tasks(ablated, ablation, ablated.recorded_numbers)
    neurons = cell_means(records, cell_columns=["model", "method"], metrics=["active_neurons"])
    ours = with_numbers(tested, on=["model", "method"], numbers=neurons)

    with_paper = _join_paper(ablated, ablation, ours)
    in_order = _sort_rows(ablation, with_paper)
    titled = ablated.with_titles(in_order)
    main_settings = _main_settings(ablated, records)
    return _add_titles(ablated, titled, main_settings)


def _tested_rows(outcomes: TextOutcomes, ablation: Ablation) -> pd.DataFrame:
    """Compute the mean score of each row of an ablation, and test its difference.

    Returns:
        A frame with the five keys of a row and these columns:

        - ``mean`` and ``std`` over the ``n`` seeds that all compared rows have; without such seeds,
          ``n`` is 0 and there is no mean
        - ``delta``, ``low``, ``high``, ``p``, ``p_holm`` and ``verdict``: the paired difference to
          the baseline, or to the row above if the ablation has ``steps``, over ``pairs`` seeds
    """
    seeds = _compared_seeds(outcomes, ablation)
    summaries = _summarise(seeds)
    if ablation.steps:
        differences = _differences_to_row_above(ablation, seeds)
    else:
        differences = _differences_to(outcomes.baseline, seeds)
    # the left join keeps the rows without a difference, such as the baseline
    with_differences = summaries.merge(differences, on=_KEYS_OF_ROW, how="left")
    return with_verdicts(with_differences, family=_KEYS_OF_GROUP)


def _row_names(outcomes: TextOutcomes, ablation: Ablation) -> list[str]:
    """List the names of an ablation's rows. A method with several settings has a name for each."""
    return [name for name in outcomes.methods if split_name(name).method in ablation.rows]


def _ablated_names(outcomes: TextOutcomes, ablation: Ablation) -> list[str]:
    """List the names of an ablation's rows that are a setting of a method, ablations or controls.

    The other rows are main rows, which main tables show, too.
    """
    ablated_names = []
    for name in _row_names(outcomes, ablation):
        has_setting = split_name(name).setting != ""
        if has_setting or outcomes.role(name) in (ABLATION, CONTROL):
            ablated_names.append(name)
    return ablated_names


def _records_of_ablated_tasks(
    outcomes: TextOutcomes, ablation: Ablation, records: pd.DataFrame
) -> pd.DataFrame:
    """Keep the records of the tasks on which a row from :func:`_ablated_names` was trained."""
    is_ablated = records["method"].isin(_ablated_names(outcomes, ablation))
    tasks = records.loc[is_ablated, "task"].unique()
    return records[records["task"].isin(tasks)]


def _compared_seeds(outcomes: TextOutcomes, ablation: Ablation) -> pd.DataFrame:
    """Return the scores of an ablation's rows by seed, and their averages over scopes.

    A group has the rows that are compared with each other (:data:`_KEYS_OF_GROUP`). A group without
    the baseline or without an ablated row is left out.
    """
    names = _row_names(outcomes, ablation)
    ablated_names = _ablated_names(outcomes, ablation)
    scores = outcomes.seeds
    is_shown = (
        scores["protocol"].isin(outcomes.run_protocols)
        & scores["method"].isin(names)
        & scores["domain"].isin([ID, OOD])
    )
    # each score is on a single task or a pair of tasks
    single_scores = scores[is_shown]
    with_averages = pd.concat([single_scores, _averages(single_scores)])
    seeds = with_averages[[*_KEYS_OF_ROW, "seed", "value"]]

    def has_comparison(group: pd.DataFrame) -> bool:
        # other tables show the groups that have only main rows
        has_ablated = group["method"].isin(ablated_names).any()
        has_baseline = group["method"].eq(outcomes.baseline).any()
        return bool(has_ablated and has_baseline)

    return seeds.groupby(_KEYS_OF_GROUP, sort=False).filter(has_comparison)


def _summarise(seeds: pd.DataFrame) -> pd.DataFrame:
    """Compute the mean and the deviation of each row over the seeds that its group shares.

    The deviation is the one that tables show (:func:`.outcomes.shown_deviation`). A row without
    shared seeds has no mean, and its ``n`` is 0.
    """
    shared = shared_pairs(seeds, within=_KEYS_OF_GROUP, compared=["method"], pair="seed")
    summaries = summarize_scores(shared, cell_columns=_KEYS_OF_ROW)
    # Ablations show the mean and the sample deviation that pandas computes with `groupby`. They
    # differ in the last digit from those of `summarize_scores`, and replace them here.
    scores_of_rows = shared.groupby(_KEYS_OF_ROW, sort=False)["value"]
    # with the keys as index, `assign` finds the row of each number
    indexed = summaries.set_index(_KEYS_OF_ROW)
    replaced = indexed.assign(mean=scores_of_rows.mean(), std=scores_of_rows.std())
    summarised = replaced.reset_index()
    with_shown_deviation = summarised.assign(std=shown_deviation(summarised))

    # the rows without shared seeds are missing so far
    all_rows = seeds[_KEYS_OF_ROW].drop_duplicates()
    joined = all_rows.merge(with_shown_deviation, on=_KEYS_OF_ROW, how="left")
    return joined.fillna({"n": 0})


def _differences_to(reference: str, seeds: pd.DataFrame) -> pd.DataFrame:
    """Compare the scores of each other row with those of ``reference``, over the seeds of both.

    The column ``pairs`` counts the seeds.
    """
    differences = paired_differences(
        seeds, cell_columns=_KEYS_OF_ROW, reference={"method": reference}, pair="seed"
    )
    # with one score per seed, the count of scores in `values` repeats the count of seeds
    return differences.drop(columns="values").rename(columns={"n": "pairs"})


def _differences_to_row_above(ablation: Ablation, seeds: pd.DataFrame) -> pd.DataFrame:
    """Compare the scores of each row with those of the row above it in the table."""
    differences = []
    for _, group in seeds.groupby(_KEYS_OF_GROUP, sort=False):
        # in the order of the table
        names = sorted(group["method"].unique(), key=partial(_method_key, ablation))
        for above, name in itertools.pairwise(names):
            scores_of_both = group[group["method"].isin([above, name])]
            differences.append(_differences_to(above, scores_of_both))
    if not differences:
        return pd.DataFrame(columns=[*_KEYS_OF_ROW, *Difference.COLUMNS, "pairs"])
    return pd.concat(differences)


def _sort_rows(ablation: Ablation, rows: pd.DataFrame) -> pd.DataFrame:
    """Sort rows by model, protocol, domain and scope, then by their place in the ablation.

    Rows that only the paper has come last.
    """
    scopes = list(rows["scope"].unique())

    def sort_key(row: Any) -> tuple[Any, ...]:
        return (
            not row.is_ours,  # False comes before True
            row.model,
            row.protocol,
            row.domain,
            scopes.index(row.scope),  # in the order of occurrence
            _method_key(ablation, row.method),
        )

    # a frame cannot be sorted by tuples, so sort its rows, and take their index in this order
    in_order = sorted(rows.reset_index(drop=True).itertuples(), key=sort_key)
    positions = [row.Index for row in in_order]
    return rows.iloc[positions].reset_index(drop=True)


def _method_key(ablation: Ablation, name: str) -> tuple[int, list[float], str]:
    """Return the sort key of a row name: its place in the ablation, then the setting's numbers."""
    method, setting = split_name(name)
    place = ablation.rows.index(method)
    # the numbers of N16-k0.25 are 16 and 0.25; sorted by number, N8 comes before N16
    numbers = [float(number) for number in re.findall(r"\d+\.?\d*", setting)]
    return place, numbers, setting


def _averages(seeds: pd.DataFrame) -> pd.DataFrame:
    """Average the scores of each method and seed over scopes (tasks, or pairs of tasks).

    Methods of the same protocol, domain and model are averaged over the scopes that all of them
    have. There is no average over fewer than two scopes.
    """
    # this empty frame has the columns of the result, in case there is no average
    averages = [seeds.iloc[:0]]
    keys = ["protocol", "domain", "model"]
    for (protocol, domain, model), group in seeds.groupby(keys, sort=False):
        shared_scopes = _scopes_of_all_methods(group)
        if len(shared_scopes) < 2:
            continue
        in_shared_scopes = group[group["scope"].isin(shared_scopes)]
        # rows: method and seed, columns: scopes
        by_scope = in_shared_scopes.pivot_table(
            index=["method", "seed"], columns="scope", values="value", sort=False
        )
        # a method and seed without a score in one of the scopes has no average
        complete = by_scope.dropna()
        means = complete.mean(axis=1).rename("value").reset_index()
        noun = "tasks" if domain == ID else "pairs"
        scope = _AVERAGE_OF + name_or_count(shared_scopes, noun)
        averages.append(means.assign(protocol=protocol, domain=domain, model=model, scope=scope))
    return pd.concat(averages)


def _scopes_of_all_methods(scores: pd.DataFrame) -> list[str]:
    """List the scopes for which every method has a score."""
    methods_by_scope = scores.groupby("scope", sort=False)["method"].nunique()
    has_all_methods = methods_by_scope == scores["method"].nunique()
    return list(methods_by_scope[has_all_methods].index)


def _join_paper(outcomes: TextOutcomes, ablation: Ablation, rows: pd.DataFrame) -> pd.DataFrame:
    """Join the paper's numbers to our rows, and add the rows that only the paper has.

    The paper's numbers have the protocol ``published``. ``is_ours`` is False for the rows that only
    the paper has.
    """
    published = _read_paper(outcomes, ablation)
    on = ["protocol", "model", "scope", "method"]
    numbers = published[[*on, "paper", "paper_delta", "status", "source"]]
    # `origin` is "both", "left_only" (only ours) or "right_only" (only the paper's)
    joined = rows.merge(numbers, on=on, how="outer", sort=False, indicator="origin")
    is_only_in_paper = joined["origin"] == "right_only"
    # Rows that only the paper has lack a domain. A scope with an arrow is a pair of tasks, so it is
    # out of domain.
    is_pair = joined["scope"].str.contains(ARROW, regex=False)
    domains = is_pair.map({True: OOD, False: ID})
    return joined.drop(columns="origin").assign(
        domain=joined["domain"].fillna(domains),
        is_ours=~is_only_in_paper,
    )


def _read_paper(outcomes: TextOutcomes, ablation: Ablation) -> pd.DataFrame:
    """Read the paper's scores of an ablation from the csv that the ablation names.

    Without such a csv, the frame has no rows.

    Returns:
        The columns of the csv, with row names in ``method``. Added columns are ``protocol``, the
        score ``paper`` as a share, and ``paper_delta``, its difference to the baseline's score.
    """
    if ablation.paper:
        published = read_published(outcomes.benchmark, ablation.paper)
    else:
        published = pd.DataFrame(columns=[*ABLATION_COLUMNS, *NUMBER_COLUMNS])
    # our rows are named `method|setting`, or only `method` if they have no setting
    methods = published["method"]
    settings = published["setting"].astype(str)
    names_with_setting = methods + SETTING_SEPARATOR + settings
    has_setting = settings != ""
    row_names = names_with_setting.where(has_setting, methods)

    shares = published["value"].astype(float) / 100  # published in percent
    scores = published.assign(method=row_names, value=shares, protocol=PUBLISHED)
    deltas = published_delta(scores, outcomes.baseline)
    return scores.assign(paper=shares, paper_delta=deltas)


def _add_titles(
    outcomes: TextOutcomes, rows: pd.DataFrame, main_settings: Mapping[tuple[str, str], str]
) -> pd.DataFrame:
    """Add the column ``is_average``, and ``method_title``: the method and the setting of the row.

    Main rows have no setting. But if other rows of the table vary k, the number of experts in use,
    the title of a main row shows its N, the number of experts, and its k/N. This title ends with
    :data:`_MAIN_MARK`, because another row may have the same N and k.

    Args:
        outcomes: The results, including the rows of ablations.
        rows: The rows of the table.
        main_settings: N and k/N of the runs of each model and method, from :func:`_main_settings`.
    """
    settings = [split_name(name).setting for name in rows["method"]]
    k_varies = any("k" in setting_values(setting) for setting in settings)
    titles = []
    for row in rows.itertuples():
        method, setting = split_name(row.method)
        words = setting_text(setting)
        mark = ""
        # a main row; the rows that only the paper has have no runs, whose N and k could be shown
        if k_varies and not setting and row.is_ours:
            words = setting_text(main_settings[row.model, row.method])
            mark = _MAIN_MARK
        title = outcomes.title("method", method)
        if words:
            title = f"{title}, {words}{mark}"
        titles.append(title)
    return rows.assign(method_title=titles, is_average=rows["scope"].str.startswith(_AVERAGE_OF))


def _main_settings(outcomes: TextOutcomes, records: pd.DataFrame) -> dict[tuple[str, str], str]:
    """Map each model and method in ``records`` to N and k/N of its runs, such as ``N16-k0.25``.

    The text is empty for models without EMoE, and if N or k/N differs between tasks.
    """
    setting_by_run = {run.id: _main_setting(run.config) for run in outcomes.runs}
    settings = {}
    for model_and_method, records_of_both in records.groupby(["model", "method"], sort=False):
        distinct_settings = {setting_by_run[run_id] for run_id in records_of_both["run_id"]}
        if len(distinct_settings) == 1:
            settings[model_and_method] = distinct_settings.pop()
        else:
            settings[model_and_method] = ""
    return settings


def _main_setting(config: Mapping[str, Any]) -> str:
    """Return N and k/N of an EMoE as a setting, such as ``N16-k0.25``; empty for other models."""
    if config.get("kind") != "emoe":
        return ""
    experts = config["num_experts"]
    return f"N{experts}-k{config['top_k'] / experts:g}"


def ablation_table(outcomes: TextOutcomes, name: str) -> Table:
    """Make the table of the ablation ``name``: scores, differences, and the paper's numbers."""
    definition: Ablation = outcomes.benchmark.definition.ablations[name]
    ablated = outcomes.ablated
    rows = ablation_rows(outcomes, definition)
    frame = rows.assign(
        verdict=_or_dash(rows["verdict"]),
        status=_or_dash(rows["status"]),
        source=_or_dash(rows["source"]),
        n=[_count_text(count) for count in rows["n"]],
        pairs=[_count_text(count) for count in rows["pairs"]],
        model_title=_or_dash(rows["model_title"]),
        on=rows["scope"] + " (" + rows["domain"].map(DOMAIN_TITLES) + ")",
    )
    return Table(
        title=definition.title,
        caption=_table_caption(definition),
        keys={
            "model_title": "Model",
            "selection": "Selection",
            "on": "On",
            "method_title": "Method",
            "n": "n",
            "pairs": "n of Δ",
        },
        columns=[
            Column(metric="score", value="mean", label="Score", std="std"),
            Column(
                metric="score",
                value="delta",
                label="Δ",
                interval=("low", "high"),
                signed=True,
                decimals=2,
            ),
            Column(metric="p_value", value="p_holm", label="p (Holm)"),
            Column(metric="active_neurons", value="active_neurons"),
            Column(metric="score", value="paper", label="Paper", decimals=2),
            Column(metric="score", value="paper_delta", label="Δ paper", signed=True, decimals=2),
        ],
        frame=frame,
        notes={"verdict": "Verdict", "status": "Status", "source": "Source of the paper's number"},
        # on other tasks, a main row may have other settings
        origins=_records_of_ablated_tasks(ablated, definition, ablated.origins),
    )


def _table_caption(ablation: Ablation) -> str:
    """Write the caption of the table of an ablation."""
    reference = "row above" if ablation.steps else "first row"
    return (
        f"{ablation.question} Score (%): mean ± standard deviation over the n seeds that all "
        f"rows of a set and selection share. Δ is the difference to the {reference}, paired by "
        "seed over all seeds that both have, with a 95 % confidence interval (Student's t). "
        f"{SEEDS_COVER} p is from the paired t-test, corrected with Holm's procedure over the "
        f"rows of a set and selection; the verdict uses it at 5 %. {_MAIN_ROWS} {OTHER_MODELS}"
    )


def _or_dash(texts: pd.Series[str]) -> pd.Series[str]:
    """Replace missing and empty texts with a dash."""
    return texts.fillna("").replace("", MISSING)


def _count_text(count: float) -> str:
    """Format a number of seeds; a dash for nan, such as in a row that only the paper has."""
    return MISSING if math.isnan(count) else f"{count:.0f}"


def ablation_figure(outcomes: TextOutcomes, name: str) -> Figure:
    """Return the figure of an ablation: a forest plot of the differences."""
    definition: Ablation = outcomes.benchmark.definition.ablations[name]
    reference = _reference_title(outcomes, definition)
    return Figure(
        partial(draw_differences, name=name),
        f"{definition.title}. Differences to {reference}, paired by seed, with 95 % intervals: "
        "averages over the sets, hollow out of domain. The table has every set and selection. "
        f"{_MAIN_ROWS} "
        "Crosses, if any, are the paper's, averaged over its sets. They have no intervals, because "
        "the paper has no differences by seed.",
    )


def _reference_title(outcomes: TextOutcomes, ablation: Ablation) -> str:
    """Return the reference of an ablation's differences: the row above, or the baseline."""
    return "the row above" if ablation.steps else outcomes.baseline_title


def draw_differences(outcomes: TextOutcomes, path: Path, name: str) -> None:
    """Draw the differences of the ablation ``name`` as a forest plot.

    They are differences to the baseline or, if the ablation has ``steps``, to the row above. Each
    panel shows the runs of one model under the first protocol that the model has. The title of the
    panel shows the number of seeds, or that only the paper has numbers. Each line is a method. Each
    mark on a line is a difference in domain or out of domain, averaged over sets if there are
    several. With three or more seeds, the mark has a 95 % interval.
    """
    definition: Ablation = outcomes.benchmark.definition.ablations[name]
    rows = ablation_rows(outcomes, definition)
    ours = rows[rows["is_ours"] & rows["delta"].notna()]
    if ours.empty:
        plots.placeholder_figure(path)
        return

    marks = pd.concat([_shown_differences(ours), _paper_differences(rows)])
    # each model has a panel; some of the paper's rows have no model
    panel_titles = {}
    for model, of_model in marks.groupby("model_title", sort=False):
        panel_titles[model] = _panel_title(str(model), of_model)
    # the text of each mark in the legend, such as "in domain" or "the paper, in domain"
    owners = marks["is_ours"].map({True: "", False: "the paper, "})
    series = owners + marks["domain"].map(DOMAIN_TITLES)
    drawn = marks.assign(
        panel=marks["model_title"].map(panel_titles),
        line=[plots.wrap_text(title, inches=2, size=7) for title in marks["method_title"]],
        series=series,
        style=[_mark_style(outcomes, mark) for mark in marks.itertuples()],
    )
    reference = _reference_title(outcomes, definition)
    plots.draw_forest(drawn, path, f"Difference to {reference} (points)")


def _panel_title(model: str, marks: pd.DataFrame) -> str:
    """Return the title of a panel: its model, and the number of seeds of our marks.

    Without our marks, the title says that the numbers are the paper's.
    ``model`` is empty for the paper's rows that name no model.
    """
    of_runs = marks[marks["is_ours"]]
    if not of_runs.empty:
        return f"{model}, {plots.sample_text(of_runs)}"
    if model:
        return f"{model} (the paper)"
    return "the paper"


def _first_selection(rows: pd.DataFrame) -> pd.DataFrame:
    """Keep the rows of each model that have its first protocol."""
    # beside each row: the protocol of the model's first row
    first_protocol = rows.groupby("model")["protocol"].transform("first")
    return rows[rows["protocol"] == first_protocol]


def _shown_differences(ours: pd.DataFrame) -> pd.DataFrame:
    """Keep the averages of each panel and domain, or all its rows if it has no average."""
    rows = _first_selection(ours)
    # beside each row: whether its panel and domain has an average
    has_average = rows.groupby(["model_title", "domain"])["is_average"].transform("any")
    return rows[rows["is_average"] | ~has_average].assign(n=rows["pairs"])


def _paper_differences(rows: pd.DataFrame) -> pd.DataFrame:
    """Average the paper's differences over scopes, by model, domain and method.

    A method is left out if the paper lacks its difference in one of the scopes. Its average would
    be over fewer scopes than the averages of the other methods.
    """
    # only rows from the paper have a status, also if their number is unknown
    published = rows[rows["status"].notna()]
    panel = ["model_title", "domain"]
    keys = [*panel, "method", "method_title"]
    # `transform` returns a value for each row: the number of scopes of its model and domain
    num_scopes = published.groupby(panel)["scope"].transform("nunique")
    # and the number of known differences of its method there; `count` skips nan
    num_differences = published.groupby(keys)["paper_delta"].transform("count")
    complete = published[num_differences == num_scopes]
    by_mark = complete.groupby(keys, sort=False)
    means = by_mark["paper_delta"].mean().rename("delta").reset_index()
    return means.assign(is_ours=False)


def _mark_style(outcomes: TextOutcomes, mark: Any) -> MethodStyle:
    """Return the style of a mark: hollow out of domain, and a cross for the paper's difference."""
    style = outcomes.style(mark.method)
    if not mark.is_ours:
        marker = "+" if mark.domain == OOD else "x"
        return replace(style, marker=marker)
    # in other figures, hollow marks show the authors' own settings
    return replace(style, hollow=mark.domain == OOD)
