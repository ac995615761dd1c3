"""Execute one run, and check its data."""
