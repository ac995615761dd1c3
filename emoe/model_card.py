"""Write the model card of a converted checkpoint, the ``README.md`` that the hub shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from emoe.architectures import find_ffns
from emoe.config import EMoEConfig, GMoEConfig
from emoe.files import is_transformers_class
from emoe.model_config import QUANTIZATION_CONFIG, is_ours, numbered_layers

FILE = "README.md"
_PAPER = (
    "[Unlocking Emergent Modularity in Large Language Models]"
    "(https://aclanthology.org/2024.naacl-long.144/)"
)

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

{other_software}
"""
_SPLIT = (
    "Emergent Mixture-of-Experts: "
    "each converted FFN of a dense model is split into experts of its own neurons."
)
_FOLDED_SPLIT = "`emoe.to_dense_(model)` removes the routing."
_COPIED = "GMoE: each converted FFN of a dense model was copied, and the copies are the experts."
_FOLDED_COPIES = "The copies have no dense equal."


def write_model_card(model: nn.Module, folder: Path) -> None:
    """Write a converted model's card to ``README.md``, unless the folder has this file."""
    path = folder / FILE
    if not path.exists():
        path.write_text(model_card(model), encoding="utf-8")


def model_card(model: nn.Module) -> str:
    """Return a converted model's card as Markdown."""
    layers = numbered_layers(model)
    first, *_ = layers.values()
    config = first.config  # all layers have the same configuration
    if isinstance(config, GMoEConfig):
        method = _COPIED
        folding = _FOLDED_COPIES
    else:
        method = _SPLIT
        folding = _FOLDED_SPLIT
    texts = _library_texts(model, config)
    return _CARD.format(
        library=texts.library,
        model=type(model).__name__,
        method=method,
        paper=_PAPER,
        layers=", ".join(str(number) for number in sorted(layers)),
        total=len(find_ffns(model)),
        num_experts=config.num_experts,
        top_k=config.num_active_experts,
        router=config.router,
        example=texts.example,
        folding=folding,
        other_software=texts.other_software,
    )


class _LibraryTexts(NamedTuple):
    """The texts of a card that depend on the model's library.

    Attributes:
        library: name of the library.
        example: code that loads the checkpoint.
        other_software: what software without emoe does with the checkpoint.
    """

    library: str
    example: str
    other_software: str


def _library_texts(model: Any, config: EMoEConfig | GMoEConfig) -> _LibraryTexts:
    """Return the texts for the library that a model comes from."""
    name = type(model).__name__
    # what software without emoe reads this checkpoint as
    if isinstance(config, GMoEConfig):
        read_as = "a dense model whose shapes do not fit"
    else:
        read_as = "a dense model, which computes something else"

    if is_transformers_class(type(model)):
        # in a quantised model, quantization_config describes the quantizer instead of the experts
        if not is_ours(getattr(model.config, QUANTIZATION_CONFIG, None)):
            return _LibraryTexts(
                library="transformers",
                example=(
                    f"import emoe\nfrom transformers import {name}\n\n"
                    f'model = emoe.from_pretrained({name}, "this folder")'
                ),
                other_software="Transformers itself refuses this quantised checkpoint.",
            )
        return _LibraryTexts(
            library="transformers",
            example=(
                f"import emoe\nfrom transformers import {name}\n\n"
                f'model = {name}.from_pretrained("this folder")'
            ),
            other_software=(
                "Transformers (from 5.24) refuses this checkpoint until `emoe` is imported. "
                "Software that ignores both `quantization_config` and `experts_implementation` "
                f"in `config.json` reads {read_as}."
            ),
        )
    if hasattr(model, "pretrained_cfg"):
        return _LibraryTexts(
            library="timm",
            example=(
                "import emoe\nimport timm\n\n"
                'model = emoe.from_pretrained(timm.create_model, "this folder")'
            ),
            other_software=f"timm does not know the experts and reads {read_as}.",
        )
    return _LibraryTexts(
        library="pytorch",
        example=(
            "import emoe\n\n"
            f'model = emoe.from_pretrained(build, "this folder")  # build() returns a {name}'
        ),
        other_software=f"Code that reads only `model.safetensors` reads {read_as}.",
    )
