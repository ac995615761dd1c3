"""Write JSON schemas of all YAML files, for editors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic.json_schema import models_json_schema

from benchmarks.harness.base import SCHEMAS, write_text
from benchmarks.harness.config.benchmark import KINDS, SuitePart, benchmark_names, load_benchmark
from benchmarks.harness.config.catalogue import MetricFile, ModelFile
from benchmarks.harness.config.methods import MethodFile
from benchmarks.harness.config.suite import SuiteSettings
from benchmarks.harness.config.yaml import Strict
from benchmarks.harness.report.claims import ClaimFile
from benchmarks.harness.report.paper_items import PaperFile


def write_schemas() -> list[Path]:
    """Write the schema of each kind of YAML file, and return the paths of the schemas.

    The files are ``benchmarks/schemas/<name>.schema.json``.
    """
    # the pydantic model of each kind of file, by the name of the schema
    models: dict[str, type[Strict]] = {
        "models": ModelFile,
        "metrics": MetricFile,
        "methods": MethodFile,
        "claims": ClaimFile,
        "paper": PaperFile,
    }
    # each kind of benchmark has a schema for benchmark.yaml, and may have other YAML files
    for name, kind in KINDS.items():
        models[name] = kind.definition_model
    for kind in KINDS.values():
        models.update(kind.task_files)

    schemas = {name: model.model_json_schema() for name, model in models.items()}
    schemas["config"] = _suite_schema()

    paths = []
    for name, schema in schemas.items():
        path = SCHEMAS / f"{name}.schema.json"
        write_text(path, json.dumps(schema, indent=1, ensure_ascii=False))
        paths.append(path)
    return paths


def _suite_schema() -> dict[str, Any]:
    """Make the JSON schema of ``config/<suite>.yaml``, with a section for each benchmark."""
    section_models = {name: load_benchmark(name).part_model for name in benchmark_names()}
    # one call makes the schemas of all sections, with their shared definitions in "$defs"
    requested: list[tuple[type[SuitePart], Literal["validation"]]] = [
        (model, "validation") for model in section_models.values()
    ]
    references, combined_schema = models_json_schema(requested)
    definitions = combined_schema["$defs"]
    # no key is required, because a suite may give a block's keys in ``grid_defaults`` instead
    for definition in definitions.values():
        definition.pop("required", None)

    sections = {}
    for name, model in section_models.items():
        sections[name] = references[model, "validation"]

    schema = SuiteSettings.model_json_schema()
    schema["$defs"] = definitions
    schema["properties"]["benchmarks"]["properties"] = sections
    return schema
