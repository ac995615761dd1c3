"""Measure candidates under one setting with torch.utils.benchmark, in turn in one process."""

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
from torch.utils.benchmark import Timer
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, MixtralConfig, NemotronHConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

import emoe
from benchmarks.harness.base import derive_seed
from benchmarks.harness.config.catalogue import load_models
from benchmarks.harness.config.yaml import parse
from benchmarks.harness.models.loading import load_backbone
from benchmarks.harness.training.progress import Progress
from benchmarks.speed.definition import Settings
from emoe.architectures import FFN, find_ffns
from emoe.clustering import balanced_kmeans, explained_variance_ratio
from emoe.sparse.cost_model import predicted_time_ratio

_PROMPT = 16  # tokens before an answer
_MIN_SECONDS = 0.1  # of a candidate's calls in a round

Model = Mapping[str, Any]  # of a run's spec
Numbers = dict[str, dict[str, float]]  # by candidate and metric


def run(spec: Mapping[str, Any], folder: Path, progress: Progress) -> dict[str, Any]:
    """Measure the candidates of a run's spec; return the numbers by candidate for ``metrics.json``."""
    measure = spec["task"]["name"]
    settings = parse(spec["settings"], Settings, str(folder / "run.json"), "settings")
    torch.set_num_threads(settings.threads)
    torch.manual_seed(derive_seed("speed", spec["seed"]))
    progress.say(f"measuring the {measure}")
    return {"measured": _MEASURES[measure](spec["model"], settings), "cost": {}}


def time_in_turn(call: Callable[[Any], object], nets: Mapping[str, Any], settings: Settings) -> Numbers:
    """Time a call of each net, including ``dense``, in turn, so that a disturbance affects all of them.

    Each round begins with a warm-up. The ``ratio`` is to the dense time in the same round (median, lowest, highest).
    """
    timers = {
        name: Timer("call(net)", globals={"call": call, "net": net}, num_threads=settings.threads)
        for name, net in nets.items()
    }
    rounds = [
        {name: timer.blocked_autorange(min_run_time=_MIN_SECONDS).median for name, timer in timers.items()}
        for _ in range(settings.rounds)
    ]
    seconds = pd.DataFrame(rounds)
    ratios = seconds.div(seconds["dense"], axis=0)
    numbers = {"ratio": ratios.median(), "ratio_low": ratios.min(), "ratio_high": ratios.max()}
    return cast(Numbers, pd.DataFrame(numbers | {"seconds": seconds.median()}).to_dict("index"))


def build(model: Model, settings: Settings, auto: Any = AutoModel) -> Any:
    """Build a model with random weights from its configuration, with a class that chooses its architecture."""
    return auto.from_config(AutoConfig.for_model(**model["config"])).to(getattr(torch, settings.dtype))


class TransformersExperts(nn.Module):
    """Compute the FFN's blocks, chosen by mean keys, in an expert layer of transformers (without biases).

    Args:
        implementation: The implementation of transformers' experts, ``eager`` or ``grouped_mm``.
    """

    def __init__(self, ffn: FFN, num_experts: int, top_k: int, implementation: str) -> None:
        super().__init__()
        self.top_k = top_k
        keys, outer = ffn.keys().detach().unflatten(0, (num_experts, -1)), cast(Tensor, ffn.proj_out.weight).detach()
        self.register_buffer("gate", keys.mean(1))
        sizes = {"hidden_size": keys.shape[2], "experts_implementation": implementation}
        if ffn.proj_up is None:
            sizes |= {"n_routed_experts": num_experts, "moe_intermediate_size": keys.shape[1]}
            self.experts: Any = NemotronHExperts(NemotronHConfig(**sizes, mlp_hidden_act="gelu"))
            self.experts.up_proj = nn.Parameter(keys.clone())
        else:
            sizes |= {"num_local_experts": num_experts, "intermediate_size": keys.shape[1]}
            self.experts = MixtralExperts(MixtralConfig(**sizes, hidden_act="silu"))
            up = cast(Tensor, ffn.proj_up.weight).detach().unflatten(0, (num_experts, -1))
            self.experts.gate_up_proj = nn.Parameter(torch.cat([keys, up], 1))
        self.experts.down_proj = nn.Parameter(outer.unflatten(1, (num_experts, -1)).transpose(0, 1).contiguous())

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            chosen = F.linear(x, cast(Tensor, self.gate)).topk(self.top_k, dim=-1).indices
        return cast(Tensor, self.experts(x, chosen, torch.ones_like(chosen, dtype=x.dtype)))


def candidates(dense: Any, settings: Settings) -> dict[str, Any]:
    """Return the dense model and a converted copy per candidate, by name; most names are backends."""
    nets, n = {"dense": dense}, settings.num_experts
    k = round(settings.top_k_fraction * n)
    for name in settings.candidates:
        nets[name] = net = copy.deepcopy(dense)
        backend, _, implementation = name.partition("_")
        if backend == "transformers":
            net.layers[0].mlp = TransformersExperts(find_ffns(net)[0], n, k, implementation)
            continue
        # contiguous experts, as in the transformers layer
        emoe.convert_(net, emoe.EMoEConfig(num_experts=n, top_k=k, layers=settings.layers, partition="contiguous"))
        if name == "inference":
            emoe.for_inference_(net)
        else:
            emoe.set_backend_(net, name)
    return nets


def measure_layer(model: Model, settings: Settings) -> Numbers:
    """Measure one FFN, forward and backward: its time, and the memory that is kept for the backward pass."""
    dense = build(model, settings)
    x = torch.randn(settings.tokens, dense.config.hidden_size, dtype=dense.dtype)
    gradient = torch.randn_like(x)
    ffns = {name: net.layers[0].mlp for name, net in candidates(dense, settings).items()}

    def pass_through(ffn: nn.Module) -> None:
        ffn.zero_grad()
        ffn(x.detach().requires_grad_()).backward(gradient)

    numbers = time_in_turn(pass_through, ffns, settings)
    kept = {name: kept_bytes(ffn, x.requires_grad_()) for name, ffn in ffns.items()}
    for name, row in numbers.items():
        row["memory_ratio"] = kept[name] / kept["dense"]
    hidden, expert_size = dense.config.hidden_size, dense.config.intermediate_size // settings.num_experts
    share = settings.top_k_fraction
    expected = predicted_time_ratio(len(x), hidden, expert_size, share, x.dtype, settings.threads)
    if "sparse" in numbers and expected is not None:
        numbers["sparse"]["expected_ratio"] = expected
    return numbers


def kept_bytes(net: nn.Module, x: Tensor) -> int:
    """Count the bytes that a forward pass keeps for the backward pass, without weights and buffers."""
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        net(x)
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*net.parameters(), *net.buffers())}
    return sum(size for pointer, size in sizes.items() if pointer not in weights)


def measure_step(model: Model, settings: Settings) -> Numbers:
    """Measure a training step of a whole model: forward, backward, AdamW."""
    dense = build(model, settings)
    config = dense.config
    if dense.main_input_name == "pixel_values":
        shape = (settings.batch_size, config.num_channels, config.image_size, config.image_size)
        inputs = {"pixel_values": torch.randn(shape)}
    else:
        ids = torch.randint(config.vocab_size, (settings.batch_size, settings.tokens))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def step(trained: tuple[nn.Module, torch.optim.Optimizer]) -> None:
        net, optimizer = trained
        optimizer.zero_grad()
        net(**inputs).last_hidden_state.square().mean().backward()
        optimizer.step()

    nets = candidates(dense, settings)
    pairs = {name: (net, torch.optim.AdamW(net.parameters())) for name, net in nets.items()}
    return time_in_turn(step, pairs, settings)


def measure_ffns(model: Model, settings: Settings) -> Numbers:
    """Measure ``tokens`` tokens at once through all FFNs of a language model; the model exceeds CPU caches."""
    dense = build(model, settings).eval()
    x = torch.randn(1, settings.tokens, dense.config.hidden_size, dtype=dense.dtype)

    @torch.inference_mode()
    def pass_through(net: Any) -> None:
        for layer in net.layers:
            layer.mlp(x)

    return time_in_turn(pass_through, candidates(dense, settings), settings)


def measure_generate(model: Model, settings: Settings) -> Numbers:
    """Measure a greedy answer of ``tokens`` tokens to a prompt of 16, with a key-value cache."""
    dense = build(model, settings, AutoModelForCausalLM).eval()
    prompt = torch.randint(3, dense.config.vocab_size, (1, _PROMPT))
    options: dict[str, Any] = {"max_new_tokens": settings.tokens, "min_new_tokens": settings.tokens, "do_sample": False}
    options |= {"attention_mask": torch.ones_like(prompt), "pad_token_id": 0}
    return time_in_turn(lambda net: net.generate(prompt, **options), candidates(dense, settings), settings)


def measure_partition(model: Model, settings: Settings) -> Numbers:
    """Measure balanced clustering of one layer's keys: seconds, and the share of the variance that is unexplained."""
    name = model.get("model")  # in models.yaml
    net = load_backbone(load_models()[name].spec(name)) if name else build(model, settings)
    keys, n = find_ffns(net)[model.get("layer", 0)].keys().detach().float(), settings.num_experts
    numbers: Numbers = {}
    for candidate in settings.candidates:
        start, cpu = time.perf_counter(), time.process_time()  # a single call is enough: it takes seconds
        labels = balanced_kmeans(keys, n) if candidate == "emoe" else _kmeans_constrained(keys, n, settings.starts)
        numbers[candidate] = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
        numbers[candidate]["inertia"] = 1 - explained_variance_ratio(keys, labels, n)
    if library := numbers.get("kmeans_constrained"):
        for row in numbers.values():
            row["ratio"] = row["seconds"] / library["seconds"]
    return numbers


def _kmeans_constrained(keys: Tensor, num_clusters: int, starts: int) -> Tensor:
    """Cluster as the authors do: normalised keys, equal sizes, random state 0."""
    from k_means_constrained import KMeansConstrained

    size = len(keys) // num_clusters
    clusterer = KMeansConstrained(n_clusters=num_clusters, size_min=size, size_max=size, n_init=starts, random_state=0)
    return torch.from_numpy(clusterer.fit_predict(F.normalize(keys, dim=1).double().numpy()).astype(np.int64))


_MEASURES: dict[str, Callable[[Model, Settings], Numbers]] = {
    "layer": measure_layer,
    "step": measure_step,
    "decode": measure_ffns,
    "prompt": measure_ffns,
    "generate": measure_generate,
    "partition": measure_partition,
}
