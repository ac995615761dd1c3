"""Read the YAML files, and plan runs and the jobs that they need."""
