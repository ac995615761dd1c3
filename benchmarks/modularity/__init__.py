"""Measure active neurons and the use of experts in pre-trained models, without training."""
