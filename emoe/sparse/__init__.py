"""The sparse backend computes only the chosen experts, forward and backward.

It uses the dense weights.
"""
