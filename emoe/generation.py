"""Answer a prompt by a language model's folder, from the shell."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, cast

import click
import torch
from torch import nn

from emoe.architectures import find_ffns
from emoe.checkpoint import from_pretrained
from emoe.errors import CheckpointError
from emoe.folders import holds_experts, load_dense, loader_for
from emoe.layer import routed_layers
from emoe.settings import set_backend_
from emoe.weights import one_line


def generate_text(
    folder: Path, prompt: str, max_new_tokens: int, *, raw: bool = False, backend: str = "sparse"
) -> None:
    """Print the greedy answer while it is made, and to stderr how fast that was.

    Args:
        folder: of a model, dense or converted, with its tokenizer.
        prompt: what it is asked.
        max_new_tokens: of the answer.
        raw: give the prompt as it is, instead of in the tokenizer's chat template where it has one.
        backend: of the experts.

    Raises:
        CheckpointError: no tokenizer, or no model that answers.
    """
    from transformers import TextStreamer
    from transformers.utils import logging

    logging.disable_progress_bar()  # the answer stands alone
    tokenizer = _tokenizer(folder)
    model = _model(folder)
    layers = routed_layers(model)
    if layers:
        set_backend_(model, backend)
    inputs = _inputs(tokenizer, prompt, raw=raw).to(next(model.parameters()).device)
    start = time.perf_counter()
    try:
        with torch.inference_mode():
            output = cast(Any, model).generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                use_cache=True,
                pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
                streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
            )
    except ValueError as error:  # settings of the folder's that do not go together
        raise CheckpointError(f"{folder} does not answer: {one_line(error)}") from error
    seconds = time.perf_counter() - start
    tokens = output.shape[1] - inputs["input_ids"].shape[1]
    experts = "dense"
    if layers:
        config = layers[0].config
        experts = f"{config.top_k} of {config.num_experts} experts in {len(layers)} of {len(find_ffns(model))} layers, {backend} backend"
    click.echo(f"[{tokens} tokens in {seconds:.1f} s, {tokens / seconds:.1f} a second; {experts}]", err=True)


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # whatever a damaged file brings about
        raise CheckpointError(f"{folder} holds no tokenizer: {one_line(error)}") from error


def _model(folder: Path) -> nn.Module:
    loader = loader_for(folder)
    model = from_pretrained(loader, folder) if holds_experts(folder) else load_dense(folder)
    if not hasattr(model, "generate") or not cast(Any, model).can_generate():
        raise CheckpointError(f"{folder} holds a {type(model).__name__}, which does not generate text")
    model.eval()
    return model.to("cuda") if torch.cuda.is_available() else model


def _inputs(tokenizer: Any, prompt: str, *, raw: bool) -> Any:
    if raw or not tokenizer.chat_template:
        found = tokenizer(prompt, return_tensors="pt")
    else:
        found = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    found.pop("token_type_ids", None)
    return found
