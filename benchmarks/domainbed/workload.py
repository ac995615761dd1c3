"""What runs on images compute: tokens of an image by its pixels, and evaluations by DomainBed's protocol."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from benchmarks.domainbed.definition import SetEntry
from benchmarks.domainbed.protocol import HOLDOUT_FRACTION
from benchmarks.harness.config.workload import Workload, model_size, read_passes, trained_passes

_STATE = 4


def image_workload(spec: Mapping[str, Any], tasks: Mapping[str, SetEntry]) -> Workload | None:
    """What a run computes, environments taken to be of one size; None where the images of its set are not counted."""
    size, training, images = model_size(spec), spec["training"], tasks[spec["task"]["name"]].images
    if size is None or images is None or not size.shape.patch:
        return None
    environments, held_out, steps = len(spec["task"]["environments"]), len(spec["test_envs"]), training["steps"]
    tokens = size.shape.image_tokens(training["image_size"])
    step_images = spec["hparams"]["batch_size"] * (environments - held_out)
    of_each = images / environments
    # the in splits of training environments are only read where all are evaluated
    inside = environments if training["evaluate"] == "all" else held_out
    cut = training["eval_rows"] or math.inf
    out = min(of_each * HOLDOUT_FRACTION, cut)
    evaluated = environments * out + inside * min(of_each * (1 - HOLDOUT_FRACTION), cut)
    every = training["eval_every"]
    looks = 1 + (steps - 1) // every + ((steps - 1) % every > 0)
    read = looks * evaluated + environments * out  # and once more, to see what is predicted
    caches: tuple[tuple[str, float], ...] = ()
    if layers := training.get("frozen_layers"):
        name = f"states {spec['model']['name']} {spec['task']['name']} {training['image_size']} {layers}"
        caches = ((name, images * tokens * size.shape.width * _STATE),)
    return Workload(
        size=size,
        training=trained_passes(size, steps, steps * step_images * tokens),
        updates=steps,
        reading=(read_passes(size, math.ceil(read / training["eval_batch_size"]), read * tokens),),
        batch_tokens=step_images * tokens,
        precision=training["precision"],
        caches=caches,
    )
