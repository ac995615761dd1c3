# Targets with short names, and explanations of targets that cannot be made.
#
# Their inputs are functions, because they list the runs, which a job on a cluster does not plan.
# In a loop, the default `name=name` of such a function keeps the value of this iteration.


rule tables:
    input:
        lambda wildcards: targets.made_files(SUITE),
    message:
        "All tables and figures are up to date"


# one target per benchmark: `snakemake glue`
for name in SUITE.settings.benchmarks:

    rule:
        name:
            name
        input:
            lambda wildcards, name=name: targets.benchmark_files(SUITE, name),
        message:
            "The tables and figures of the benchmark are up to date: {input[0]}"


# one target per image set: `snakemake domainbed_pacs`
for shown in SHOWN:
    if shown.data_set:

        rule:
            name:
                shown.name
            input:
                lambda wildcards, shown=shown: targets.made_files(
                    SUITE, shown.benchmark, shown.data_set
                ),
            message:
                "The tables and figures of the set are up to date"


# one target per table and figure of the paper: `snakemake table_4`, `snakemake figure_7`
for name in paper_items.load_paper().items:
    if paper_items.paper_files(SUITE, name):

        rule:
            name:
                name
            input:
                lambda wildcards, name=name: targets.item_files(SUITE, name),
            params:
                shown=paper_items.paper_files(SUITE, name),
            message:
                "The paper's table or figure is up to date: {params.shown}"


# any other word: the error says why there is no such target
rule unknown_target:
    input:
        refuse(
            lambda wildcards: targets.explain_missing_target(wildcards.target, SUITE)
        ),
    output:
        "{target}",
    wildcard_constraints:
        target="[A-Za-z0-9_-]+",


# the files of other suites
rule other_suite:
    input:
        refuse(
            lambda wildcards: targets.explain_file_of_other_suite(
                wildcards.other, wildcards.file, SUITE
            )
        ),
    output:
        "results/{other}/{file}",
    wildcard_constraints:
        other="|".join(name for name in suite_names() if name != SUITE.name),
