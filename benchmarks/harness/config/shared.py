"""What the definitions of several kinds of benchmark have in common: methods, adapters, resources, axes of a grid."""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, create_model

from benchmarks.harness.config.schema import (
    AS_GIVEN,
    AsGiven,
    Count,
    Counts,
    Key,
    Names,
    NotNegative,
    Positive,
    Rate,
    Registered,
    Share,
    Shares,
    Strict,
    Whole,
    left_out,
)
from benchmarks.harness.config.tunings import TUNINGS
from emoe.config import ROUTERS, EMoEConfig, GMoEConfig

Layers = str | Annotated[list[int], Field(min_length=1)]
Precision = Literal["fp32", "fp16", "bf16"]
Role = Literal["baseline", "method", "control", "ablation"]
CONTROL, ABLATION = "control", "ablation"

# bounds of numbers: their names in a configuration, and pydantic's
_BOUNDS = {"minimum": "ge", "maximum": "le", "exclusiveMinimum": "gt", "exclusiveMaximum": "lt"}


def _config_fields() -> dict[str, Any]:
    """Every field of the two configurations, each of which a method may leave out."""
    fields: dict[str, Any] = {}
    for config in (GMoEConfig, EMoEConfig):
        hints, descriptions = typing.get_type_hints(config), _field_descriptions(config)
        for field in dataclasses.fields(config):
            bounds = {_BOUNDS[bound]: value for bound, value in field.metadata.items()}
            hint: Any = hints[field.name]
            if field.name == "router":
                hint = Annotated[str, Registered(ROUTERS)]
            elif float in (hint, *typing.get_args(hint)):
                number: Any = Annotated[float, Field(**bounds), AS_GIVEN]
                hint, bounds = number | None if type(None) in typing.get_args(hint) else number, {}
            fields[field.name] = (hint, Field(None, description=descriptions[field.name], **bounds))
    return {name: field for name, field in fields.items() if name not in ("version", "layers", "partition_seed")}


def _field_descriptions(config: type) -> dict[str, str]:
    """Read the descriptions of a dataclass's fields from its docstring and those of its bases."""
    descriptions = {}
    for cls in reversed(config.__mro__):
        _, _, attributes = (inspect.getdoc(cls) or "").partition("Attributes:\n")
        for name, text in re.findall(r"^    (\w+): (.*(?:\n        .*)*)", attributes, re.MULTILINE):
            descriptions[name] = re.sub(r":\w+:`([^`]*)`", r"\1", " ".join(text.split())).replace("``", "'")
    return descriptions


if TYPE_CHECKING:
    _ConfigFields = AsGiven
else:
    _ConfigFields = create_model("_ConfigFields", __base__=AsGiven, **_config_fields())


class MethodSettings(_ConfigFields):
    """Settings of a method; beside these keys it takes every field of EMoEConfig and GMoEConfig."""

    title: str = left_out()
    """Label in tables and figures."""
    role: Role = left_out()
    """What the row is there for. An ablation stands in no table but those of `ablations`, each of its settings as a row of its own."""
    noise: NotNegative = left_out()
    """Intensity of noisy tuning; 0 for none."""
    tune: Annotated[str, Registered(TUNINGS)] | None = None
    """A registered way of tuning: what is trained beside adapters (where training.lora has any), head and routers, instead of everything.
    `blocks` are the transformer blocks whose FFNs `layers` names."""
    also_train: Names | None = None
    """With LoRA or `tune`: further modules to train, by the last part of their name (the authors' pooler and ln_f)."""
    as_published: Literal["tutel", "llama"] | None = None
    """Take the authors' own settings (of their Tutel layer, or of their Llama block mask) for every field that is not given."""
    top_k_fraction: Share | None = None
    """top_k as a share of num_experts."""
    layers: Layers | None = None
    """Which FFNs are converted: a list, 'all', 'last:2', 'last-half:2', 'last-quarter:2' or a slice."""
    partition_seed: int | Literal["run"] | None = None
    """Seed of the partition; `run` takes the run's own seed."""


class Method(MethodSettings):
    """What a method is: a title, a kind, and settings."""

    title: str
    """Label in tables and figures."""
    kind: Literal["dense", "emoe", "gmoe"]
    """Which model is built: the dense one, EMoE, or GMoE."""
    role: Role = "method"
    """What the row is there for."""
    noise: NotNegative = 0.0
    """Intensity of noisy tuning; 0 for none."""

    def config_values(self) -> dict[str, Any]:
        """What it says of the fields of a configuration; ``partition_seed`` may be ``run``."""
        own = {"title", "role", "kind", "noise", "top_k_fraction", "as_published", "tune", "also_train"}
        return {name: value for name, value in self.given().items() if name not in own}


class MethodRow(MethodSettings):
    """A method of methods.yaml as a benchmark compares it, with what differs from there."""

    method: str | None = None
    """Its name in methods.yaml, where the row has another."""


class MethodDefaults(Strict):
    """What methods take that leave it open, by their kind."""

    dense: MethodSettings = MethodSettings()
    """Of dense models."""
    emoe: MethodSettings = MethodSettings()
    """Of EMoE."""
    gmoe: MethodSettings = MethodSettings()
    """Of GMoE."""


class LoRA(Strict):
    """Low-rank adapters, by peft."""

    rank: Count
    """r, the rank."""
    alpha: Positive
    """The scale is alpha / rank."""
    dropout: Rate
    """Dropout before an adapter."""
    targets: Annotated[dict[str, Names], Field(min_length=1)]
    """Names of the adapted layers, by the model's type."""
    base_lr_ratio: Positive = 0.1
    """Learning rate of what is trained beside adapters and head, as a share of theirs."""


class Resources(Strict):
    """What the scheduler reserves for one run."""

    threads: Count = 1
    """CPU threads of one run."""
    mem_mb: Count = 3000
    """Megabytes of memory."""
    runtime: Count = 60
    """Minutes."""
    gpu: Whole = 0
    """GPUs."""


class VariantAxes(Strict):
    """Lists of method settings, which become part of the method's variant."""

    num_experts: Counts | None = left_out()
    """Values of num_experts to try."""
    top_k_fraction: Shares | None = left_out()
    """Values of top_k_fraction to try."""
    layers: Annotated[list[Layers], Field(min_length=1)] | None = left_out()
    """Values of layers to try."""


class TrainingSettings(Strict):
    """How every run of a benchmark is trained."""

    by_model: Mapping[str, Strict] = Field({})
    """Settings of single models."""


class Entry(Strict):
    """One task, set or measure of a benchmark."""

    title: str
    """Label in tables."""


class SuitePart(Strict):
    """One suite's part of a benchmark."""

    resources: Resources = Resources()
    """What the scheduler reserves for one run."""
    note: str | None = left_out()
    """A sentence for the report: how far the suite is from the paper's experiment."""


class Definition(Strict):
    """What every benchmark.yaml says."""

    kind: str | None = left_out()
    """The folder of benchmarks/ whose grid.py says what the runs are; this one's own where it has one, else text."""
    version: Count
    """Part of every run's identity. Raise it when the same settings would give other numbers, or more of them."""
    title: str
    """Heading of the benchmark's tables and of its section in the report."""
    pipeline: str
    """Importable module with `run(spec, folder, progress)`."""
    tables: Names
    """The tables that the benchmark's presentation makes, in the order of the report."""
    figures: dict[str, str] = Field({})
    """The figures that it draws, each with its caption."""
    paper: str | None = None
    """CSV with published numbers, in the benchmark's folder; null where there are none."""
    suites: Mapping[str, SuitePart]
    """What to run, by suite."""


class TrainingSuite(SuitePart):
    """What one suite says of a benchmark that trains models by methods."""

    method_defaults: MethodDefaults = MethodDefaults()
    """What methods take that leave it open, by their kind; before the benchmark's."""
    methods: dict[str, MethodSettings] = Field({})
    """Settings of single methods that differ in this suite, by method."""


class MethodsDefinition(Definition):
    """What a benchmark says that compares methods."""

    baseline: str
    """The method that differences are taken against."""
    method_defaults: MethodDefaults = MethodDefaults()
    """What methods take that leave it open, by their kind. A row's own setting goes before it, a suite's default before the benchmark's."""
    methods: Annotated[dict[Key, MethodRow], Field(min_length=1)]
    """What is compared: methods of methods.yaml, each with what differs here. The order is the order of the rows."""


class TrainingDefinition(MethodsDefinition):
    """What a benchmark says that trains models by methods."""

    suites: Mapping[str, TrainingSuite]
    """What to run, by suite."""
