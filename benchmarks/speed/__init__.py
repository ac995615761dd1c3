"""Measure the cost of experts: one FFN, a whole training step, finding them."""
