"""Measure implementations (candidates) in turn in one process, with torch.utils.benchmark."""

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
_MIN_SECONDS = 0.1  # minimum time of the measurement of a candidate in each round
# the timed statement of each measure; `timer_globals` returns the values of the names in it
_STATEMENTS = {
    # `x` is also the gradient of the output: any tensor of the output's shape serves
    "layer": "net.zero_grad(); net.layers[0].mlp(x.detach().requires_grad_()).backward(x)",
    "step": (
        "optimizer.zero_grad(); "
        "net(**inputs).last_hidden_state.square().mean().backward(); "
        "optimizer.step()"
    ),
    "forward": "with torch.inference_mode(): [layer.mlp(x) for layer in net.layers]",
    "generate": (
        "net.generate(**inputs, max_new_tokens=24, min_new_tokens=24, "
        "do_sample=False, pad_token_id=0)"
    ),
}


def run(spec: MeasurementSpec, _folder: Path, progress: Progress) -> dict[str, Any]:
    """Measure the compared implementations (candidates) of a run.

    Args:
        spec: The run's spec.
        _folder: The run's folder, in which nothing is written.
        progress: The progress line.

    Returns:
        The content of ``metrics.json``, without the sections that the harness adds. ``measured``
        has the numbers of each candidate, and ``cost`` is empty.
    """
    measure = spec.task.name
    settings = spec.settings
    torch.set_num_threads(settings.threads)
    progress.say(f"measuring the {measure}")
    model_class = AutoModelForCausalLM if measure == "generate" else AutoModel
    dtype = getattr(torch, settings.dtype)
    dense: Any = load_pretrained(model_class, spec.model, dtype=dtype)
    if measure == "partition":
        measured = measure_partition(dense, settings)
    else:
        # these measures include a backward pass
        is_trained = measure in ("layer", "step")
        dense.train(is_trained)
        timers = make_timers(dense, measure, settings, spec.seed)
        measured = time_in_turn(timers)
    return {"measured": measured, "cost": {}}


def make_timers(dense: Any, measure: str, settings: Settings, seed: int) -> dict[str, Timer]:
    """Make a timer for the dense model and for each candidate, by name.

    All of them time the same statement, that of the measure in ``_STATEMENTS``.
    """
    statement = _STATEMENTS[measure]
    timers = {}
    for name in ("dense", *settings.candidates):
        net = dense
        if name != "dense":
            net = make_candidate(name, dense, settings)
        # seeded just before `timer_globals` draws the inputs, so that all models get the same ones
        torch.manual_seed(derive_seed("speed", seed))
        timers[name] = Timer(
            statement, globals=timer_globals(net, settings), num_threads=settings.threads
        )
    return timers


def make_candidate(name: str, dense: Any, settings: Settings) -> Any:
    """Make the model of a candidate, whose time is compared with that of the dense model.

    Args:
        name: The name of the candidate. ``inference``, or the name of a backend such as ``sparse``,
            stands for a converted copy of the dense model. A name such as ``mixtral_eager`` stands
            for transformers' expert layer, in the implementation ``eager`` and with the sizes of
            the dense model's FFN.
        dense: The dense model.
        settings: The settings of the run.
    """
    num_experts = settings.num_experts
    top_k = round(settings.top_k_fraction * num_experts)
    if name.startswith("mixtral_"):
        implementation = name.removeprefix("mixtral_")
        return _make_mixtral(implementation, dense, num_experts, top_k)
    config = emoe.EMoEConfig(
        num_experts=num_experts, top_k=top_k, layers=settings.layers, partition="contiguous"
    )
    net = copy.deepcopy(dense)
    emoe.convert_(net, config)
    if name == "inference":
        emoe.for_inference_(net)
    else:
        emoe.set_backend_(net, name)
    return net


def _make_mixtral(implementation: str, dense: Any, num_experts: int, top_k: int) -> Any:
    """Build a Mixtral of one layer. All experts together have the size of the dense FFN."""
    config = AutoConfig.for_model(
        "mixtral",
        hidden_size=dense.config.hidden_size,
        intermediate_size=dense.config.intermediate_size // num_experts,
        num_hidden_layers=1,
        vocab_size=8,
        num_local_experts=num_experts,
        num_experts_per_tok=top_k,
    )
    net = AutoModel.from_config(config, experts_implementation=implementation)
    return net.to(dense.dtype)


def timer_globals(net: Any, settings: Settings) -> dict[str, Any]:
    """Return the variables of the timed statements, by name.

    They are the model ``net``, the ``inputs`` of the model, the input ``x`` of an FFN
    ``[1, tokens, width]``, and an ``optimizer``. The inputs are random.
    """
    config = net.config
    num_rows = settings.batch_size
    x = torch.randn(1, settings.tokens, config.hidden_size, dtype=net.dtype)
    if net.main_input_name == "pixel_values":
        size = config.image_size
        inputs = {"pixel_values": torch.randn(num_rows, config.num_channels, size, size)}
    else:
        ids = torch.randint(config.vocab_size, (num_rows, settings.tokens))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    optimizer = torch.optim.AdamW(net.parameters())
    return {"net": net, "x": x, "inputs": inputs, "optimizer": optimizer}


def time_in_turn(timers: Mapping[str, Timer]) -> dict[Any, Any]:
    """Time all candidates in each round, so that disturbances of the machine affect all of them.

    Args:
        timers: The timers of the candidates, by name. One of them is ``dense``.

    Returns:
        The numbers of each candidate. ``seconds`` is the median time. ``ratio`` is the median, over
        rounds, of the time divided by the dense time in the same round. ``ratio_low`` and
        ``ratio_high`` are the lowest and the highest of these ratios.
    """
    rounds = []
    for _ in range(_ROUNDS):
        seconds_of_round = {}
        for name, timer in timers.items():
            # this call begins with a warm-up
            measurement = timer.blocked_autorange(min_run_time=_MIN_SECONDS)
            seconds_of_round[name] = measurement.median
        rounds.append(seconds_of_round)
    # a row for each round, a column for each candidate
    seconds = pd.DataFrame(rounds)
    ratios = seconds.div(seconds["dense"], axis=0)
    # a row for each candidate
    numbers = pd.DataFrame(
        {
            "ratio": ratios.median(),
            "ratio_low": ratios.min(),
            "ratio_high": ratios.max(),
            "seconds": seconds.median(),
        }
    )
    return numbers.to_dict("index")


def measure_partition(net: Any, settings: Settings) -> dict[str, dict[str, float]]:
    """Measure the balanced clustering of the neurons in the last FFN, by their keys.

    The key of a neuron is its weight vector in the FFN's in-projection. The candidates are EMoE's
    clustering (``emoe``) and the authors' clustering (``kmeans_constrained``).

    Returns:
        For each candidate, the time ``seconds`` and the ``inertia``. The inertia is the share of
        the variance that the clusters do not explain.
    """
    last_ffn = find_ffns(net)[-1]
    key_vectors = last_ffn.keys().detach().float()  # [neurons, width]
    num_clusters = settings.num_experts
    numbers = {}
    for candidate in settings.candidates:
        # a single call is enough: it takes seconds
        start = time.perf_counter()
        if candidate == "emoe":
            labels = balanced_kmeans(key_vectors, num_clusters)
        else:
            labels = _kmeans_constrained(key_vectors, num_clusters)
        seconds = time.perf_counter() - start
        unexplained = 1 - explained_variance_ratio(key_vectors, labels, num_clusters)
        numbers[candidate] = {"seconds": seconds, "inertia": unexplained}
    return numbers


def _kmeans_constrained(keys: Tensor, num_clusters: int) -> Tensor:
    """Cluster as the authors do: normalised keys, equal sizes, ten starts, random state 0.

    Returns:
        The cluster of each neuron, ``[neurons]``.
    """
    from k_means_constrained import KMeansConstrained

    size = len(keys) // num_clusters
    # the default is ten starts
    clusterer = KMeansConstrained(
        n_clusters=num_clusters, size_min=size, size_max=size, random_state=0
    )
    rows = F.normalize(keys, dim=1).double().numpy()
    labels = clusterer.fit_predict(rows)
    return torch.from_numpy(labels).long()
