"""The code that text classification benchmarks share."""
