# From the runs' metrics.json to tables, figures, the report and the MLflow mirror.


# One rule a benchmark, because each has its own tables and figures: `tables_of_glue`.
for benchmark in suites.benchmark_names():
    definition = suites.load_benchmark(benchmark).definition

    rule:
        name:
            f"tables_of_{benchmark}"
        input:
            lambda wildcards, benchmark=benchmark: suite_named(
                wildcards.suite
            ).metric_files(benchmark),
        output:
            tables=expand(
                "results/{{suite}}/tables/{benchmark}_{table}.{end}",
                benchmark=benchmark,
                table=definition["tables"],
                end=suites.FORMATS,
            ),
            figures=report(
                expand(
                    "results/{{suite}}/figures/{benchmark}_{figure}.{end}",
                    benchmark=benchmark,
                    figure=definition["figures"],
                    end=["png", "pdf"],
                ),
                caption="../report/figure.rst",
                category=benchmark,
            ),
        log:
            f"results/logs/{{suite}}/tables_of_{benchmark}.txt",
        localrule: True
        conda:
            ENVIRONMENT
        params:
            benchmark=benchmark,
            captions=" ".join(definition["figures"].values()),
            # comments in the YAML files change nothing here, titles do
            definition=lambda wildcards, benchmark=benchmark: suite_named(
                wildcards.suite
            ).digest(benchmark),
        message:
            f"Tables and figures of {benchmark}, suite {{wildcards.suite}}"
        shell:
            "python -m benchmarks tables --suite {wildcards.suite} --benchmark {params.benchmark} 2> {log:q}"


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
