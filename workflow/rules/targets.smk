# Names for what people ask for.


rule smoke:
    input:
        lambda wildcards: suite_outputs(suite_named("smoke")),
    message:
        "The smoke suite is complete: results/smoke/report.html"


rule tables:
    input:
        SUITE.output_files(),
    message:
        "All tables and figures are up to date"


# one target per benchmark: `snakemake glue`, `snakemake speed`
for name in suites.benchmark_names():

    rule:
        name:
            name
        input:
            outputs_of(name),
        message:
            "The tables and figures of the benchmark are up to date: {input[0]}"


# one target per image set: `snakemake domainbed_pacs`
for shown in SHOWN:
    if shown.part:

        rule:
            name:
                shown.name
            input:
                SUITE.output_files(shown.benchmark, shown.part)
                or not_here(shown.name, [shown.benchmark], shown.part),
            message:
                "The tables and figures of the set are up to date"


# those of the paper that nothing here makes say why
for name, reason in paper_items.missing_items().items():

    rule:
        name:
            name
        input:
            refused(f"{name}: {reason}"),


# one target per table and figure of the paper: `snakemake table_4`, `snakemake figure_7`
for name, item in paper_items.load_paper().items.items():
    if item.missing is None:

        rule:
            name:
                name
            input:
                paper_items.paper_files(SUITE, name)
                or not_here(name, paper_items.item_benchmarks(item)),
            message:
                "The paper's table or figure is up to date: {input}"
