"""Define methods as data: settings, tunings, plugins, and ``method.tune`` of a run's spec.

A tuning is a named rule that selects trained parameters.
"""

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
    PartitionMethod,
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
    """Register a tuning, which methods then use with ``tune: <name>``.

    A tuning selects the trained parameters. ``docs/adding.md`` has a complete example.

    >>> def norms(model, layers):
    ...     return [name for name, _ in model.named_parameters() if "norm" in name]
    >>> register_tuning("norms", norms)
    >>> del TUNINGS["norms"]

    Args:
        name: The name of the tuning in YAML. In the record of a run, the group of its parameters
            has the same name.
        tuning: The function that returns the names of the trained parameters. It is called with the
            converted and adapted model, and with the method's ``layers`` or None.
    """
    TUNINGS[name] = tuning


def tuning_spec(name: str | None, layers: Any, also: Iterable[str] = ()) -> dict[str, Any]:
    """Make ``method.tune`` of a run's spec, which :class:`.method_specs.TuneSpec` validates.

    A key without a value is left out, because it would change the ids of runs. Only ``blocks`` and
    ``also`` are always present.

    Args:
        name: The name of the tuning; None if only adapters, head and routers are trained.
        layers: The ``layers`` of the method; None if the method does not set this key.
        also: Further modules to train, by the last part of their name.
    """
    also_trained = list(also)
    # the tuning `blocks` stores its layers in the key `blocks`, which is empty for other tunings
    if name == "blocks":
        return {"blocks": layers, "also": also_trained}
    if name is None:
        return {"blocks": [], "also": also_trained}
    if layers is None:
        return {"blocks": [], "also": also_trained, "tuning": name}
    return {"blocks": [], "also": also_trained, "tuning": name, "layers": layers}


def is_below(name: str, modules: Iterable[str]) -> bool:
    """Return True if a parameter is inside one of the modules.

    Args:
        name: The name of the parameter.
        modules: The paths of the modules.
    """
    return any(name.startswith(f"{module}.") for module in modules)


def _block_parameters(model: nn.Module, layers: Any) -> list[str]:
    """Return the names of all parameters in the blocks whose FFNs ``layers`` selects."""
    from emoe.architectures import find_ffns  # needs PyTorch, unlike planning

    ffns = find_ffns(model)
    selected = resolve_layers(layers, len(ffns))
    # an FFN has the name of its block, such as "bert.encoder.layer.3"
    blocks = [ffns[layer].name for layer in selected]
    return [name for name, _ in model.named_parameters() if is_below(name, blocks)]


register_tuning("blocks", _block_parameters)
Layers = str | Annotated[list[int], Field(min_length=1)]
CONTROL = "control"
ABLATION = "ablation"
Role = Literal["baseline", "method", "control", "ablation"]
Kind = Literal["dense", "emoe", "gmoe"]


class ExpertSettings(ExplicitNulls):
    """The fields of :class:`emoe.EMoEConfig` and :class:`emoe.GMoEConfig`, each optional.

    A field that no file sets has the configuration's default. With `as_published` it has the
    authors' value.
    """

    num_experts: Count | None = None
    """Number of experts N. EMoE: N must divide the FFN's width."""
    top_k: Count | None = None
    """Number k of experts that each token uses, see `selection`."""
    layers: Layers | None = None
    """FFNs to convert: a list, 'all', 'last:2', 'last-half:2', 'last-quarter:2' or a slice."""
    capacity_factor: Positive | None = None
    """Factor c: an expert takes up to top_k * int(c * ceil(T / N)) of T tokens; null: no limit."""
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
    """Dropout `before` the activation (the authors' language code) or `after` it (vision)."""
    output_bias: Literal["shared", "per_expert", "per_expert_whole"] | None = None
    """Output bias: one for the FFN (`shared`), or one for each expert.

    An expert's bias starts as the FFN's bias divided by the number of active experts
    (`per_expert`), or, in GMoE only, as the whole bias (`per_expert_whole`).
    """
    partition: PartitionMethod | None = None
    """Grouping of neurons: `random`, `contiguous`, or balanced k-means.

    k-means clusters the keys (`kmeans`) or the activations of training rows (`coactivation`).
    """
    partition_seed: Whole | Literal["run"] | None = None
    """Seed of the partition; `run` uses the run's seed."""
    router: Annotated[str, registered(ROUTERS)] | None = None
    """A registered router. `avg_k` scores an expert by its mean key; `cosine` is EMoE-learn's."""
    selection: Selection | None = None
    """The chosen experts: the k with the highest scores (`top`) or lowest scores (`bottom`), k
    random ones (`random`), or all except the top k (`not_top`)."""
    score: Score | None = None
    """How the router `avg_k` scores an expert.

    `keys` is the product of the input and the expert's mean key. The other scores are means over
    the expert's neurons: of the pre-activation (`gate`), the up-projection (`up`, `up_abs`) or the
    out-projection's input (`inter`, `inter_abs`).
    """
    score_bias: bool | None = None
    """Add the mean bias of an expert's neurons to the `keys` score."""
    gate_momentum: Rate | None = None
    """Momentum of running mean keys; with 0 the mean keys follow the weights."""
    weighting: Weighting | None = None
    """Weight of a chosen expert: 1 (`binary`), the softmax of the scores (`softmax`), or k times
    the softmax (`softmax_times_k`)."""


CONFIG_FIELDS = frozenset(ExpertSettings.model_fields)


class Method(ExpertSettings):
    """A method or some of its settings.

    methods.yaml defines a method. A benchmark, a suite and a grid may override its settings.
    :func:`merge_methods` merges these layers; the result has a title and a kind.
    """

    method: str | None = None
    """Name in methods.yaml, if the row has another name."""
    title: str = optional()
    """Label in tables and figures."""
    kind: Kind = optional()
    """The model that is built: the dense one, EMoE, or GMoE."""
    role: Role = "method"
    """Purpose of the row. An ablation appears only in the tables of `ablations`, with a row for
    each setting."""
    noise: NotNegative = 0.0
    """Intensity of noisy tuning; 0 for none."""
    tune: Annotated[str, registered(TUNINGS)] | None = None
    """A registered tuning. It selects the trained parameters instead of training all of them.

    Adapters (with training.lora), head and routers are trained too. `blocks` selects the
    transformer blocks whose FFNs `layers` names.
    """
    also_train: Names | None = None
    """With LoRA or `tune`: further modules to train, by the last part of their name."""
    as_published: Literal["tutel", "llama"] | None = None
    """The authors' Tutel layer or Llama block mask. Its settings apply to the fields that are not
    given."""
    top_k_fraction: Share | None = None
    """top_k as a share of num_experts."""

    def model_post_init(self, context: Any, /) -> None:
        """Refuse ``top_k`` beside ``top_k_fraction``."""
        super().model_post_init(context)
        if self.top_k is not None and self.top_k_fraction is not None:
            raise refusal("it has both top_k and top_k_fraction; keep one")

    def config_values(self) -> dict[str, Any]:
        """Return the given fields of the experts' configuration.

        ``partition_seed`` may still be ``run`` instead of a number.
        """
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
    """Names of the adapted layers, by the model's type. For timm's models, it is the name of their
    class, such as `VisionTransformer`."""
    base_lr_ratio: Positive = 0.1
    """Learning rate of the other trained parameters, divided by that of adapters and head."""


class VariantAxes(Strict):
    """A block of a grid: every combination of its lists is a run.

    The values of varied method settings form the name of the method's variant.
    """

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
    """Import the plugins of ``methods.yaml``, so that their routers and tunings are registered."""
    names = _plugin_names()
    # a job may have another working directory, from which Python would not find the plugins
    if names and str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))
    for name in names:
        where = f"{BENCHMARKS / 'methods.yaml'}: 'plugins' names '{name}'"
        try:
            module = importlib.import_module(name)
        except Exception as error:  # a module may raise anything
            raise DefinitionError(f"{where}, which cannot be imported: {error!r}") from error
        # A folder without __init__.py is imported without an error, but none of its files runs, so
        # nothing would be registered. Such a module has no file.
        if module.__file__ is None:
            raise DefinitionError(
                f"{where}, a folder without __init__.py; add that file, or name a module in the "
                "folder"
            )


def plugin_files() -> list[Path]:
    """Return the source files of the plugins; for a package, the files of all its modules."""
    files: list[Path] = []
    for name in _plugin_names():
        module = importlib.import_module(name)
        file = Path(str(module.__file__))
        if file.name == "__init__.py":
            files += sorted(file.parent.rglob("*.py"))
        else:
            files.append(file)
    return files


def _plugin_names() -> list[str]:
    """Read the names of the plugins, before the file is validated.

    The validation needs the plugins, because methods may use names that plugins register. The
    validation also reports content of a wrong type, so no error is raised here.
    """
    content = read_yaml(BENCHMARKS / "methods.yaml")
    if not isinstance(content, dict):
        return []
    plugins = content.get("plugins")
    if not isinstance(plugins, list):
        return []
    return plugins


# two keys for one setting: the key of a later layer replaces the key of an earlier layer
_FORMS_OF_TOP_K = {"top_k", "top_k_fraction"}


class MethodFile(Strict):
    """The definitions of methods; a method is data, not code."""

    plugins: list[str] = Field([])
    """Python modules that register routers (emoe.register_router) or tunings (register_tuning).

    They are imported with the first benchmark that a process loads.
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
        # benchmarks and suites only override settings, so the model cannot require these keys
        for key in ("title", "kind"):
            if key not in method.model_fields_set:
                raise DefinitionError(f"{file}: 'methods.{name}' needs the key '{key}'")
    return methods


def merge_methods(*layers: Method) -> Method:
    """Merge the given settings of several layers; later layers override earlier ones.

    The key ``method`` is left out.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        settings = layer.given()
        # `top_k` and `top_k_fraction` are two forms of one setting. A layer that gives one of them
        # removes the form of an earlier layer, so that the result does not have both.
        gives_top_k = any(key in settings for key in _FORMS_OF_TOP_K)
        if gives_top_k:
            for key in _FORMS_OF_TOP_K:
                merged.pop(key, None)
        merged.update(settings)
    # the method that this key names is already one of the layers
    merged.pop("method", None)
    return Method(**merged)
