"""The training loop, its callbacks, metrics and processes."""
