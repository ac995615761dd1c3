"""Write the model card of a converted checkpoint, the ``README.md`` that the hub shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from emoe.architectures import find_ffns
from emoe.config import EMoEConfig, GMoEConfig
from emoe.model_config import QUANTIZATION_CONFIG, is_ours, numbered_layers

FILE = "README.md"
_PAPER = "[Unlocking Emergent Modularity in Large Language Models](https://aclanthology.org/2024.naacl-long.144/)"

_CARD = """\
---
library_name: {library}
tags:
- emoe
- mixture-of-experts
---

# {model} with experts

{method} ({paper})

| setting | value |
|---|---|
| converted FFNs | {layers} of {total}, counted from 0 |
| experts (N) | {num_experts} |
| experts per token (k) | {top_k} |
| router | {router} |

## Load it

```python
{example}
```

{folding}

## Other software

{others}
"""
_SPLIT = "Emergent Mixture-of-Experts: each converted FFN of a dense model is split into experts of its own neurons."
_FOLDED_SPLIT = "`emoe.to_dense_(model)` removes the routing."
_FOLDED_COPIES = "The copies have no dense equal."
_COPIED = "GMoE: each converted FFN of a dense model was copied, and the copies are the experts."


def write_model_card(model: nn.Module, folder: Path) -> None:
    """Write a converted model's card, unless the folder has one."""
    path = folder / FILE
    if not path.exists():
        path.write_text(model_card(model), encoding="utf-8")


def model_card(model: nn.Module) -> str:
    """Return a converted model's card as Markdown."""
    layers = numbered_layers(model)
    config = next(iter(layers.values())).config
    is_copied = isinstance(config, GMoEConfig)
    library, example, others = _library_texts(model, config)
    return _CARD.format(
        library=library,
        model=type(model).__name__,
        method=_COPIED if is_copied else _SPLIT,
        paper=_PAPER,
        layers=", ".join(str(number) for number in sorted(layers)),
        total=len(find_ffns(model)),
        num_experts=config.num_experts,
        top_k=config.num_active_experts,
        router=config.router,
        example=example,
        folding=_FOLDED_COPIES if is_copied else _FOLDED_SPLIT,
        others=others,
    )


def _library_texts(model: Any, config: EMoEConfig | GMoEConfig) -> tuple[str, str, str]:
    """Return the name of a model's library, the code that loads the checkpoint, and what other software does."""
    kind = type(model).__name__
    if hasattr(model, "save_pretrained") and not is_ours(
        getattr(model.config, QUANTIZATION_CONFIG, None)
    ):
        example = f'import emoe\nfrom transformers import {kind}\n\nmodel = emoe.from_pretrained({kind}, "this folder")'
        return "transformers", example, "Transformers itself refuses this quantised checkpoint."
    if hasattr(model, "save_pretrained"):
        example = f'import emoe\nfrom transformers import {kind}\n\nmodel = {kind}.from_pretrained("this folder")'
        others = (
            "Transformers (from 5.24) refuses this checkpoint until `emoe` is imported. Software that ignores both "
            "`quantization_config` and `experts_implementation` in `config.json` reads a dense model"
        )
        library = "transformers"
    elif hasattr(model, "pretrained_cfg"):
        example = 'import emoe\nimport timm\n\nmodel = emoe.from_pretrained(timm.create_model, "this folder")'
        others = "timm does not know the experts and reads a dense model"
        library = "timm"
    else:
        example = f'import emoe\n\nmodel = emoe.from_pretrained(build, "this folder")  # build() returns a {kind}'
        others = "Code that reads only `model.safetensors` reads a dense model"
        library = "pytorch"
    if isinstance(config, GMoEConfig):
        return library, example, f"{others} whose shapes do not fit."
    return library, example, f"{others}, which computes something else."
