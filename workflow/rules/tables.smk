# From the runs' metrics.json to tables, figures, the report and the MLflow mirror.


# One rule a benchmark, because each has its own tables and figures: `tables_of_glue`. Where sets of images are shown
# one by one, one rule a set, too: `tables_of_domainbed_pacs`. Those that are the paper's are written once more under
# its numbers, with its rows: `results/<suite>/paper/table_4.md`.
for shown in SHOWN:

    rule:
        name:
            f"tables_of_{shown.name}"
        input:
            lambda wildcards, shown=shown: suite_named(wildcards.suite).metric_files(
                shown.benchmark, shown.part
            ),
            sources_of(shown.benchmark),
        output:
            tables=shown.table_files("{suite}"),
            figures=in_report(shown, shown.benchmark),
            paper=paper_items.files_of(shown, "{suite}"),
        log:
            f"results/logs/{{suite}}/tables_of_{shown.name}.txt",
        localrule: True
        conda:
            ENVIRONMENT
        params:
            what=f"--benchmark {shown.benchmark}"
            + (f" --part {shown.part}" if shown.part else ""),
        message:
            f"Tables and figures of {shown.name}, suite {{wildcards.suite}}"
        shell:
            "python -m benchmarks tables --suite {wildcards.suite} {params.what} 2> {log:q}"


rule table_of_claims:
    input:
        lambda wildcards: [
            file
            for name in suite_named(wildcards.suite).claimed
            for file in suite_named(wildcards.suite).metric_files(name)
        ],
        lambda wildcards: sources_of(*suite_named(wildcards.suite).claimed),
    output:
        tables=CLAIMS.table_files("{suite}"),
        figures=in_report(CLAIMS, "Claims"),
        main=paper_items.main_files("{suite}"),
    log:
        "results/logs/{suite}/table_of_claims.txt",
    localrule: True
    conda:
        ENVIRONMENT
    message:
        "What the runs say of the paper's claims, suite {wildcards.suite}"
    shell:
        "python -m benchmarks claims --write --suite {wildcards.suite} 2> {log:q}"


# One page a benchmark, so that the first results can be read while others run.
rule benchmark_report:
    input:
        lambda wildcards: suite_named(wildcards.suite).metric_files(wildcards.benchmark),
        lambda wildcards: suite_named(wildcards.suite).output_files(wildcards.benchmark),
        local(artifacts.page_sources()),
    output:
        "results/{suite}/{benchmark}.html",
    log:
        "results/logs/{suite}/benchmark_report/{benchmark}.txt",
    wildcard_constraints:
        benchmark="|".join(suites.benchmark_names()),
    localrule: True
    conda:
        ENVIRONMENT
    message:
        "Page of {wildcards.benchmark}, suite {wildcards.suite}: {output}"
    shell:
        "python -m benchmarks report --suite {wildcards.suite} --benchmark {wildcards.benchmark} --output {output:q} 2> {log:q}"


rule report:
    input:
        suite_metrics,
        suite_tables,
        local(artifacts.page_sources()),
    output:
        report(
            "results/{suite}/report.html",
            caption="../report/report.rst",
            category="Report",
        ),
    log:
        "results/logs/{suite}/report.txt",
    localrule: True
    conda:
        ENVIRONMENT
    message:
        "Report of the suite {wildcards.suite}"
    shell:
        "python -m benchmarks report --suite {wildcards.suite} --output {output:q} 2> {log:q}"


# One job that mirrors all finished runs.
rule mirror_to_mlflow:
    input:
        suite_metrics,
    output:
        "results/{suite}/mlflow.txt",
    log:
        "results/logs/{suite}/mirror_to_mlflow.txt",
    localrule: True
    conda:
        ENVIRONMENT
    params:
        # with its password hidden: Snakemake writes parameters and commands into its logs, and keeps them
        store=hide_passwords(SUITE.tracking_uri),
    message:
        "Mirror the runs to MLflow at {params.store}"
    shell:
        "python -m benchmarks mirror --suite {wildcards.suite} > {output:q} 2> {log:q}"
