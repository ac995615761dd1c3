# From the runs' metrics.json to tables, figures, pages and the MLflow mirror.
# Only `collect` parses metrics.json; the others compare its digest.


# The records of a benchmark's runs in one file, so that each metrics.json is read once. If a
# benchmark has separate tables for each image set, each image set has a file.
rule collect:
    input:
        lambda wildcards: targets.metric_files(SUITE, *RECORDS[wildcards.records]),
        local(sources.record_sources()),
    output:
        f"{RESULTS}/records/{{records}}.jsonl",
    log:
        f"results/logs/{SUITE.name}/collect/{{records}}.txt",
    wildcard_constraints:
        records="|".join(RECORDS),
    localrule: True
    conda:
        ENVIRONMENT
    params:
        # Changes when a run is removed, so that the records are collected again. The inputs alone
        # would not show this.
        runs=lambda wildcards: targets.digest_of_runs(
            SUITE, *RECORDS[wildcards.records]
        ),
        what=lambda wildcards: benchmark_and_set(*RECORDS[wildcards.records]),
        suite=SUITE.name,
    message:
        "Collect the records of {wildcards.records}"
    shell:
        "python -m benchmarks collect --suite {params.suite} {params.what} 2> {log:q}"


# A rule for each benchmark, because each has its own tables and figures: `tables_of_glue`. If a
# benchmark has separate tables for each image set, also a rule for each image set:
# `tables_of_domainbed_pacs`. Tables and figures of the paper are also written under the paper's
# numbers, with the paper's rows: `results/<suite>/paper/table_4.md`.
for shown in SHOWN:

    rule:
        name:
            f"tables_of_{shown.name}"
        input:
            targets.record_files(SUITE, shown.benchmark, shown.data_set),
            sources_of(shown.benchmark),
        output:
            shown.table_files(SUITE.name),
            shown.figure_files(SUITE.name),
            paper_items.files_of(shown, SUITE.name),
            shown.section_file(SUITE.name),
            numbers_for_claims(shown),
        log:
            f"results/logs/{SUITE.name}/tables_of_{shown.name}.txt",
        localrule: True
        conda:
            ENVIRONMENT
        params:
            # A suite with fewer runs or data sets makes them again. This is a function,
            # because a job on a cluster plans no runs.
            runs=lambda wildcards, shown=shown: targets.digest_of_runs(
                SUITE, shown.benchmark, shown.data_set
            ),
            what=benchmark_and_set(shown.benchmark, shown.data_set),
            suite=SUITE.name,
        message:
            f"Tables and figures of {shown.name}"
        shell:
            "python -m benchmarks tables --suite {params.suite} {params.what} 2> {log:q}"


if CLAIMED:

    rule table_of_claims:
        input:
            targets.number_files(SUITE),
            sources_of(*CLAIMED),
            local(sources.claim_sources()),
        output:
            CLAIM_ARTIFACTS.table_files(SUITE.name),
            CLAIM_ARTIFACTS.figure_files(SUITE.name),
            paper_items.main_files(SUITE.name),
        log:
            f"results/logs/{SUITE.name}/table_of_claims.txt",
        localrule: True
        conda:
            ENVIRONMENT
        params:
            # if a suite has other benchmarks, the claims are tested again
            benchmarks=CLAIMED,
            suite=SUITE.name,
        message:
            "What the runs say of the paper's claims"
        shell:
            "python -m benchmarks claims --write --suite {params.suite} 2> {log:q}"


# A page for each benchmark, so that the first results can be read while other runs are running.
rule benchmark_report:
    input:
        lambda wildcards: targets.section_files(SUITE, wildcards.benchmark),
        lambda wildcards: targets.output_files(SUITE, wildcards.benchmark),
        local(sources.page_sources()),
    output:
        f"{RESULTS}/{{benchmark}}.html",
    log:
        f"results/logs/{SUITE.name}/benchmark_report/{{benchmark}}.txt",
    wildcard_constraints:
        benchmark="|".join(SUITE.settings.benchmarks),
    localrule: True
    conda:
        ENVIRONMENT
    params:
        # a change of one of these makes the page again
        note=lambda wildcards: SUITE.benchmark_parts[wildcards.benchmark].settings.note,
        sets=lambda wildcards: SUITE.sets_with_tables(wildcards.benchmark),
        suite=SUITE.name,
    message:
        "Page of {wildcards.benchmark}: {output}"
    shell:
        "python -m benchmarks report --suite {params.suite} --benchmark {wildcards.benchmark}"
        " --output {output:q} 2> {log:q}"


rule report:
    input:
        targets.section_files(SUITE),
        targets.output_files(SUITE),
        paper_items.paper_files(SUITE),
        local(sources.page_sources()),
    output:
        f"{RESULTS}/report.html",
    log:
        f"results/logs/{SUITE.name}/report.txt",
    localrule: True
    conda:
        ENVIRONMENT
    params:
        # a change of one of these makes the page again
        notes=[
            (name, SUITE.sets_with_tables(name), part.settings.note)
            for name, part in SUITE.benchmark_parts.items()
        ],
        suite=SUITE.name,
    message:
        "Report of the suite: {output}"
    shell:
        "python -m benchmarks report --suite {params.suite} --output {output:q} 2> {log:q}"


# One job that mirrors all finished runs.
rule mirror_to_mlflow:
    input:
        targets.record_files(SUITE),
    output:
        f"{RESULTS}/mlflow.txt",
    log:
        f"results/logs/{SUITE.name}/mirror_to_mlflow.txt",
    localrule: True
    conda:
        ENVIRONMENT
    params:
        # without its password, because Snakemake writes parameters and commands into its logs
        store=hide_passwords(SUITE.tracking_uri),
        suite=SUITE.name,
    message:
        "Mirror the runs to MLflow at {params.store}"
    shell:
        "python -m benchmarks mirror --suite {params.suite} --output {output:q} 2> {log:q}"
