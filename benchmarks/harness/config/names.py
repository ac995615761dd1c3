"""Check the names of benchmarks and suites. The workflow and the commands reserve some names."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks.harness.base import DefinitionError

# folders in results/ that belong to no suite
_RESULT_FOLDERS = ("logs", "mlflow", "reference", "runs")
# rules of the workflow; `all`, `tables` and `report` are also targets for users
_RULES = (
    "all",
    "tables",
    "report",
    "benchmark_report",
    "collect",
    "table_of_claims",
    "mirror_to_mlflow",
    "fetch_package",
    "rebuild_model",
    "partition_neurons",
    "write_run_json",
    "unknown_target",
    "other_suite",
)
_RULE_PREFIXES = ("figure_", "run_", "table_", "tables_of_")
# folders in benchmarks/ that belong to no benchmark
_CODE_FOLDERS = ("harness", "schemas", "text")
# The words that `python -m benchmarks list` takes besides suites. Only `paper` is left out, because
# a suite has this name.
_LISTS = ("benchmarks", "claims", "methods", "metrics", "models", "suites", "tasks")

# YAML reads these words as another value than a text
_YAML_VALUES = ("null", "true", "false", "yes", "no", "on", "off")


def check_name(name: str, file: Path | None = None) -> None:
    """Raise an error if a name is not valid for a benchmark or suite.

    A valid name begins with a letter and has only lower-case letters, digits and ``_``. It must not
    clash with another folder, with the rules of the workflow, or with an argument of a command, and
    YAML must read it as a text.

    Args:
        name: The name of a benchmark or suite.
        file: The file of the benchmark or suite, for the message; None if there is none yet.

    Raises:
        DefinitionError: The name is not valid. The error names the file and the reason.
    """
    reason = _reason_against(name)
    if reason:
        where = f"{file}: " if file else ""
        raise DefinitionError(f"{where}'{name}' is not a valid name: {reason}; choose another name")


def target_name(benchmark: str, data_set: str | None) -> str:
    """Return the name of the workflow's target for a benchmark, or for one of its data sets.

    The names of the target's result files begin with it.

    Args:
        benchmark: The name of the benchmark.
        data_set: The name of the data set; None for the benchmark.
    """
    return f"{benchmark}_{data_set}" if data_set else benchmark


def _reason_against(name: str) -> str | None:
    """Return the reason why a name cannot be used; None if it can."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        return "use lower-case letters, digits and _, and begin with a letter"
    if name in _RESULT_FOLDERS:
        return f"results/{name} is not the folder of a suite"
    if name in _RULES:
        return f"'{name}' is a rule of the workflow"
    for prefix in _RULE_PREFIXES:
        if name.startswith(prefix):
            return f"names of rules of the workflow begin with '{prefix}'"
    if name in _CODE_FOLDERS:
        return f"benchmarks/{name} is not the folder of a benchmark"
    if name in _YAML_VALUES:
        return "YAML does not read it as a text"
    if name in _LISTS:
        return f"`python -m benchmarks list {name}` lists something else"
    return None
