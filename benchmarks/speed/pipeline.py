"""Measure candidates under one setting with torch.utils.benchmark, in turn in one process."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.benchmark import Timer
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import emoe
from benchmarks.harness.base import derive_seed
from benchmarks.harness.models.loading import load_pretrained
from benchmarks.harness.training.progress import Progress
from benchmarks.speed.definition import MeasurementSpec, Settings
from emoe.architectures import find_ffns
from emoe.clustering import balanced_kmeans, explained_variance_ratio

_ROUNDS = 5
_MIN_SECONDS = 0.1  # time of a candidate per round
# the timed statement of each measure; `variables` sets its names
_STATEMENTS = {
    "layer": "net.zero_grad(); net.layers[0].mlp(x.detach().requires_grad_()).backward(x)",
    "step": "optimizer.zero_grad(); net(**inputs).last_hidden_state.square().mean().backward(); optimizer.step()",
    "forward": "with torch.inference_mode(): [layer.mlp(x) for layer in net.layers]",
    "generate": "net.generate(**inputs, max_new_tokens=24, min_new_tokens=24, do_sample=False, pad_token_id=0)",
}


def run(spec: MeasurementSpec, _folder: Path, progress: Progress) -> dict[str, Any]:
    """Measure the candidates of a run's spec; return the numbers by candidate for ``metrics.json``."""
    measure = spec.task.name
    settings = spec.settings
    torch.set_num_threads(settings.threads)
    progress.say(f"measuring the {measure}")
    auto = AutoModelForCausalLM if measure == "generate" else AutoModel
    dense: Any = load_pretrained(auto, spec.model, dtype=getattr(torch, settings.dtype))
    if measure == "partition":
        return {"measured": measure_partition(dense, settings), "cost": {}}
    dense.train(measure in ("layer", "step"))
    timers = {}
    for name in ("dense", *settings.candidates):
        net = dense if name == "dense" else make_candidate(name, dense, settings)
        torch.manual_seed(derive_seed("speed", spec.seed))  # the same inputs for all
        timers[name] = Timer(
            _STATEMENTS[measure], globals=variables(net, settings), num_threads=settings.threads
        )
    return {"measured": time_in_turn(timers), "cost": {}}


def make_candidate(name: str, dense: Any, settings: Settings) -> Any:
    """Convert a copy for a backend or ``inference``, or build transformers' expert layer with the FFN's sizes."""
    n = settings.num_experts
    k = round(settings.top_k_fraction * n)
    if name.startswith("mixtral_"):
        width, expert_size = dense.config.hidden_size, dense.config.intermediate_size // n
        sizes = {"hidden_size": width, "intermediate_size": expert_size, "num_local_experts": n}
        config = AutoConfig.for_model(
            "mixtral", num_hidden_layers=1, vocab_size=8, num_experts_per_tok=k, **sizes
        )
        return AutoModel.from_config(
            config, experts_implementation=name.removeprefix("mixtral_")
        ).to(dense.dtype)
    net = copy.deepcopy(dense)
    emoe.convert_(
        net, emoe.EMoEConfig(num_experts=n, top_k=k, layers=settings.layers, partition="contiguous")
    )
    if name == "inference":
        emoe.for_inference_(net)
    else:
        emoe.set_backend_(net, name)
    return net


def variables(net: Any, settings: Settings) -> dict[str, Any]:
    """Return the variables of the timed statements: ``inputs`` of the model, and ``x`` of an FFN, ``[1, T, width]``."""
    config, rows = net.config, settings.batch_size
    x = torch.randn(1, settings.tokens, config.hidden_size, dtype=net.dtype)
    if net.main_input_name == "pixel_values":
        inputs = {
            "pixel_values": torch.randn(
                rows, config.num_channels, config.image_size, config.image_size
            )
        }
    else:
        ids = torch.randint(config.vocab_size, (rows, settings.tokens))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {"net": net, "x": x, "inputs": inputs, "optimizer": torch.optim.AdamW(net.parameters())}


def time_in_turn(timers: Mapping[str, Timer]) -> dict[Any, Any]:
    """Time all candidates, including ``dense``, in each round, so that disturbances affect all.

    Each round begins with a warm-up. The ``ratio`` is to the dense time in the same round (median, lowest, highest).
    """
    seconds = pd.DataFrame(
        {
            name: timer.blocked_autorange(min_run_time=_MIN_SECONDS).median
            for name, timer in timers.items()
        }
        for _ in range(_ROUNDS)
    )
    ratios = seconds.div(seconds["dense"], axis=0)
    numbers = {"ratio": ratios.median(), "ratio_low": ratios.min(), "ratio_high": ratios.max()}
    return pd.DataFrame(numbers | {"seconds": seconds.median()}).to_dict("index")


def measure_partition(net: Any, settings: Settings) -> dict[str, dict[str, float]]:
    """Measure balanced clustering of the last layer's keys: seconds, and share of unexplained variance."""
    keys, n = find_ffns(net)[-1].keys().detach().float(), settings.num_experts
    numbers = {}
    for candidate in settings.candidates:
        start = time.perf_counter()  # a single call is enough: it takes seconds
        labels = balanced_kmeans(keys, n) if candidate == "emoe" else _kmeans_constrained(keys, n)
        numbers[candidate] = {"seconds": time.perf_counter() - start}
        numbers[candidate]["inertia"] = 1 - explained_variance_ratio(keys, labels, n)
    return numbers


def _kmeans_constrained(keys: Tensor, num_clusters: int) -> Tensor:
    """Cluster as the authors do: normalised keys, equal sizes, ten starts, random state 0."""
    from k_means_constrained import KMeansConstrained

    size = len(keys) // num_clusters
    clusterer = KMeansConstrained(
        n_clusters=num_clusters, size_min=size, size_max=size, random_state=0
    )
    return torch.from_numpy(clusterer.fit_predict(F.normalize(keys, dim=1).double().numpy())).long()
