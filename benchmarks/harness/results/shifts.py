"""Find groups of numbers whose mean differs between two machines by more than rounding explains.

Rounding errors scatter around zero. A wrong change of the code can move all numbers of a group one
way while each of them stays within its tolerance.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from benchmarks.harness.config.catalogue import load_metrics
from benchmarks.harness.results.records import AS

SHIFT_COLUMNS = ["group", "part", "metric", "numbers", "before", "after", "limit"]
_GROUP = ["group", "part", "metric"]
# a shift that is larger than this many of its standard errors is not a matter of rounding
_ERRORS = 4
# numbers that agree in these columns are paired if their methods differ
_PAIRED = ["benchmark", "model", "task", "seed", "part", "eval_task", "metric"]


def find_shifts(rows: pd.DataFrame) -> pd.DataFrame:
    """Find the groups of numbers whose mean has shifted.

    A group has one part and one metric. It consists of either

    - all runs that differ only in the seed,
    - all runs of one method in a benchmark, or
    - the differences of two methods in a benchmark, paired by model, task, seed and evaluated task.

    The limit of a group is the largest of

    - the standard error of its old mean over the seeds,
    - four standard errors of the shift, and
    - ``tolerance / numbers``, because a single number may differ by its tolerance.

    A group with one seed has no standard error and is not compared. It is not compared either if
    each run of its benchmark has one seed, because then the error of the shift is unknown.

    Args:
        rows: One row per number, with the columns ``benchmark``, ``run`` (the settings without the
            seed), ``seed``, ``part``, ``eval_task``, ``metric``, ``value_before``, ``value_after``
            (texts) and ``tolerance``. Rows with a tolerance of 0 are skipped, and so are metrics
            that ``metrics.yaml`` does not have.

    Returns:
        One row per shifted group, with the columns :data:`SHIFT_COLUMNS`: the name of the group,
        its part and metric, the count of numbers, the old and the new mean, and the limit.
    """
    is_compared = (rows["tolerance"] > 0) & rows["metric"].isin(list(load_metrics()))
    # on one machine, all tolerances are 0
    if not is_compared.any():
        return pd.DataFrame(columns=SHIFT_COLUMNS)

    numbers = _read_numbers(rows[is_compared])
    # the three kinds of groups: the column "group" names the group of each number
    by_run = numbers.assign(group=numbers["run"])
    by_method = numbers.assign(group=numbers["benchmark"] + ", all runs of " + numbers["method"])
    by_pair_of_methods = _differences_of_methods(numbers)

    # if all runs of a method have the same settings, `by_run` has the same group already
    num_settings = by_method.groupby("group")["run"].transform("nunique")  # for each row
    by_method_and_not_by_run = by_method[num_settings > 1]

    means = pd.concat(
        [
            _group_means(by_run),
            _group_means(by_method_and_not_by_run),
            _group_means(by_pair_of_methods),
        ],
        ignore_index=True,
    )
    shift = means["after"] - means["before"]
    return means.loc[shift.abs() > means["limit"], SHIFT_COLUMNS]


def _read_numbers(compared: pd.DataFrame) -> pd.DataFrame:
    """Convert the texts of numbers, and add the settings of their runs.

    Rows with an absent, damaged or infinite number are left out.

    Returns:
        The rows with these new columns:

        - ``model``, ``task`` and ``method``. A converted model has the method to which it was
          converted.
        - ``before`` and ``after``: the values as numbers.
        - ``scatter``: see :func:`_scatter`.

        Three columns change: the conversion, such as `` as emoe``, moves from the end of ``part``
        to the end of ``run``, and ``tolerance`` becomes absolute.
    """
    # "test as emoe" is split into "test", the separator " as " and "emoe", the method to which the
    # model was converted. Without a conversion, the last two are empty.
    split_parts = compared["part"].str.partition(AS)
    part = split_parts[0]
    separator = split_parts[1]
    converted_to = split_parts[2]

    # The name of a run begins with benchmark, model, task and method (check.name_without_seed). A
    # measurement of `speed` has no method. It has one seed, so _group_means leaves it out.
    words = compared["run"].str.split(" ")
    model = words.str[1]
    task = words.str[2]
    trained_method = words.str[3]
    # `where` keeps the conversion if there is one, and else takes the trained method
    method = converted_to.where(converted_to != "", trained_method)

    # absent and damaged texts become nan
    before = pd.to_numeric(compared["value_before"], errors="coerce")
    after = pd.to_numeric(compared["value_after"], errors="coerce")
    # as in check.values_agree, a tolerance is relative above 1
    absolute_tolerance = compared["tolerance"] * before.abs().clip(lower=1)

    numbers = compared.assign(
        run=compared["run"] + separator + converted_to,
        model=model,
        task=task,
        method=method,
        part=part,
        before=before,
        after=after,
        tolerance=absolute_tolerance,
    )
    is_finite = np.isfinite(numbers["before"]) & np.isfinite(numbers["after"])
    finite = numbers[is_finite]
    return finite.assign(scatter=_scatter(finite))


def _scatter(numbers: pd.DataFrame) -> pd.Series[float]:
    """Estimate how much the difference (new - old) of a single number varies from seed to seed.

    The estimate is a standard deviation around the mean of the seeds, so a shift of all seeds does
    not enlarge it. All numbers of a benchmark with the same part and metric share one estimate.

    Returns:
        The estimate for each row. It is nan if each run of the benchmark has one seed.
    """
    with_difference = numbers.assign(difference=numbers["after"] - numbers["before"])
    # Rows that differ only in the seed form a group. `transform` gives each row the value of its
    # group.
    groups = with_difference.groupby(["run", "part", "eval_task", "metric"])["difference"]
    mean_of_group = groups.transform("mean")
    num_seeds = groups.transform("size")
    deviation = with_difference["difference"] - mean_of_group

    # The variance over several groups is the sum of squares, divided by the degrees of freedom. A
    # group of n seeds has n - 1 of them, because its mean is estimated. Each of its n rows gets
    # the share (n - 1) / n, so that the rows add up to n - 1.
    terms = numbers.assign(squared_deviation=deviation**2, freedom=1 - 1 / num_seeds)
    pools = terms.groupby(["benchmark", "part", "metric"])
    sum_of_squares = pools["squared_deviation"].transform("sum")
    degrees_of_freedom = pools["freedom"].transform("sum")
    return np.sqrt(sum_of_squares / degrees_of_freedom)


def _differences_of_methods(numbers: pd.DataFrame) -> pd.DataFrame:
    """Subtract the numbers of every two methods of a benchmark.

    A method's runs with other settings, such as learning rates, are averaged first.

    Returns:
        One row per difference, with the columns of ``_PAIRED``, ``group``, ``before``, ``after``,
        ``tolerance`` and ``scatter``. The names of the two methods are in ``method`` and
        ``method_other``, and the numbers of the second one in columns that end in ``_other``.
    """
    columns = ["before", "after", "tolerance", "scatter"]
    method_means = numbers.groupby([*_PAIRED, "method"], as_index=False)[columns].mean()
    ordered_pairs = method_means.merge(method_means, on=_PAIRED, suffixes=("", "_other"))
    # every two methods once, and no method with itself
    pairs = ordered_pairs[ordered_pairs["method"] < ordered_pairs["method_other"]]
    return pairs.assign(
        group=pairs["benchmark"] + ", " + pairs["method"] + " - " + pairs["method_other"],
        before=pairs["before"] - pairs["before_other"],
        after=pairs["after"] - pairs["after_other"],
        # rounding errors of the two methods are independent
        tolerance=np.hypot(pairs["tolerance"], pairs["tolerance_other"]),
        scatter=np.hypot(pairs["scatter"], pairs["scatter_other"]),
    )


def _group_means(numbers: pd.DataFrame) -> pd.DataFrame:
    """Return the old and the new mean of each group, and how far the mean may shift.

    The columns are :data:`SHIFT_COLUMNS`. Groups with one seed are left out.
    """
    # Seeds may have different counts of numbers. To give them equal weight, numbers are averaged
    # first within each seed, and then over the seeds.
    seed_means = numbers.groupby([*_GROUP, "seed"])[["before", "after"]].mean()
    seed_means_by_group = seed_means.groupby(_GROUP)
    num_seeds = seed_means_by_group.size()
    group_means = seed_means_by_group.mean()

    # the three rules of find_shifts, one value per group
    numbers_by_group = numbers.groupby(_GROUP)
    num_numbers = numbers_by_group.size()
    standard_error_of_mean = seed_means_by_group["before"].sem()  # over the seeds
    standard_error_of_shift = numbers_by_group["scatter"].mean() / np.sqrt(num_numbers)
    tolerance_of_one_number = numbers_by_group["tolerance"].mean()
    limits = pd.DataFrame(
        {
            "error of the mean": standard_error_of_mean,
            "errors of the shift": _ERRORS * standard_error_of_shift,
            "one number": tolerance_of_one_number / num_numbers,
        }
    )
    # nan if one of them is unknown; no shift is larger than nan
    largest_limit = limits.max(axis=1, skipna=False)

    groups = group_means.assign(numbers=num_numbers, limit=largest_limit)
    return groups[num_seeds > 1].reset_index()
