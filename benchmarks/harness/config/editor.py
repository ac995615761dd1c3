"""JSON Schemas of all YAML files, for editors: written from the models that read them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from benchmarks.harness.base.files import write_text
from benchmarks.harness.base.paths import SCHEMAS
from benchmarks.harness.config.catalogue import MetricFile, ModelFile
from benchmarks.harness.config.kinds import find_kind, kind_names
from benchmarks.harness.config.method_rows import MethodFile
from benchmarks.harness.config.schema import Strict, json_schema


def editor_schemas() -> dict[Path, str]:
    """The text of each schema by its file, ``benchmarks/schemas/<name>.schema.json``."""
    return {
        SCHEMAS / f"{name}.schema.json": json.dumps(json_schema(model), indent=1, ensure_ascii=False) + "\n"
        for name, model in _models()
    }


def write_schemas() -> list[Path]:
    """Write every schema, and give their files."""
    found = editor_schemas()
    for file, text in found.items():
        write_text(file, text)
    return list(found)


def _models() -> Iterator[tuple[str, type[Strict]]]:
    yield from (("models", ModelFile), ("metrics", MetricFile), ("methods", MethodFile))
    for kind in kind_names():
        yield from find_kind(kind).files
