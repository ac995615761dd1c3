"""Instruction tuning of language models."""
