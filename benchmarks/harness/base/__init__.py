"""Paths, files, seeds and errors, which everything else rests on."""
