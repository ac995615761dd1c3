"""Measure pre-trained models before any training: activations in blocks, experts by task."""
