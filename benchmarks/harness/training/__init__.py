"""Train: the loop, its callbacks, checkpoints, metrics and processes."""
