"""Load, convert and adapt the model of a run."""
