"""From YAML files to runs and the jobs that they need."""
