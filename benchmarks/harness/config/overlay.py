"""Merge the settings of a benchmark, a suite, a model and a task.

The settings of a later layer override those of an earlier layer, key by key. Exceptions:

- ``top_k`` and ``top_k_fraction`` replace each other
  (:func:`benchmarks.harness.config.methods.merge_methods`).
- ``partition_seed: run`` becomes the run's seed
  (:func:`benchmarks.harness.config.method_specs.method_spec`).
- ``by_model`` and ``by_task`` override the suite's settings
  (:func:`benchmarks.harness.config.benchmark.Benchmark.settings`).
- A grid point changes the epochs, and a protocol the number of validation rows
  (:func:`benchmarks.text.grid.run_training`).
- An untrained model has no training settings (:mod:`benchmarks.llama.grid`).
- An image set gives ``eval_every``, and DomainBed's random search gives the hyper-parameters
  (:mod:`benchmarks.domainbed.grid`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from benchmarks.harness.config.yaml import Strict


class Changes:
    """An annotation for a dictionary that overrides some fields of a pydantic model.

    pydantic does not validate such a dictionary, because keys that the model requires may be
    missing. :meth:`.Benchmark.settings` validates the merged settings. The JSON schema lists the
    model's keys, so that editors propose them.

    Attributes:
        model: The pydantic model of the complete settings.
    """

    def __init__(self, model: type[Strict]) -> None:
        self.model = model

    def __get_pydantic_json_schema__(
        self, _schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """Return the schema of the model, without its list of required keys."""
        reference = handler(self.model.__pydantic_core_schema__)
        complete = handler.resolve_ref_schema(reference)
        return {key: value for key, value in complete.items() if key != "required"}


def merge(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Merge settings; a later layer overrides an earlier one, key by key.

    >>> merge({"epochs": 3, "lora": {"rank": 8, "alpha": 16}}, {"lora": {"rank": 4}})
    {'epochs': 3, 'lora': {'rank': 4, 'alpha': 16}}
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            # only dictionaries are merged; a list replaces a list
            earlier = merged.get(key)
            if isinstance(earlier, dict) and isinstance(value, dict):
                merged[key] = merge(earlier, value)
            else:
                merged[key] = value
    return merged
