"""Shared by the benchmarks of text classification."""
