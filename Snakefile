# Entry of the workflow. What to run stands in config/<suite>.yaml, where to run it in profiles/.
#   snakemake --cores all                         the mini suite
#   snakemake --cores all --config suite=paper    the paper's grid
#   snakemake --cores 2 smoke | glue | tables     one suite, one benchmark, the tables
from snakemake.utils import min_version

min_version("9.19")


include: "workflow/rules/common.smk"


localrules:
    all,
    smoke,
    tables,


rule all:
    default_target: True
    input:
        lambda wildcards: suite_outputs(SUITE),
    message:
        f"The suite is complete: results/{SUITE.name}/report.html"


include: "workflow/rules/runs.smk"
include: "workflow/rules/tables.smk"
include: "workflow/rules/targets.smk"
