"""Training loop, callbacks, checkpoints, metrics and processes."""
