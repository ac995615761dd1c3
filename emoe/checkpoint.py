"""Save and load converted models.

A transformers model is an ordinary checkpoint: ``config.json`` describes the experts
(:mod:`emoe.model_config`), the weights include routers and experts' own biases, and
``AutoModel.from_pretrained`` loads it once emoe is imported.

A timm or plain PyTorch model, and a quantised one, are written as the dense model (in a GMoE, with
the wider projections of all its copies), with small files beside it:

- ``emoe_config.json``: the experts' configuration, and the numbers of the converted FFNs;
- ``emoe_extra.safetensors``, if there is state that the dense model lacks: learned routers, running
  gates, output biases of single experts, and GMoE's copied projections.

In both cases ``emoe_partition.safetensors`` holds the original order of the neurons, which only
``emoe.to_dense_(model, restore_order=True)`` needs. It also holds the norms of the keys, which show
if the file belongs to the weights. The library's own ``save_pretrained`` does not write this file.
Then the order is unknown.

Folders of emoe 0.1, which had the small files for every library, still load with
:func:`from_pretrained`.
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from emoe import files
from emoe.architectures import FFN, find_ffns, has_float_matrix, weight_of
from emoe.checks import check_divisible
from emoe.config import EMoEConfig, GMoEConfig
from emoe.convert import converted_layers, finish_conversion_, widen
from emoe.errors import CheckpointError, ConversionError
from emoe.layer import RoutedActivation, check_one_conversion, routed_layers
from emoe.model_card import write_model_card
from emoe.model_config import (
    IMPLEMENTATION_KEY,
    QUANTIZATION_CONFIG,
    SEPARATE_KEY,
    Experts,
    describe_experts_,
    is_ours,
    numbered_layers,
)
from emoe.partitioning import is_permutation
from emoe.routers import is_offloaded, unsharded, weights_loaded
from emoe.tokens import check_unchunked

CONFIG_FILE = "emoe_config.json"
PARTITION_FILE = "emoe_partition.safetensors"
EXTRA_FILE = "emoe_extra.safetensors"
# the end of messages about the partition file
_LOADS_WITHOUT_FILE = (
    "without this file the model loads, and its neurons' original order is unknown"
)
# Options that AutoConfig does not get. It would drop `trust_remote_code`, and write the others into
# the configuration. In a configuration, a dtype must not be "auto".
_LOADER_OPTIONS = ("trust_remote_code", QUANTIZATION_CONFIG, "dtype", "torch_dtype")
# relative difference between stored and present key norms that a cast to bfloat16 may cause
_NORM_TOLERANCE = 0.02


def save_pretrained(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write a converted model: its checkpoint, the original order of its neurons, and a model card.

    Args:
        model: converted model of transformers, timm or another library.
        folder: folder to write to. A ``README.md`` in it is kept.

    Raises:
        ConversionError: the model is not converted, or still carries adapters.
    """
    model = _unwrapped(model)
    layers = converted_layers(model, "save_pretrained", "save it with its own library")
    if _has_adapters(model):
        raise ConversionError(
            "save_pretrained: merge the adapters first (model = model.merge_and_unload())"
        )
    check_one_conversion(layers, "save_pretrained")

    folder = Path(folder)
    describe_experts_(model)
    config = getattr(model, "config", None)
    # a plain module around a transformers model may carry its configuration too
    is_transformers = files.is_transformers_class(type(model))
    if is_transformers and is_ours(getattr(config, QUANTIZATION_CONFIG, None)):
        # a transformers checkpoint: config.json describes the experts
        files.save_weights(model, folder)
        # files of an older save would contradict it
        (folder / CONFIG_FILE).unlink(missing_ok=True)
        (folder / EXTRA_FILE).unlink(missing_ok=True)
    else:
        # the weights of the dense model (a GMoE's projections stay wider), with the experts'
        # configuration and state beside them
        files.save_weights(model, folder, _dense_state(model))
        _save_config_and_extra_state(model, folder)
    save_partition_file(model, folder)
    write_model_card(model, folder)


def _unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside the wrappers of ``torch.compile``, DataParallel and DDP."""
    while True:
        if hasattr(model, "_orig_mod"):  # torch.compile sets it
            model = cast(nn.Module, model._orig_mod)
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def _has_adapters(model: nn.Module) -> bool:
    """Check if a model is PEFT's, or one of its modules is an adapter around a base layer."""
    if hasattr(model, "get_base_model"):
        return True
    # PEFT may leave its configuration on a model that it has merged, so look at the modules
    return any(hasattr(module, "base_layer") for module in model.modules())


def _dense_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of the model without its routing, with one output bias per FFN."""
    state = dict(model.state_dict())
    names = {module: name for name, module in model.named_modules()}
    for layer in routed_layers(model):
        # remove routers, running gates and biases of experts
        layer_name = names[layer]
        for name in layer.state_dict():
            del state[f"{layer_name}.{name}"]
        if layer.output_bias is not None:
            bias_name = f"{names[layer.ffn.proj_out]}.bias"
            with weights_loaded(layer):
                state[bias_name] = layer.folded_output_bias()
    return state


def _save_config_and_extra_state(model: nn.Module, folder: Path) -> None:
    """Write the experts' configuration to ``emoe_config.json``.

    If experts have state that the dense model lacks, write it to ``emoe_extra.safetensors``.
    """
    layers = numbered_layers(model)
    extra = _extra_state(layers)
    (folder / EXTRA_FILE).unlink(missing_ok=True)  # the file of an older save
    if extra:
        files.write_tensors(extra, folder / EXTRA_FILE)
    # all layers have the same configuration
    first, *_ = layers.values()
    layer_numbers = sorted(layers)
    content = {"config": first.config.to_dict(), "layers": layer_numbers}
    (folder / CONFIG_FILE).write_text(json.dumps(content, indent=2) + "\n")


def _extra_state(layers: Mapping[int, RoutedActivation]) -> dict[str, Tensor]:
    """Return the content of the extra file: the state that the dense model lacks, on the CPU.

    A tensor's name is ``{number of the FFN}.{key}.{name in the module}``. The key is that of its
    module, from :func:`_modules_with_state`.
    """
    extra: dict[str, Tensor] = {}
    for number, layer in layers.items():
        for key, module in _modules_with_state(layer):
            # offloaded tensors have values only inside this context
            with weights_loaded(*module.modules()):
                state = module.state_dict()
                for name, tensor in state.items():
                    whole_tensor = unsharded(tensor)
                    extra[f"{number}.{key}.{name}"] = whole_tensor.cpu().contiguous()
    return extra


def _modules_with_state(layer: RoutedActivation) -> list[tuple[str, nn.Module]]:
    """Return the key and the module for each module whose state the dense model lacks.

    The key names the module in the extra file.
    """
    routing = ("routing", layer)
    if isinstance(layer.config, GMoEConfig):
        # GMoE's copies are wider than the dense projections
        return [routing, *layer.ffn.projections()]
    return [routing]


def save_partition_file(model: nn.Module, folder: Path, *, write: bool = True) -> None:
    """Write the original order of the neurons and the key norms to the partition file.

    Sharded weights are gathered, so every process must call this function. All processes except one
    pass ``write=False``.
    """
    layers = numbered_layers(model)
    # all layers have the same configuration
    first, *_ = layers.values()
    tensors = {"num_experts": torch.tensor(first.config.num_experts)}
    for number, layer in layers.items():
        with weights_loaded(layer.ffn.proj_in):
            tensors[f"key_norms.{number}"] = _key_norms(layer.ffn)
        if layer.permutation is not None:
            tensors[f"permutation.{number}"] = layer.permutation.contiguous()
    if write:
        files.write_tensors(tensors, folder / PARTITION_FILE)


def _key_norms(ffn: FFN) -> Tensor:
    """Return the Euclidean norm of each neuron's key, ``[d]``.

    They are zeros if the weight is quantised, because such norms are not compared.
    """
    if not has_float_matrix(ffn.proj_in):
        return torch.zeros(ffn.d)
    keys = ffn.keys().detach().float()
    norms = keys.norm(dim=1)
    return unsharded(norms).cpu()


def read_experts(folder: Path) -> Experts | None:
    """Read the description of a folder's experts. None if the folder holds a dense model.

    ``config.json`` takes precedence over ``emoe_config.json``, because the model's library writes
    ``config.json`` together with the weights. A damaged file raises :class:`CheckpointError`.
    """
    # a transformers model: config.json describes the experts in its quantization_config
    settings = files.read_settings(folder)
    config_path = folder / files.STOCK_CONFIG_FILE
    quantization_config: Any = settings.get(QUANTIZATION_CONFIG)
    if is_ours(quantization_config):
        with _damage_reported(config_path):
            return Experts.from_quantization_config(quantization_config)

    # a quantised model, or a folder of emoe 0.1: config.json has a separate key for the experts
    description = settings.get(SEPARATE_KEY)
    if description:
        with _damage_reported(config_path):
            return Experts.from_json_values(description["config"], description["layers"])

    # a timm or plain model: the experts have a file of their own
    emoe_config_path = folder / CONFIG_FILE
    if emoe_config_path.exists():
        description = files.read_object(emoe_config_path)
        with _damage_reported(emoe_config_path):
            return Experts.from_json_values(description["config"], description["layers"])
    return None


@contextmanager
def _damage_reported(path: Path) -> Iterator[None]:
    """Raise :class:`CheckpointError` if code in the ``with`` block fails on a file's content."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {files.class_and_message(error)}") from error


def from_pretrained(loader: Any, folder: str | os.PathLike[str], **options: Any) -> Any:
    """Load a converted model of any library.

    A transformers checkpoint also loads with transformers' own ``from_pretrained``. This function
    checks it more strictly: each tensor must be stored in the model's shape. It also reads timm and
    plain models, folders of emoe 0.1, and quantises a converted checkpoint
    (``quantization_config=…``).

    Args:
        loader: transformers class, ``timm.create_model``, or function that builds the dense model
            (a plain module).
        folder: folder of the checkpoint, or a hub id.
        **options: options of the loader, for example ``device_map``, ``revision`` or
            ``quantization_config``.

    Returns:
        The converted model, in evaluation mode. With ``output_loading_info=True``, also
        transformers' report.

    Raises:
        CheckpointError: a file is missing or damaged, or emoe's files belong to other weights.
    """
    folder = files.model_folder(str(folder), options)
    experts = read_experts(folder)
    if experts is None:
        raise CheckpointError(
            f"{folder} holds no experts; load it with its own library, and call emoe.convert_"
        )

    if not files.is_transformers_class(loader):
        # the download is done, and other loaders do not know its options
        loader_options = {
            name: value for name, value in options.items() if name not in files.HUB_OPTIONS
        }
        return _load_plain(loader, folder, experts, loader_options)

    stored_quantization = files.read_settings(folder).get(QUANTIZATION_CONFIG)
    if _is_loaded_quantised(stored_quantization, options):
        return _load_quantised(loader, folder, experts, options)

    given_config = options.get("config")
    if given_config is None and is_ours(stored_quantization):
        # transformers calls emoe.loader, which builds the experts before the weights load
        return files.load_stock(loader, folder, **options)
    # the caller's own configuration, or a folder of emoe 0.1
    return _load_with_description(loader, folder, experts, options)


def _is_loaded_quantised(stored_quantization: Any, options: Mapping[str, Any]) -> bool:
    """Check if transformers will load a quantised model.

    Args:
        stored_quantization: the ``quantization_config`` of the folder, None if it has none.
        options: options of :func:`from_pretrained`.
    """
    # the caller asks for it
    if options.get(QUANTIZATION_CONFIG):
        return True
    # the folder holds a quantised model
    if _is_quantised(stored_quantization):
        return True
    # the caller's own configuration describes one
    given_config = options.get("config")
    return _is_quantised(getattr(given_config, QUANTIZATION_CONFIG, None))


def _is_quantised(quantization_config: Any) -> bool:
    """Check if a ``quantization_config`` describes a quantised model, not emoe's experts."""
    return bool(quantization_config) and not is_ours(quantization_config)


def _load_with_description(
    loader: Any, folder: Path, experts: Experts, options: Mapping[str, Any]
) -> Any:
    """Load a transformers model with a configuration that describes its experts.

    The caller's configuration, or the ``config.json`` of a folder of emoe 0.1, may not name
    :mod:`emoe.loader`. So transformers gets a copy that names it.
    """
    arguments = _dense_arguments(folder, options)
    setattr(arguments.config, QUANTIZATION_CONFIG, experts.quantization_config())
    find_stored_elsewhere = None
    if (folder / EXTRA_FILE).exists():
        find_stored_elsewhere = routing_names
    return files.load_stock(
        loader,
        folder,
        find_stored_elsewhere=find_stored_elsewhere,
        config=arguments.config,
        **arguments.options,
    )


class _LoaderArguments(NamedTuple):
    """The arguments with which transformers loads a model.

    Attributes:
        config: the model's transformers configuration.
        options: all other arguments, by name.
    """

    config: Any
    options: dict[str, Any]


def _dense_arguments(folder: Path, options: Mapping[str, Any]) -> _LoaderArguments:
    """Return the arguments with which transformers loads a folder's model without the experts.

    The configuration is a copy of the option ``config``. Without this option, it is the folder's.

    Args:
        folder: folder of the checkpoint.
        options: options of :func:`from_pretrained`.
    """
    other_options = dict(options)
    given = other_options.pop("config", None)
    if given is None:
        arguments = _read_auto_config(folder, other_options)
    elif isinstance(given, str | os.PathLike):
        # the folder or hub id of another configuration
        arguments = _read_auto_config(Path(given), other_options)
    else:
        arguments = _LoaderArguments(copy.deepcopy(given), other_options)

    # remove the description of the experts
    config = arguments.config
    if is_ours(getattr(config, QUANTIZATION_CONFIG, None)):
        delattr(config, QUANTIZATION_CONFIG)
    if hasattr(config, SEPARATE_KEY):
        delattr(config, SEPARATE_KEY)
    # The configuration may name an experts_implementation that transformers does not have. This
    # option replaces it, else transformers would refuse the folder.
    return _LoaderArguments(config, {**arguments.options, IMPLEMENTATION_KEY: None})


def _read_auto_config(folder: Path, options: Mapping[str, Any]) -> _LoaderArguments:
    """Read a folder's transformers configuration with ``AutoConfig``.

    As in transformers' own ``from_pretrained``, an option with the name of a field changes this
    field of the configuration.

    Returns:
        The configuration, and all other options, which the loader gets.

    Raises:
        CheckpointError: ``AutoConfig`` cannot read the folder.
    """
    from transformers import AutoConfig

    # the options that only the loader gets, and those that may be fields of the configuration
    loader_options: dict[str, Any] = {}
    config_options: dict[str, Any] = {}
    for name, value in options.items():
        if name in _LOADER_OPTIONS:
            loader_options[name] = value
        else:
            config_options[name] = value

    try:
        config, unused = AutoConfig.from_pretrained(
            str(folder),
            return_unused_kwargs=True,
            trust_remote_code=options.get("trust_remote_code", False),
            **config_options,
        )
    except Exception as error:  # a damaged configuration raises anything
        raise CheckpointError(
            f"{folder / files.STOCK_CONFIG_FILE} is damaged: {files.class_and_message(error)}"
        ) from error
    return _LoaderArguments(config, {**unused, **loader_options})


def _load_quantised(loader: Any, folder: Path, experts: Experts, options: Mapping[str, Any]) -> Any:
    """Load a checkpoint quantised, then build its experts.

    Usually :mod:`emoe.loader` builds the experts before the weights are loaded. It is registered as
    a quantizer of transformers, and a model can have only one quantizer. Here the quantizer must be
    the one that quantises the weights.

    The arguments and the result are those of :func:`from_pretrained`. ``experts`` is the
    description of the folder's experts.
    """
    config = experts.config
    if isinstance(config, GMoEConfig) or config.gate_momentum:
        raise CheckpointError(
            f"{folder}: a GMoE, or experts with gate_momentum, cannot be loaded quantised"
        )
    arguments = _dense_arguments(folder, options)
    # so that the loader always returns a pair
    loader_options = {**arguments.options, "output_loading_info": True}
    with files.quiet():  # transformers would report the routers, which are loaded below
        model, info = files.load_stock(loader, folder, config=arguments.config, **loader_options)
    layers = build_experts_(model, experts, folder)
    if (folder / EXTRA_FILE).exists():
        load_extra_(layers, folder)
    else:
        # transformers saved the routing with the weights
        _load_routing_(layers, files.Weights(folder), folder)
    check_placement(layers)
    read_partition_file_(layers, folder)
    finish_conversion_(model)
    model.eval()
    if options.get("output_loading_info"):
        return model, info
    return model


def _load_plain(
    loader: Any, folder: Path, experts: Experts, options: Mapping[str, Any]
) -> nn.Module:
    """Build a timm or plain model and its experts, then load their state."""
    model = files.build_without_weights(loader, folder, **options)
    layers = build_experts_(model, experts, folder)
    stored = files.read_tensors(folder / files.WEIGHT_FILE)
    # the tensors that load_extra_ sets below
    loaded_later = _names_loaded_later(model, layers)
    dense_state = {name: tensor for name, tensor in stored.items() if name not in loaded_later}
    may_be_missing = loaded_later | files.requested_head_names(model, options)
    files.load_state_(model, dense_state, folder, may_be_missing)
    load_extra_(layers, folder)
    read_partition_file_(layers, folder)
    finish_conversion_(model)
    return model.eval()


def _names_loaded_later(model: nn.Module, layers: Sequence[RoutedActivation]) -> set[str]:
    """Return the names of the tensors in a converted model that :func:`load_extra_` sets.

    The folder's weight file lacks such tensors, has other values for them (folded output biases),
    or holds a second copy (GMoE's projections).
    """
    module_names = {module: name for name, module in model.named_modules()}

    # GMoE's projections are wider than the dense ones
    prefixes_of_copies = []
    for layer in layers:
        if isinstance(layer.config, GMoEConfig):
            for _, projection in layer.ffn.projections():
                prefixes_of_copies.append(f"{module_names[projection]}.")
    names_of_copies = _names_with_prefixes(model, prefixes_of_copies)

    # the folder's weights have one output bias, into which the experts' biases were folded
    names_of_folded_biases = set()
    for layer in layers:
        if layer.output_bias is not None:
            names_of_folded_biases.add(f"{module_names[layer.ffn.proj_out]}.bias")

    return routing_names(model) | names_of_copies | names_of_folded_biases


def build_experts_(
    model: nn.Module, experts: Experts, source: str | os.PathLike[str]
) -> list[RoutedActivation]:
    """Turn the FFNs that a checkpoint stores as experts into routed FFNs, in place.

    The weights may be loaded before or after this.

    Args:
        model: dense model.
        experts: description of the experts.
        source: checkpoint, for error messages.

    Returns:
        The routed FFNs, in ascending order.

    Raises:
        CheckpointError: the model has fewer FFNs than the experts need.
        ConversionError: the model has no FFNs in the registry, an FFN cannot be split evenly, or
            the configuration has a capacity or balance loss and the model passes its tokens in
            chunks.
    """
    ffns = find_ffns(model)
    config = experts.config
    # the capacity and the balance loss need all tokens of a pass at once
    if config.counts_tokens:
        check_unchunked(model)
    last = experts.layers[-1]  # in ascending order
    if last >= len(ffns):
        raise CheckpointError(
            f"{source} has experts in layer {last}, but the model only {len(ffns)} FFNs"
        )
    chosen = [ffns[number] for number in experts.layers]
    if isinstance(config, EMoEConfig):
        check_divisible(chosen, config.num_experts)
    layers = []
    for ffn in chosen:
        if isinstance(config, GMoEConfig):
            widen(ffn, config.num_experts)
        # The constructor puts the module into the model. The partition file has its permutation.
        layers.append(RoutedActivation(ffn, config, permutation=None))
    return layers


def routing_names(model: nn.Module) -> set[str]:
    """Return the names in a model's state dict that belong to routers or experts' biases."""
    prefixes = []
    for name, module in model.named_modules():
        if isinstance(module, RoutedActivation):
            prefixes.append(f"{name}.")
    return _names_with_prefixes(model, prefixes)


def _names_with_prefixes(model: nn.Module, prefixes: Sequence[str]) -> set[str]:
    """Return the names in a model's state dict that begin with one of the prefixes."""
    return {name for name in model.state_dict() if name.startswith(tuple(prefixes))}


def check_placement(layers: Sequence[RoutedActivation]) -> None:
    """Raise :class:`CheckpointError` if a ``device_map`` offloads an FFN with state of its own.

    Such state is a router, output biases of experts, or GMoE's copies.
    """
    for layer in layers:
        offloaded = is_offloaded(layer.ffn.proj_in) or is_offloaded(layer.ffn.proj_out)
        if offloaded and layer.config.has_routing_state:
            raise CheckpointError(
                f"the device_map offloads {layer.ffn.name}; keep these experts on a device"
            )


def read_partition_file_(layers: Sequence[RoutedActivation], folder: Path) -> None:
    """Check the partition file, and read the neurons' original order from it into the layers.

    The file also has the norms of the neurons' keys. They show if it belongs to the weights.
    If the folder has no partition file, the order stays unknown.

    Args:
        layers: routed FFNs of the loaded model; sets their ``permutation``.
        folder: folder of the checkpoint.

    Raises:
        CheckpointError: the file is damaged or belongs to other weights, or the folder has
            ``emoe_config.json`` but no partition file.
    """
    # The model's own library writes no partition file. emoe_config.json shows that emoe saved the
    # folder: then the file must be there.
    path = folder / PARTITION_FILE
    if not path.exists() and not (folder / CONFIG_FILE).exists():
        return
    tensors = files.read_tensors(path)

    # the file must be for the same layers, each of which has key norms, and as many experts
    expected_norms = {f"key_norms.{layer.ffn.index}" for layer in layers}
    stored_norms = {name for name in tensors if name.startswith("key_norms.")}
    num_experts = layers[0].config.num_experts
    if stored_norms != expected_norms or _stored_num_experts(tensors) != num_experts:
        raise CheckpointError(
            f"{path} describes other layers or numbers of experts than the configuration; "
            f"{_LOADS_WITHOUT_FILE}"
        )

    for layer in layers:
        ffn = layer.ffn
        permutation = tensors.get(f"permutation.{ffn.index}")
        if permutation is not None and not is_permutation(permutation, ffn.d):
            raise CheckpointError(f"{path} has no permutation of {ffn.name}'s {ffn.d} neurons")
        # other norms mean that the permutation belongs to other weights
        saved_norms = tensors[f"key_norms.{ffn.index}"].float()
        _check_key_norms(ffn, saved_norms, path)
        layer.permutation = permutation


def _stored_num_experts(tensors: Mapping[str, Tensor]) -> int | None:
    """Return the number of experts in a partition file, None if the file has no such number."""
    number = tensors.get("num_experts")
    if number is None or number.numel() != 1:
        return None
    return int(number)


def _check_key_norms(ffn: FFN, saved: Tensor, path: Path) -> None:
    """Raise :class:`CheckpointError` if the key norms of the partition file are not the FFN's.

    Quantised weights, and weights on the meta device, are not compared.
    """
    if not has_float_matrix(ffn.proj_in):
        return
    # an offloaded weight leaves the meta device only inside this context
    with torch.no_grad(), weights_loaded(ffn.proj_in):
        is_never_loaded = weight_of(ffn.proj_in).is_meta  # device_map="meta"
        if is_never_loaded:
            return
        norms = _key_norms(ffn)
    are_close = False
    if norms.shape == saved.shape:  # allclose needs equal shapes
        are_close = torch.allclose(norms, saved, rtol=_NORM_TOLERANCE, atol=1e-6)
    if not are_close:
        raise CheckpointError(
            f"{path} does not match the weights of {ffn.name}; {_LOADS_WITHOUT_FILE}"
        )


def load_extra_(layers: Sequence[RoutedActivation], folder: Path) -> None:
    """Load the state that the dense model lacks from the extra file.

    It consists of routers, experts' output biases and GMoE's copied projections. If experts have
    their own output biases, the dense output bias becomes zero.

    Raises:
        CheckpointError: the file is damaged, or lacks a tensor.
    """
    path = folder / EXTRA_FILE
    # Experts without state of their own have no extra file. If the file is missing by mistake, the
    # first tensor that is not found below raises the error.
    tensors = {}
    if path.exists():
        tensors = files.read_tensors(path)
    for layer in layers:
        # The dense model's weights have one output bias for all experts. It must not be added to
        # the experts' own biases, which are loaded below.
        if layer.output_bias is not None:
            cast(Tensor, layer.ffn.proj_out.bias).zero_()
        for module_key, module in _modules_with_state(layer):
            state = {}
            for name in module.state_dict():
                stored_name = f"{layer.ffn.index}.{module_key}.{name}"
                if stored_name not in tensors:
                    raise _missing_error(folder, stored_name)
                state[name] = tensors[stored_name]
            _load_experts_state_(module, state, folder)


def _load_routing_(
    layers: Sequence[RoutedActivation], weights: files.Weights, folder: Path
) -> None:
    """Load the state of routers and experts' biases from a folder's weights.

    Transformers has loaded the rest of the model, but not this state, because it built the model
    without experts.
    """
    stored_names = stored_routing(layers, weights.files)
    for layer in layers:
        state = {}
        for name in layer.state_dict():
            stored_name = stored_names.get((layer, name))
            if stored_name is None:
                raise _missing_error(folder, name)
            state[name] = weights[stored_name]
        _load_experts_state_(layer, state, folder)


def _missing_error(folder: Path, name: str) -> CheckpointError:
    """Return the error for a tensor of the experts that a checkpoint lacks."""
    return CheckpointError(
        f"{folder} lacks {name}, which belongs to a router, an expert's bias or a GMoE copy"
    )


def _load_experts_state_(module: nn.Module, state: Mapping[str, Tensor], folder: Path) -> None:
    """Load a state dict into a routed FFN or a projection.

    Raises :class:`CheckpointError`, which names the folder, if a tensor does not fit.
    """
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(
            f"{folder}: the state of the experts does not fit: {files.class_and_message(error)}"
        ) from error


def stored_routing(
    layers: Sequence[RoutedActivation], stored: Mapping[str, Path]
) -> dict[tuple[RoutedActivation, str], str]:
    """Find the tensors of the routers and experts' biases among the tensors of a checkpoint.

    A checkpoint's names may have another prefix than the model's names, and transformers renames
    parts of some prefixes. But the names of both end with the activation's path and the tensor's
    name in the layer, and the layers are in the same order.

    Args:
        layers: routed FFNs of the model.
        stored: file of each tensor, by the tensor's name in the checkpoint.

    Returns:
        Each tensor's name in the checkpoint, by layer and name in the layer's state. Tensors that
        are not stored are left out.
    """
    # the tensors whose names end alike: one of each layer, in the order of the layers
    tensors_of_ending: dict[str, list[tuple[RoutedActivation, str]]] = defaultdict(list)
    for layer in layers:
        for name in layer.state_dict():
            ending = f".{layer.ffn.spec.activation}.{name}"
            tensors_of_ending[ending].append((layer, name))

    matches: dict[tuple[RoutedActivation, str], str] = {}
    for ending, tensors in tensors_of_ending.items():
        stored_names = [stored_name for stored_name in stored if stored_name.endswith(ending)]
        stored_names.sort(key=_layer_numbers)  # in the order of the layers, like `tensors`
        # if a layer's tensor is missing, the others cannot be assigned to their layers
        if len(stored_names) != len(tensors):
            continue
        for tensor, stored_name in zip(tensors, stored_names, strict=True):
            matches[tensor] = stored_name
    return matches


def _layer_numbers(name: str) -> list[int]:
    """Return the numbers in a tensor's name. As a sort key, they put layer 9 before layer 10."""
    return [int(number) for number in re.findall(r"\d+", name)]


def check_routing_is_stored(
    layers: Sequence[RoutedActivation], stored: Mapping[str, Path], folder: Path
) -> None:
    """Raise :class:`CheckpointError` if a checkpoint lacks state of a router or experts' biases.

    Transformers would only warn, and leave the missing tensors as uninitialised memory.
    """
    matches = stored_routing(layers, stored)
    for layer in layers:
        for name in layer.state_dict():
            if (layer, name) not in matches:
                missing = f"{layer.ffn.name}.{layer.ffn.spec.activation}.{name}"
                raise CheckpointError(
                    f"{folder} lacks {missing}; save with emoe.save_pretrained or Trainer"
                )
