"""What measurements compute that train: one FFN, or a whole model, a step for every candidate and round."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from benchmarks.harness.config.shapes import Shape, shape_of_config
from benchmarks.harness.config.workload import ModelSize, Passes, Workload
from benchmarks.speed.definition import LayerSettings, StepSettings, read_spec


def measured_workload(spec: Mapping[str, Any]) -> Workload | None:
    """What a measurement of a layer or a step computes; None of the others, which wait for memory or cluster."""
    model, settings = read_spec(spec, "run.json")
    if isinstance(settings, LayerSettings) and settings.dtype == "float32":
        shape = Shape(
            width=cast(int, model.hidden), layers=1, neurons=cast(int, model.neurons), gated=bool(model.gated)
        )
        tokens, parameters = settings.tokens, shape.ffn
    elif isinstance(settings, StepSettings):
        config = model.config or {}
        shape = shape_of_config(config)
        row = shape.image_tokens(config.get("image_size", 224)) if shape.patch else settings.length
        tokens, parameters = settings.batch_size * row, shape.layers * shape.block
    else:
        return None
    steps = (settings.rounds + 1) * (1 + len(settings.candidates))
    held = parameters * (1 + len(settings.candidates))
    size = ModelSize(
        shape,
        held,
        held if isinstance(settings, StepSettings) else 0,
        parameters,
        parameters,
        parameters,
        shape.layers,
        shape.layers * shape.neurons,
    )
    return Workload(
        size=size,
        training=Passes(steps, steps * tokens, 3 * parameters, 3 * shape.layers),
        updates=steps,
        reading=(),
        batch_tokens=tokens,
        threads=settings.threads,
    )
