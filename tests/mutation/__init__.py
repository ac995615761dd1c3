"""How much of what can go wrong `make check` sees: a score, by mutants of records and of methods."""
