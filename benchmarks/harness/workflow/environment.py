"""Write the environment variables of a workflow's jobs, and read them in a job."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from benchmarks.harness import base as paths
from benchmarks.harness.base import DefinitionError, first_problem
from benchmarks.harness.config.runs import canonical_json
from benchmarks.harness.config.suite import DEFAULT_SUITE, Suite, load_suite

# These variables stop glibc from returning memory to the kernel in every step. That would take a
# tenth of a small model's training time. Variables that are already set keep their values. Other C
# libraries ignore the variables.
_GLIBC = {
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(512 << 20),
    "MALLOC_TOP_PAD_": str(64 << 20),
}


def job_environment(suite: Suite) -> dict[str, str]:
    """Return the environment variables of a suite's jobs.

    Some of them hold local paths and the values of the command line. If these were parameters of a
    rule, Snakemake would run everything again after a change.
    """
    # jobs use the interpreter of the workflow
    folder_of_python = str(Path(sys.executable).parent)
    search_path = os.environ.get("PATH", os.defpath)
    variables = {
        "PATH": os.pathsep.join([folder_of_python, search_path]),
        "TOKENIZERS_PARALLELISM": "false",
        # datasets asks the hub once for every local file that it opens
        "HF_UPDATE_DOWNLOAD_COUNTS": "0",
        paths.OVERRIDES: canonical_json(suite.overrides),
    }
    # a value that the user has set stays
    for name, value in _GLIBC.items():
        variables[name] = os.environ.get(name, value)
    settings = suite.settings
    if settings.data_root:
        variables[paths.DATA_ROOT] = str(Path(settings.data_root).resolve())
    if settings.model_root:
        variables[paths.MODEL_ROOT] = str(Path(settings.model_root).resolve())
    # not an argument of a command, because it may contain a password
    if settings.tracking_uri:
        variables[paths.TRACKING_URI] = settings.tracking_uri
    return variables


def load_suite_from_environment(name: str) -> Suite:
    """Load a suite in a job of the workflow, with the values of the workflow's command line.

    The job reads the values from an environment variable. It ignores values for another suite.

    Raises:
        DefinitionError: The environment variable with the values is not valid JSON.
    """
    text = os.environ.get(paths.OVERRIDES, "{}")
    try:
        overrides = TypeAdapter(dict[str, Any]).validate_json(text)
    except ValidationError as error:
        raise DefinitionError(
            f"the environment variable {paths.OVERRIDES} must hold the values of --config as JSON, "
            'such as {"seeds": 2}; '
            f"{first_problem(error)}; unset it, because the workflow sets it"
        ) from error
    if overrides.get("suite", DEFAULT_SUITE) != name:
        return load_suite({"suite": name})
    return load_suite(overrides)
