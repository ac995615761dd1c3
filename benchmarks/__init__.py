"""The benchmarks: one folder of data and a pipeline each, and the harness they share."""
