"""Mutants of code: runs of the suite executed with something else than their settings say, their ids and records unchanged."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn
from transformers import TrainingArguments

from benchmarks.domainbed.batches import TrainingRows
from benchmarks.harness.base.paths import RUNS
from benchmarks.harness.config.runs import Run
from benchmarks.harness.models import build
from benchmarks.harness.models.conversion import apply_method_
from benchmarks.harness.results.records import read_metrics
from benchmarks.harness.results.reference import Tolerances
from benchmarks.harness.results.regression import as_reference
from benchmarks.harness.run.repetition import Repetition, prepare_folder, repeat
from benchmarks.harness.training.trainer import RoutedTrainer
from benchmarks.text.training import TextTrainer
from tests.mutation.mutants import Verdict, judged

Config = dict[str, Any]
# written by a mutant that found something to change
_TOUCHED = Path("touched.txt")


@dataclass(frozen=True)
class Mutation:
    """Something else than a run's settings say.

    Attributes:
        name: for readers.
        apply: does it in the process of the run.
        fits: whether a run has what is changed.
    """

    name: str
    apply: Callable[[], None]
    fits: Callable[[Mapping[str, Any]], bool]


def _touch() -> None:
    _TOUCHED.write_text("yes")


def _put(where: Any, name: str, mutant: Any) -> None:
    """Replace something for the rest of the process."""
    mock.patch.object(where, name, mutant).start()


def _config(name: str, change: Callable[[Config], Config], fits: Callable[[Config], bool]) -> Mutation:
    """A mutant whose experts are configured otherwise."""

    def apply() -> None:
        before = apply_method_

        def mutant(model: nn.Module, method: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
            _touch()
            return before(
                model, {**method, "config": {**method["config"], **change(method["config"])}}, *args, **kwargs
            )

        _put(build, "apply_method_", mutant)

    return Mutation(name, apply, lambda spec: bool(spec["method"]["config"]) and fits(spec["method"]["config"]))


def _noise_off() -> None:
    before = apply_method_

    def mutant(model: nn.Module, method: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        _touch()
        return before(model, {**method, "noise": 0.0}, *args, **kwargs)

    _put(build, "apply_method_", mutant)


def _faster() -> None:
    before = TrainingArguments.__post_init__

    def mutant(self: TrainingArguments) -> None:
        _touch()
        self.learning_rate *= 1.1
        before(self)

    _put(TrainingArguments, "__post_init__", mutant)
    adam = torch.optim.Adam  # DomainBed's is made with a rate of its own
    before_init = adam.__init__

    def faster(self: Any, params: Any, lr: float = 1e-3, *args: Any, **kwargs: Any) -> None:
        before_init(self, params, lr * 1.1 if type(self) is adam else lr, *args, **kwargs)

    _put(adam, "__init__", faster)


def _no_dropout() -> None:
    before = RoutedTrainer.__init__

    def mutant(self: Any, **kwargs: Any) -> None:
        for module in kwargs["trainable"].model.modules():
            if isinstance(module, nn.Dropout) and module.p:
                module.p = 0.0
                _touch()
        before(self, **kwargs)

    _put(RoutedTrainer, "__init__", mutant)


def _wrong_labels() -> None:
    rows_of, item = TextTrainer._rows, TrainingRows.__getitem__

    def text(self: TextTrainer, split: Any, *, by_length: bool) -> Any:
        rows = rows_of(self, split, by_length=by_length)
        if not by_length:  # those to train on
            _touch()
            draw = random.Random(0)
            chosen = draw.sample(range(len(rows)), max(len(rows) // 20, 2))
            labels: Any = rows._labels
            changed = list(labels)  # the split keeps its own
            for place, other in zip(chosen, draw.sample(chosen, len(chosen)), strict=True):
                changed[place] = labels[other]
            rows._labels = changed
        return rows

    def image(self: TrainingRows, draw: tuple[int, int, int]) -> dict[str, Any]:
        found = item(self, draw)
        _, env, place = draw
        if random.Random(f"{env} {place}").random() < 0.05:
            _touch()
            labels, rows = self._environments[env].labels, self._rows[env]
            found["labels"] = labels[rows[(place + 1) % len(rows)]]
        return found

    _put(TextTrainer, "_rows", text)
    _put(TrainingRows, "__getitem__", image)


def _partial(config: Config) -> bool:
    """Whether it matters which experts are chosen."""
    return bool(config["top_k"] < config["num_experts"])


def _emoe(config: Config) -> bool:
    return config["kind"] == "emoe" and _partial(config)


def _avg_k(config: Config) -> bool:
    return _emoe(config) and bool(config["router"] == "avg_k")


def _other_layer(config: Config) -> Config:
    layers = config["layers"]
    return {"layers": [layer - 1 for layer in layers] if isinstance(layers, list) else "1::1"}


def _trains(spec: Mapping[str, Any]) -> bool:
    return bool(spec["learning_rate"])


MUTATIONS = (
    _config("k halved", lambda config: {"top_k": config["top_k"] // 2}, lambda config: config["top_k"] > 1),
    _config("N doubled", lambda config: {"num_experts": 2 * config["num_experts"]}, _partial),
    _config("another layer", _other_layer, lambda config: True),
    _config("the rest instead of the top k", lambda config: {"selection": "not_top"}, _emoe),
    _config("random experts", lambda config: {"selection": "random"}, _emoe),
    _config("the worst instead of the top k", lambda config: {"selection": "bottom"}, _emoe),
    _config("another score", lambda config: {"score": "inter"}, _avg_k),
    _config(
        "a learned gate instead of avg-k",
        lambda config: {"router": "cosine", "score": "keys", "weighting": "softmax_times_k"},
        _avg_k,
    ),
    _config(
        "a random partition instead of clusters",
        lambda config: {"partition": "random"},
        lambda config: _emoe(config) and config["partition"] == "kmeans",
    ),
    _config(
        "no balance loss",
        lambda config: {"aux_loss_coefficient": 0.0},
        lambda config: config["aux_loss_coefficient"] > 0,
    ),
    # 0 is refused where the published balance loss divides by it
    _config("no router noise", lambda config: {"router_noise": 1e-6}, lambda config: config["router_noise"] > 0),
    Mutation("no noise on the weights", _noise_off, lambda spec: spec["method"]["noise"] > 0),
    _config(
        "no dropout of experts", lambda config: {"expert_dropout": 0.0}, lambda config: config["expert_dropout"] > 0
    ),
    Mutation("learning rate × 1.1", _faster, _trains),
    Mutation("dropout off", _no_dropout, _trains),
    Mutation("5 % of labels permuted", _wrong_labels, lambda spec: _trains(spec) and spec["benchmark"] != "llama"),
)


def affected(mutation: Mutation, runs: Sequence[Run], each: int) -> list[Run]:
    """The runs that a mutation changes: of every benchmark the first ``each``."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        # what evaluates or measures alone has no method to change
        trained = "method" in run.spec and "candidates" not in run.spec and run.benchmark != "speed"
        if trained and mutation.fits(run.spec):
            found.setdefault(run.benchmark, []).append(run)
    return [run for some in found.values() for run in some[:each]]


def method_mutants(
    runs: Sequence[Run],
    mutations: Sequence[Mutation],
    folder: Path,
    tolerances: Callable[[], Tolerances],
    *,
    each: int,
    jobs: int,
    root: Path = RUNS,
) -> Iterator[Verdict]:
    """Execute mutants below a folder and judge them against the finished runs.

    Args:
        runs: of the suite, finished.
        mutations: what to do to them.
        folder: a temporary one.
        tolerances: measured spreads.
        each: runs of a benchmark that a mutation is done to.
        jobs: at a time.
        root: the finished runs.
    """
    todo: list[tuple[Mutation, Run, Repetition]] = []
    for number, mutation in enumerate(mutations):
        for run in affected(mutation, runs, each):
            place = (folder / f"{number}" / run.id).resolve()
            prepare_folder(place)
            threads = int(read_metrics(run, root)["environment"]["threads"])
            todo.append((mutation, run, Repetition(run, place, threads, mutation.apply)))
    failed = repeat([repetition for *_, repetition in todo], jobs=jobs)
    for mutation, run, repetition in todo:
        if repetition in failed:
            log = repetition.log.read_text().strip().splitlines()[-1]
            yield Verdict(mutation.name, run.id, excluded=f"does not run: {log}")
        elif not (repetition.folder / _TOUCHED).exists():
            yield Verdict(mutation.name, run.id, excluded="nothing there to change")
        else:
            blessed = as_reference([(run, read_metrics(run, root))])
            mutant = as_reference([(run, read_metrics(run, repetition.folder / RUNS))])
            # a fingerprint is of the machine, and a mutant's is the same
            yield judged(mutation.name, run.id, blessed, mutant.rows, tolerances)
