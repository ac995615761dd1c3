"""What experts cost: one FFN, a whole training step, finding them."""
