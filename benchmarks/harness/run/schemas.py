"""JSON Schemas of all YAML files, for editors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic.json_schema import models_json_schema

from benchmarks.harness.base import SCHEMAS, write_text
from benchmarks.harness.config.benchmark import KINDS, benchmark_names, load_benchmark
from benchmarks.harness.config.catalogue import MetricFile, ModelFile
from benchmarks.harness.config.methods import MethodFile
from benchmarks.harness.config.suite import SuiteSettings
from benchmarks.harness.config.yaml import Strict
from benchmarks.harness.report.claims import ClaimFile
from benchmarks.harness.report.paper_items import PaperFile


def write_schemas() -> list[Path]:
    """Write the schema of each kind of YAML file as ``benchmarks/schemas/<name>.schema.json``, and return the paths."""
    models: dict[str, type[Strict]] = {
        "models": ModelFile,
        "metrics": MetricFile,
        "methods": MethodFile,
        "claims": ClaimFile,
        "paper": PaperFile,
        **{name: kind.definition_model for name, kind in KINDS.items()},
        **{name: model for kind in KINDS.values() for name, model in kind.task_files.items()},
    }
    schemas = {name: model.model_json_schema() for name, model in models.items()} | {
        "config": _suite_schema()
    }
    for name, schema in schemas.items():
        write_text(
            SCHEMAS / f"{name}.schema.json", json.dumps(schema, indent=1, ensure_ascii=False)
        )
    return [SCHEMAS / f"{name}.schema.json" for name in schemas]


def _suite_schema() -> dict[str, Any]:
    """Make the schema of ``config/<suite>.yaml``, with the part of each benchmark."""
    schema = SuiteSettings.model_json_schema()
    parts = {name: load_benchmark(name).part_model for name in benchmark_names()}
    _, definitions = models_json_schema([(part, "validation") for part in parts.values()])
    # no key is required, because ``grid_defaults`` may give those of a block
    schema["$defs"] = {
        name: {key: value for key, value in part.items() if key != "required"}
        for name, part in definitions["$defs"].items()
    }
    schema["properties"]["benchmarks"]["properties"] = {
        name: {"$ref": f"#/$defs/{part.__name__}"} for name, part in parts.items()
    }
    return schema
