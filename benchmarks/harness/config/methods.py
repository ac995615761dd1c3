"""Methods as data: settings, tunings, plugins, and the ``method`` part of a run's spec."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from benchmarks.harness.base import BENCHMARKS, ROOT, DefinitionError, read_yaml
from benchmarks.harness.config.yaml import (
    Count,
    Counts,
    ExplicitNulls,
    Key,
    Names,
    NotNegative,
    Positive,
    Rate,
    Share,
    Shares,
    Strict,
    Whole,
    optional,
    read,
    refusal,
    registered,
)
from emoe.config import (
    ROUTERS,
    BalanceLoss,
    Partition,
    Score,
    Selection,
    Weighting,
    resolve_layers,
)

if TYPE_CHECKING:
    from torch import nn


Tuning = Callable[["nn.Module", Any], Iterable[str]]
TUNINGS: dict[str, Tuning] = {}


def register_tuning(name: str, tuning: Tuning) -> None:
    """Register a tuning for ``tune: name``; ``docs/adding.md`` has a complete example.

    >>> register_tuning("norms", lambda model, layers: [name for name, _ in model.named_parameters() if "norm" in name])
    >>> del TUNINGS["norms"]

    Args:
        name: The name in YAML and of the parameter group in the record.
        tuning: The function that returns the names of the trained parameters, given the converted and adapted model
            and the method's ``layers``, or None.
    """
    TUNINGS[name] = tuning


def tuning_spec(name: str | None, layers: Any, also: Iterable[str] = ()) -> dict[str, Any]:
    """Make the ``tune`` part of a run's spec.

    Args:
        name: The name of the tuning; None if only adapters, head and routers are trained.
        layers: The layers of the method; None if it has none.
        also: Further modules to train, by the last part of their name.
    """
    if name is None or name == "blocks":  # blocks have a key of their own
        return {"blocks": layers if name else [], "also": list(also)}
    tune = {"blocks": [], "also": list(also), "tuning": name}
    return tune if layers is None else tune | {"layers": layers}


def is_below(name: str, modules: Iterable[str]) -> bool:
    """Return True if a parameter belongs to one of the modules with these paths."""
    return any(name.startswith(f"{module}.") for module in modules)


def _block_parameters(model: nn.Module, layers: Any) -> list[str]:
    """Return the parameters of the transformer blocks whose FFNs ``layers`` selects."""
    from emoe.architectures import find_ffns  # needs PyTorch, unlike planning

    ffns = find_ffns(model)
    blocks = [block_of(ffns[layer].name) for layer in resolve_layers(layers, len(ffns))]
    return [name for name, _ in model.named_parameters() if is_below(name, blocks)]


def block_of(ffn: str) -> str:
    """Return the path of an FFN's block: the FFN's path up to its last number."""
    parts = ffn.split(".")
    last = max(number for number, part in enumerate(parts) if part.isdigit())
    return ".".join(parts[: last + 1])


register_tuning("blocks", _block_parameters)
Layers = str | Annotated[list[int], Field(min_length=1)]
CONTROL, ABLATION = "control", "ablation"
Role = Literal["baseline", "method", "control", "ablation"]
Kind = Literal["dense", "emoe", "gmoe"]


class ExpertSettings(ExplicitNulls):
    """The fields of :class:`emoe.EMoEConfig` and :class:`emoe.GMoEConfig`, each optional.

    A field that no file sets has the default of the configuration, or the authors' value with `as_published`.
    """

    num_experts: Count | None = None
    """Number of experts N. EMoE: N must divide the FFN's width."""
    top_k: Count | None = None
    """Number k of experts that each token uses, see `selection`."""
    layers: Layers | None = None
    """FFNs to convert: a list, 'all', 'last:2', 'last-half:2', 'last-quarter:2' or a slice."""
    capacity_factor: Positive | None = None
    """Factor c: an expert takes at most top_k * int(c * ceil(T / N)) of the T tokens of a forward pass; null for no
    limit."""
    count_padding: bool | None = None
    """Count padding tokens in the capacity and the balance loss."""
    router_noise: NotNegative | None = None
    """Standard deviation of the noise on training scores, times num_experts."""
    aux_loss_coefficient: NotNegative | None = None
    """Weight of the balance loss."""
    balance_loss: BalanceLoss | None = None
    """Formula of the balance loss: `corrected`, or `published` for the authors' formula."""
    expert_dropout: Rate | None = None
    """Dropout probability on the hidden neurons of converted FFNs."""
    dropout_position: Literal["before", "after"] | None = None
    """expert_dropout `before` the activation (the authors' language code) or `after` it (their vision code)."""
    output_bias: Literal["shared", "per_expert", "per_expert_whole"] | None = None
    """Output bias: one of the FFN (`shared`), or one of each expert. An expert's bias starts as the FFN's divided by
    the number of active experts (`per_expert`), or, in GMoE only, as the FFN's (`per_expert_whole`)."""
    partition: Partition | None = None
    """Grouping of neurons into experts: balanced k-means on keys (`kmeans`) or on activations (`coactivation`),
    `random`, or `contiguous`."""
    partition_seed: Whole | Literal["run"] | None = None
    """Seed of the partition; `run` uses the run's seed."""
    router: Annotated[str, registered(ROUTERS)] | None = None
    """A registered router. `avg_k` scores an expert by the mean of its keys, `cosine` is EMoE-learn's."""
    selection: Selection | None = None
    """Chosen experts: the `top` k by score, the `bottom` k, `random` k, or all but the top k (`not_top`)."""
    score: Score | None = None
    """avg_k's score of an expert: the input times its mean key (`keys`), or the mean over its neurons of the
    pre-activation (`gate`), the up-projection (`up`, `up_abs`) or the out-projection's input (`inter`,
    `inter_abs`)."""
    score_bias: bool | None = None
    """Add the mean bias of an expert's neurons to the `keys` score."""
    gate_momentum: Rate | None = None
    """Momentum of running mean keys; with 0 the mean keys follow the weights."""
    weighting: Weighting | None = None
    """Weight of a chosen expert: 1 (`binary`), softmax of the scores (`softmax`), or k times that
    (`softmax_times_k`)."""


CONFIG_FIELDS = frozenset(ExpertSettings.model_fields)


class Method(ExpertSettings):
    """A method or some of its settings. methods.yaml defines it; a benchmark, suite and grid may override it.

    Each file sets some keys, including fields of :class:`emoe.EMoEConfig` or :class:`emoe.GMoEConfig`.
    :func:`merge_methods` merges them; the result has a title and a kind.
    """

    method: str | None = None
    """Name in methods.yaml, if the row has another name."""
    title: str = optional()
    """Label in tables and figures."""
    kind: Kind = optional()
    """The model that is built: the dense one, EMoE, or GMoE."""
    role: Role = "method"
    """Purpose of the row. An ablation is shown only in the tables of `ablations`, with one row per setting."""
    noise: NotNegative = 0.0
    """Intensity of noisy tuning; 0 for none."""
    tune: Annotated[str, registered(TUNINGS)] | None = None
    """A registered tuning. It selects the trained parameters besides adapters (with training.lora), head and
    routers, instead of all parameters. `blocks` selects the transformer blocks whose FFNs `layers` names."""
    also_train: Names | None = None
    """With LoRA or `tune`: further modules to train, by the last part of their name (the authors' pooler and ln_f)."""
    as_published: Literal["tutel", "llama"] | None = None
    """Use the authors' settings (of their Tutel layer or their Llama block mask) for all fields that are not
    given."""
    top_k_fraction: Share | None = None
    """top_k as a share of num_experts."""

    def model_post_init(self, _context: Any, /) -> None:
        if self.top_k is not None and self.top_k_fraction is not None:
            raise refusal("it has both top_k and top_k_fraction; keep one")

    def config_values(self) -> dict[str, Any]:
        """Return the configuration's fields that are set; ``partition_seed`` may be ``run``."""
        return {name: value for name, value in self.given().items() if name in CONFIG_FIELDS}


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
    """Learning rate of the other trained parameters, as a share of the learning rate of adapters and head."""


class VariantAxes(Strict):
    """A block of a grid: the product of its lists. Varied method settings form the method's variant."""

    model: Names
    """Names in models.yaml."""
    method: Names
    """Names of methods."""
    num_experts: Counts | None = optional()
    """Values of num_experts to try."""
    top_k_fraction: Shares | None = optional()
    """Values of top_k_fraction to try."""
    layers: Annotated[list[Layers], Field(min_length=1)] | None = optional()
    """Values of layers to try."""


def import_plugins() -> None:
    """Import the plugins of ``methods.yaml``, which register routers and tunings in this process."""
    names = _plugin_names()
    if names and str(ROOT) not in sys.path:  # a job may have another working directory
        sys.path.append(str(ROOT))
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:  # a module may raise anything
            raise DefinitionError(
                f"{BENCHMARKS / 'methods.yaml'}: 'plugins' names '{name}', which cannot be imported: {error!r}"
            ) from error


def plugin_files() -> list[Path]:
    """Return the source files of the plugins; a package has all its modules."""
    files: list[Path] = []
    for name in _plugin_names():
        file = Path(str(importlib.import_module(name).__file__))
        files += sorted(file.parent.rglob("*.py")) if file.name == "__init__.py" else [file]
    return files


def _plugin_names() -> list[str]:
    """Read the names of the plugins. The file is checked later, because methods may use names that plugins register."""
    content = read_yaml(BENCHMARKS / "methods.yaml")
    plugins = content.get("plugins") if isinstance(content, dict) else None
    return plugins if isinstance(plugins, list) else []


_TOP_K = {"top_k", "top_k_fraction"}  # forms of one setting, which replace each other


class MethodFile(Strict):
    """The definitions of methods; a method is data, not code."""

    plugins: list[str] = Field([])
    """Python modules that register routers (emoe.register_router) or tunings (register_tuning); every process of the
    suite imports them.
    """
    methods: dict[Key, Method]
    """The methods, by name."""


@functools.cache
def load_methods() -> dict[str, Method]:
    """Load the methods of ``benchmarks/methods.yaml``, after its plugins are imported."""
    import_plugins()
    file = BENCHMARKS / "methods.yaml"
    methods = read(file, MethodFile).methods
    for name, method in methods.items():
        if missing := [key for key in ("title", "kind") if key not in method.model_fields_set]:
            raise DefinitionError(f"{file}: 'methods.{name}' needs the key '{missing[0]}'")
    return methods


def merge_methods(*layers: Method) -> Method:
    """Merge the given settings of several layers; later layers override earlier ones."""
    merged: dict[str, Any] = {}
    for layer in layers:
        settings = layer.given()
        replaced = _TOP_K if _TOP_K & set(settings) else set()
        merged = {key: value for key, value in merged.items() if key not in replaced} | settings
    merged.pop("method", None)
    return Method(**merged)
