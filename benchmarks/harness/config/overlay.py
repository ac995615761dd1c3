"""Merge the settings of a benchmark, a suite and a model.

Exceptions:

- ``top_k`` and ``top_k_fraction`` replace each other (:func:`benchmarks.harness.config.methods.merge_methods`).
- ``partition_seed: run`` is the run's seed (:func:`benchmarks.harness.config.method_specs.method_spec`).
- ``by_model`` is a layer after the suite's (:func:`benchmarks.harness.config.benchmark.Benchmark.settings`).
- A task and a row change the epochs, and a protocol the validation rows (:func:`benchmarks.text.grid.run_training`).
- An untrained model has no training settings (:mod:`benchmarks.llama.grid`).
- An image set sets ``eval_every``, and a draw the hyper-parameters (:mod:`benchmarks.domainbed.grid`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from benchmarks.harness.config.yaml import Strict


class Changes:
    """Annotate a dictionary as partial settings of a model. :meth:`.Benchmark.settings` validates the merged settings,
    and editors propose the keys.
    """

    def __init__(self, model: type[Strict]) -> None:
        self.model = model

    def __get_pydantic_json_schema__(
        self, _schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        described = handler.resolve_ref_schema(handler(self.model.__pydantic_core_schema__))
        return {key: value for key, value in described.items() if key != "required"}


def merge(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Merge settings; a later layer overrides an earlier one, key by key.

    >>> merge({"epochs": 3, "lora": {"rank": 8, "alpha": 16}}, {"lora": {"rank": 4}})
    {'epochs': 3, 'lora': {'rank': 4, 'alpha': 16}}
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            below = merged.get(key)
            merged[key] = (
                merge(below, value)
                if isinstance(below, dict) and isinstance(value, dict)
                else value
            )
    return merged
