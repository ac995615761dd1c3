from __future__ import annotations

import torch
from transformers import BertConfig, BertForSequenceClassification

from benchmarks.harness.models.conversion import noisy_tuning_


def test_noise_scales_with_each_parameter_and_spares_the_head() -> None:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64)
    model = BertForSequenceClassification(config)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    noisy_tuning_(model, 0.15, seed=3)
    for name, parameter in model.named_parameters():
        change = (parameter - before[name]).abs().max()
        scale = 0.0 if name.startswith("classifier") else 0.15 * before[name].std()
        assert change <= scale / 2 + 1e-6  # U(-1/2, 1/2) * scale
        assert (change == 0) == (scale == 0), name
    again = BertForSequenceClassification(config)
    again.load_state_dict(before)
    noisy_tuning_(again, 0.15, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
