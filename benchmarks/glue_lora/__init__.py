"""GLUE by low-rank adapters."""
