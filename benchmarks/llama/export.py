"""Export a tuned model with merged adapters, dense or with experts."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import cast

from transformers import PreTrainedModel

import emoe
from benchmarks.harness.base import DataError
from benchmarks.harness.config.benchmark import load_benchmark
from benchmarks.harness.config.runs import read_run
from benchmarks.harness.models.build import build_language_model, reopen
from benchmarks.harness.models.loading import load_tokenizer
from benchmarks.harness.results.records import read_record
from benchmarks.llama.definition import InstructionSpec
from benchmarks.llama.templates import find_template
from emoe.files import check_new, save_weights
from emoe.layer import routed_layers

# forms of an export
DENSE = "dense"
EXPERTS = "emoe"


def export(path: Path, output: Path, form: str) -> str:
    """Export the model of a finished run to a folder.

    The prompt template of the run becomes the chat template of the tokenizer, and its ``run.json``
    is copied.

    Args:
        path: The ``run.json``.
        output: The new folder.
        form: The format: ``dense`` for stock transformers, with neurons in their original order, or
            ``emoe`` with experts.

    Returns:
        A description of the written model.

    Raises:
        DataError: The run has no saved language model, or no experts.
        CheckpointError: The folder exists.
    """
    path = path.resolve()
    run = read_run(path)
    spec = load_benchmark(run.benchmark).read_spec(run)
    weights = path.parent / "model"
    if not isinstance(spec, InstructionSpec) or not weights.is_dir():
        raise DataError(
            f"{path.parent} has no weights of a language model: the run tunes no instructions, "
            "is not finished, trains nothing, or has training.keep_weights: false"
        )
    check_new(output)
    runs_folder = path.parents[2]  # the parents are the run, its benchmark, and all runs
    recorded = read_record(run, runs_folder).metrics.weights
    # adapters cannot be merged into quantised weights
    unquantised = spec.model.model_copy(update={"quantize": None})
    spec = spec.model_copy(update={"model": unquantised})
    trained = reopen(build_language_model, spec, recorded, weights)
    # an exported model needs no peft
    if trained.adapters is not None:
        trained.adapters.merge_and_unload(safe_merge=True)
    model = cast(PreTrainedModel, trained.model)
    routed = routed_layers(model)
    if form == EXPERTS and not routed:
        raise DataError(f"{run.id} has no experts; export it as {DENSE}")

    tokenizer = load_tokenizer(spec.model)
    template = find_template(spec.data.template, spec.templates, tokenizer, spec.seed)
    # generation stops where the responses of the training ended
    if model.generation_config is not None:
        model.generation_config.eos_token_id = template.end_tokens
    if form == EXPERTS:
        emoe.save_pretrained(model, output)
    else:
        if routed:
            emoe.to_dense_(model, restore_order=True)
        save_weights(model, output)
    tokenizer.chat_template = template.as_chat_template()
    tokenizer.save_pretrained(output)
    shutil.copyfile(path, output / "run.json")
    name = type(model).__name__
    if form == EXPERTS:
        layers = ", ".join(str(layer.ffn.index) for layer in routed)
        return f"{name}, experts in layers {layers}"
    return f"{name}, dense"
