"""Shared by all benchmarks. Each room imports only those above it (docs/design.md)."""
