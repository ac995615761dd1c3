"""The path that computes only the chosen experts, forward and backward, on the dense weights as they are."""
