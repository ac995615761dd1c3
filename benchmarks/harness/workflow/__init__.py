"""What Snakemake's rules ask for: files of targets, the plan, and the environment of jobs."""
