"""The sparse backend: compute only the chosen experts, forward and backward, on the dense weights."""
