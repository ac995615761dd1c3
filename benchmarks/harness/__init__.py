"""What all benchmarks share: definitions, runs, training, records, tables."""
