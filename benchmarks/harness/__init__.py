"""The code that all benchmarks share. Packages import only lower layers (docs/design.md)."""
