"""T5 on several tasks at once."""
