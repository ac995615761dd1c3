"""What every benchmark shares; each room imports only those before it: base, sources, planning, modeling and results, training and reporting, running."""
