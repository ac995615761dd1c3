"""Measure the cost of experts: of one FFN, a whole training step, and clustering."""
