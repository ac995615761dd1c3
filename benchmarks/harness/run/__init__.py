"""One run from start to end, and the check of its data."""
