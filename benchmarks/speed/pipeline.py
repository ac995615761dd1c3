"""Measure candidates under one setting, in turn in one process."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import emoe
from benchmarks.harness.base import derive_seed
from benchmarks.harness.config.catalogue import load_models
from benchmarks.harness.config.yaml import parse
from benchmarks.harness.models.loading import load_backbone
from benchmarks.harness.training.progress import Progress
from benchmarks.speed.definition import Settings
from benchmarks.speed.ffn import FFN, BlockMask, SpeedNet, TransformersExperts
from emoe.architectures import find_ffns
from emoe.clustering import balanced_kmeans, explained_variance_ratio
from emoe.sparse.cost_model import predicted_time_ratio

_PROMPT = 16  # tokens before an answer

Numbers = dict[str, dict[str, float]]


def run(spec: Mapping[str, Any], folder: Path, progress: Progress) -> dict[str, Any]:
    """Measure the candidates of one spec.

    Args:
        spec: The content of ``run.json``.
        folder: The run's folder; nothing is written there.
        progress: The reporter of progress.

    Returns:
        The content of ``metrics.json`` without the harness's part: ``measured`` by candidate.
    """
    measure = spec["task"]["name"]
    settings = parse(spec["settings"], Settings, str(folder / "run.json"), "settings")
    torch.set_num_threads(settings.threads)
    torch.manual_seed(derive_seed("speed", spec["seed"]))
    progress.say(f"measuring the {measure}")
    return {"measured": _MEASURES[measure](spec["model"], settings), "cost": {}}


def time_in_turn(call: Callable[[Any], object], nets: Mapping[str, Any], rounds: int) -> Numbers:
    """Time a call of each net in turn, so that a disturbance affects all; the first round is discarded.

    Args:
        call: The function to time.
        nets: The nets by name, ``dense`` among them.
        rounds: The number of rounds.

    Returns:
        By name: the ``ratio`` to the dense time in the same round (median, lowest, highest), and the median
        ``seconds``.
    """

    def timed(net: Any) -> float:
        start = time.perf_counter()
        call(net)
        return time.perf_counter() - start

    seconds = pd.DataFrame([{name: timed(net) for name, net in nets.items()} for _ in range(rounds + 1)])[1:]
    ratios = seconds.div(seconds["dense"], axis=0)
    numbers = {"ratio": ratios.median(), "ratio_low": ratios.min(), "ratio_high": ratios.max()}
    return cast(Numbers, pd.DataFrame(numbers | {"seconds": seconds.median()}).to_dict("index"))


def candidates(dense: Any, settings: Settings) -> dict[str, Any]:
    """Return the dense net and a converted copy per candidate, by name; most names are backends."""
    nets = {"dense": dense}
    n, k = settings.num_experts, settings.top_k
    for name in settings.candidates:
        if name == "block_mask":
            nets[name] = BlockMask(dense.layers[0], n, k)
        elif name.startswith("transformers_"):
            implementation = "eager" if name == "transformers_eager" else "grouped_mm"
            nets[name] = TransformersExperts(dense.layers[0], n, k, implementation)
        else:
            nets[name] = copy.deepcopy(dense)
            # a random partition takes no time to compute
            config = emoe.EMoEConfig(num_experts=n, top_k=k, layers=settings.layers, partition="random")
            emoe.convert_(nets[name], config)
            if name == "inference":
                emoe.for_inference_(nets[name])
            else:
                emoe.set_backend_(nets[name], name)
    return nets


def measure_layer(model: Mapping[str, Any], settings: Settings) -> Numbers:
    """Measure one FFN, forward and backward: its time, and the memory that is kept for the backward pass."""
    hidden, neurons, dtype = model["hidden"], model["neurons"], getattr(torch, settings.dtype)
    dense = SpeedNet(FFN(hidden, neurons, gated=model["gated"]))
    nets = {name: net.to(dtype) for name, net in candidates(dense, settings).items()}
    x = torch.randn(settings.tokens, hidden, dtype=dtype)
    gradient = torch.randn_like(x)

    def pass_through(net: nn.Module) -> None:
        net.zero_grad()
        net(x.detach().requires_grad_()).backward(gradient)

    numbers = time_in_turn(pass_through, nets, settings.rounds)
    kept = {name: kept_bytes(net, x.requires_grad_()) for name, net in nets.items()}
    for name, row in numbers.items():
        row["memory_ratio"] = kept[name] / kept["dense"]
    n = settings.num_experts
    expected = predicted_time_ratio(len(x), hidden, neurons // n, settings.top_k / n, dtype, torch.get_num_threads())
    if "sparse" in numbers and expected is not None:
        numbers["sparse"]["expected_ratio"] = expected
    return numbers


def kept_bytes(net: nn.Module, x: Tensor) -> int:
    """Count the bytes that a forward pass keeps for the backward pass, without weights and buffers."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*net.parameters(), *net.buffers())}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        net(x)
    return sum(size for pointer, size in sizes.items() if pointer not in weights)


def measure_step(model: Mapping[str, Any], settings: Settings) -> Numbers:
    """Measure a training step of a whole model with random weights: forward, backward, AdamW."""
    dense = AutoModel.from_config(AutoConfig.for_model(**model["config"])).train()
    config = dense.config
    if dense.main_input_name == "pixel_values":
        shape = (settings.batch_size, config.num_channels, config.image_size, config.image_size)
        inputs = {"pixel_values": torch.randn(shape)}
    else:
        ids = torch.randint(config.vocab_size, (settings.batch_size, settings.length))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def step(trained: tuple[nn.Module, torch.optim.Optimizer]) -> None:
        net, optimizer = trained
        optimizer.zero_grad()
        net(**inputs).last_hidden_state.square().mean().backward()
        optimizer.step()

    nets = candidates(dense, settings)
    return time_in_turn(
        step, {name: (net, torch.optim.AdamW(net.parameters())) for name, net in nets.items()}, settings.rounds
    )


def _language_models(model: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    dense = AutoModelForCausalLM.from_config(AutoConfig.for_model(**model["config"]))
    return candidates(dense.to(getattr(torch, settings.dtype)).eval(), settings)


def measure_ffns(model: Mapping[str, Any], settings: Settings) -> Numbers:
    """Measure ``tokens`` tokens at once through all FFNs of a language model; the model exceeds CPU caches."""
    nets = _language_models(model, settings)
    x = torch.randn(1, settings.tokens, nets["dense"].config.hidden_size).to(getattr(torch, settings.dtype))

    @torch.inference_mode()
    def pass_through(net: Any) -> None:
        for layer in net.model.layers:
            layer.mlp(x)

    return time_in_turn(pass_through, nets, settings.rounds)


def measure_generate(model: Mapping[str, Any], settings: Settings) -> Numbers:
    """Measure a greedy answer of ``tokens`` tokens to a prompt of 16, with a key-value cache."""
    nets = _language_models(model, settings)
    prompt = torch.randint(3, nets["dense"].config.vocab_size, (1, _PROMPT))
    options: dict[str, Any] = {"max_new_tokens": settings.tokens, "min_new_tokens": settings.tokens, "do_sample": False}
    options |= {"attention_mask": torch.ones_like(prompt), "pad_token_id": 0}
    return time_in_turn(lambda net: net.generate(prompt, **options), nets, settings.rounds)


def measure_partition(model: Mapping[str, Any], settings: Settings) -> Numbers:
    """Measure balanced clustering of one layer's keys: seconds, and the share of the variance that is unexplained."""
    keys, n = layer_keys(model), settings.num_experts
    numbers: Numbers = {}
    for name in settings.candidates:
        start, cpu = time.perf_counter(), time.process_time()
        labels = balanced_kmeans(keys, n) if name == "emoe" else _kmeans_constrained(keys, n, settings.starts)
        numbers[name] = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
        numbers[name]["inertia"] = 1 - explained_variance_ratio(keys, labels, n)
    if library := numbers.get("kmeans_constrained"):
        for row in numbers.values():
            row["ratio"] = row["seconds"] / library["seconds"]
    return numbers


def layer_keys(model: Mapping[str, Any]) -> Tensor:
    """Return key vectors ``[d, h]``: real ones, or Gaussian rows around 128 centres with a quarter of their spread."""
    if "model" in model:
        loaded = load_backbone(load_models()[model["model"]].spec(model["model"]))
        return find_ffns(loaded)[model["layer"]].keys().detach().float()
    neurons, hidden = model["neurons"], model["hidden"]
    generator = torch.Generator().manual_seed(derive_seed("keys", neurons, hidden))
    centres = torch.randn(128, hidden, generator=generator)
    rows = torch.randn(neurons, hidden, generator=generator)
    return rows + 0.25 * centres[torch.randint(128, (neurons,), generator=generator)]


def _kmeans_constrained(keys: Tensor, num_clusters: int, starts: int) -> Tensor:
    """Cluster as the authors do: normalised keys, equal sizes, random state 0."""
    from k_means_constrained import KMeansConstrained

    size = len(keys) // num_clusters
    clusterer = KMeansConstrained(n_clusters=num_clusters, size_min=size, size_max=size, n_init=starts, random_state=0)
    return torch.from_numpy(clusterer.fit_predict(F.normalize(keys, dim=1).double().numpy()).astype(np.int64))


_MEASURES: dict[str, Callable[[Mapping[str, Any], Settings], Numbers]] = {
    "layer": measure_layer,
    "step": measure_step,
    "decode": measure_ffns,
    "prompt": measure_ffns,
    "generate": measure_generate,
    "partition": measure_partition,
}
