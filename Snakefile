# Entry of the workflow. config/<suite>.yaml defines what to run, profiles/ where to run it.
#   snakemake --cores all                         the mini suite
#   snakemake --cores all --config suite=paper    the paper's grid
#   snakemake --cores 2 glue | table_4 | tables   one benchmark, one table of the paper, all tables
from snakemake.utils import min_version

min_version("9.19")


include: "workflow/rules/common.smk"


rule all:
    default_target: True
    input:
        lambda wildcards: targets.suite_files(SUITE),
    message:
        f"The suite is complete: {RESULTS}/report.html"


include: "workflow/rules/runs.smk"
include: "workflow/rules/tables.smk"
include: "workflow/rules/targets.smk"
