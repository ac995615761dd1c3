from __future__ import annotations

import torch
from transformers import BertConfig, BertForSequenceClassification

from benchmarks.harness.models.conversion import noisy_tuning_


def test_noise_scales_with_each_parameter_and_spares_the_head() -> None:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64)
    model = BertForSequenceClassification(config)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    changed = noisy_tuning_(model, 0.15, seed=3)
    total = 0
    for name, parameter in model.named_parameters():
        change = (parameter - before[name]).abs()
        if name.startswith("classifier"):
            assert change.eq(0).all()
            continue
        total += parameter.numel()
        # U(-1/2, 1/2) * 0.15 * std
        assert change.max() <= 0.075 * before[name].std() + 1e-6
    assert changed == total
    again = BertForSequenceClassification(config)
    again.load_state_dict(before)
    noisy_tuning_(again, 0.15, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
