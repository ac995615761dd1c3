"""Build a small BERT that classifies rows, converted or dense, for tests that train and save it."""

from __future__ import annotations

from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification

import emoe

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
SOME = {"num_experts": 8, "top_k": 2, "layers": "last:2"}
METHODS = {
    "emoe": emoe.EMoEConfig(**SOME),
    "emoe, momentum": emoe.EMoEConfig(**SOME, gate_momentum=0.9),
    "emoe, published": emoe.EMoEConfig.as_published("tutel", **SOME),
    "emoe-learn": emoe.EMoEConfig(
        **SOME, router="cosine", weighting="softmax_times_k", aux_loss_coefficient=0.1
    ),
    "gmoe": emoe.GMoEConfig(num_experts=3, layers="last:2"),
}


def bert(config: emoe.EMoEConfig | emoe.GMoEConfig | None) -> Any:
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(vocab_size=60, **SIZES))
    if config is not None:
        emoe.convert_(model, config)
    return model


def load(folder: Any, **options: Any) -> Any:
    return emoe.from_pretrained(BertForSequenceClassification, folder, **options)


def rows(count: int = 16) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for number in range(count):
        input_ids = torch.randint(3, 60, (8,), generator=generator)
        made.append({"input_ids": input_ids, "labels": torch.tensor(number % 2)})
    return made


def logits(model: Any) -> torch.Tensor:
    input_ids = torch.stack([row["input_ids"] for row in rows()])
    model.eval()
    with torch.no_grad():
        return model(input_ids).logits
