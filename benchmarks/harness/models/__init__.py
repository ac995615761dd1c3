"""The model of a run: loaded, converted, adapted."""
