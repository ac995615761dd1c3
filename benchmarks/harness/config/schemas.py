"""JSON Schemas of all YAML files, for editors."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.harness.base import SCHEMAS, write_text
from benchmarks.harness.config.benchmark import find_kind, kind_names
from benchmarks.harness.config.catalogue import MetricFile, ModelFile
from benchmarks.harness.config.claims import ClaimFile
from benchmarks.harness.config.methods import MethodFile
from benchmarks.harness.config.paper_items import PaperFile
from benchmarks.harness.config.suite import SuiteSettings
from benchmarks.harness.config.yaml import Strict


def write_schemas() -> list[Path]:
    """Write the schema of each kind of YAML file as ``benchmarks/schemas/<name>.schema.json``.

    Returns:
        The paths of the written files.
    """
    models: dict[str, type[Strict]] = {
        "models": ModelFile,
        "metrics": MetricFile,
        "methods": MethodFile,
        "claims": ClaimFile,
        "paper": PaperFile,
        "config": SuiteSettings,
        **{name: model for kind in kind_names() for name, model in find_kind(kind).files},
    }
    for name, model in models.items():
        write_text(SCHEMAS / f"{name}.schema.json", json.dumps(model.model_json_schema(), indent=1, ensure_ascii=False))
    return [SCHEMAS / f"{name}.schema.json" for name in models]
