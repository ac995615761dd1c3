"""Analyse pre-trained models without training: active neurons per block, and experts per task."""
