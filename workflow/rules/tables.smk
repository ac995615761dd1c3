# From the runs' metrics.json to tables, figures, the report and the MLflow mirror.


rule tables_and_figures:
    input:
        suite_metrics,
    output:
        tables=expand(
            "results/{{suite}}/tables/{{benchmark}}_{table}.{end}",
            table=suites.TABLES,
            end=suites.FORMATS,
        ),
        figures=report(
            expand(
                "results/{{suite}}/figures/{{benchmark}}_{figure}.{end}",
                figure=suites.FIGURES,
                end=["png", "pdf"],
            ),
            caption="../report/figure.rst",
            category="{benchmark}",
        ),
    log:
        "results/logs/{suite}/{benchmark}_tables_and_figures.txt",
    localrule: True
    conda:
        ENVIRONMENT
    params:
        # comments in the YAML files change nothing here, titles do
        definition=benchmark_digest,
    message:
        "Tables and figures of {wildcards.benchmark}, suite {wildcards.suite}"
    shell:
        "python -m benchmarks tables --suite {wildcards.suite} --benchmark {wildcards.benchmark} 2> {log:q}"


rule report:
    input:
        suite_metrics,
        suite_tables,
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


rule latest_report:
    input:
        f"results/{SUITE.name}/report.html",
    output:
        "results/report.html",
    log:
        "results/logs/latest_report.txt",
    localrule: True
    conda:
        ENVIRONMENT
    params:
        suite=SUITE.name,
    message:
        "Copy the report to {output}"
    shell:
        "cp {input:q} {output:q} 2> {log:q}"


# One job that mirrors all finished runs: SQLite does not stand parallel writers.
rule mirror_to_mlflow:
    input:
        suite_metrics,
    output:
        "results/{suite}/mlflow.json",
    log:
        "results/logs/{suite}/mirror_to_mlflow.txt",
    localrule: True
    conda:
        ENVIRONMENT
    resources:
        tracking=1,
    params:
        uri=SUITE.tracking_uri,
    message:
        "Mirror the runs to MLflow at {params.uri}"
    shell:
        "python -m benchmarks mirror --suite {wildcards.suite} --uri {params.uri:q} --output {output:q} 2> {log:q}"
