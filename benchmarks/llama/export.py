"""Export a tuned model with merged adapters, dense or with experts."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import cast

from transformers import PreTrainedModel

import emoe
from benchmarks.harness.base import DataError
from benchmarks.harness.config.benchmark import load_benchmark
from benchmarks.harness.config.runs import Run, read_run
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
_WEIGHTS = "model"  # where a run keeps its trained weights, below its folder


def export(path: Path, output: Path, form: str) -> str:
    """Export the model of a finished run to a folder, with merged adapters.

    The prompt template of the run becomes the chat template of the tokenizer. The run's
    ``run.json`` is copied.

    Args:
        path: The path of the ``run.json``.
        output: The new folder.
        form: The format: ``dense`` for stock transformers, with neurons in their original order, or
            ``emoe`` with experts.

    Returns:
        A description of the written model: its class, and the layers with experts.

    Raises:
        DataError: The run has no saved language model, or ``form`` is ``emoe`` and the model has no
            experts.
        CheckpointError: The folder exists.
    """
    path = path.resolve()
    folder = path.parent
    run = read_run(path)
    spec = _read_spec(run, folder)
    check_new(output)
    model = _load_trained(run, spec, folder)
    if form == EXPERTS and not routed_layers(model):
        raise DataError(f"{run.id} has no experts; export it as {DENSE}")

    tokenizer = load_tokenizer(spec.model)
    template = find_template(spec.data.template, spec.templates, tokenizer, spec.seed)
    # generation stops where the responses of the training ended
    if model.generation_config is not None:
        model.generation_config.eos_token_id = template.end_tokens
    description = _save_model(model, output, form)
    tokenizer.chat_template = template.as_chat_template()
    tokenizer.save_pretrained(output)
    shutil.copyfile(path, output / "run.json")
    return description


def _save_model(model: PreTrainedModel, output: Path, form: str) -> str:
    """Save a model to a folder, as ``dense`` or ``emoe``, and describe what is saved."""
    name = type(model).__name__
    routed = routed_layers(model)
    if form == EXPERTS:
        emoe.save_pretrained(model, output)
        layers = ", ".join(str(layer.ffn.index) for layer in routed)
        return f"{name}, experts in layers {layers}"
    if routed:
        emoe.to_dense_(model, restore_order=True)
    save_weights(model, output)
    return f"{name}, dense"


def _read_spec(run: Run, folder: Path) -> InstructionSpec:
    """Return the spec of a run whose folder has the weights of a tuned language model.

    Raises:
        DataError: The run has no such weights.
    """
    spec = load_benchmark(run.benchmark).read_spec(run)
    has_weights = (folder / _WEIGHTS).is_dir()
    if not isinstance(spec, InstructionSpec) or not has_weights:
        raise DataError(
            f"{folder} has no weights of a language model: the run tunes no instructions, "
            "is not finished, trains nothing, or has training.keep_weights: false"
        )
    return spec


def _load_trained(run: Run, spec: InstructionSpec, folder: Path) -> PreTrainedModel:
    """Load the trained model of a run from the run's ``folder``.

    The weights are not quantised, even if they were in training. Adapters are merged into them.
    """
    # adapters cannot be merged into quantised weights
    unquantised_model = spec.model.model_copy(update={"quantize": None})
    unquantised_spec = spec.model_copy(update={"model": unquantised_model})
    # a run's folder is <runs>/<benchmark>/<run>
    benchmark_folder = folder.parent
    record = read_record(run, benchmark_folder.parent)
    trained = reopen(
        build_language_model,
        unquantised_spec,
        # the digest of the pre-trained weights: they must not have changed since the training
        weights_digest=record.metrics.weights,
        folder=folder / _WEIGHTS,
    )
    # merge, so that the exported model can be loaded without peft
    if trained.adapters is not None:
        trained.adapters.merge_and_unload(safe_merge=True)
    return cast(PreTrainedModel, trained.model)
