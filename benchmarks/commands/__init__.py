"""The commands of ``python -m benchmarks``, by what they are for. Imports of weight stay inside them, so that help comes at once."""
