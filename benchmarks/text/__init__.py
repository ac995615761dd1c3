"""What the benchmarks of text classification share."""
