# From a benchmark's grid to metrics.json, one job per run.


rule fetch_rated_sentences:
    output:
        suites.ARCHIVE,
    log:
        "results/logs/fetch_rated_sentences.txt",
    retries: 2
    localrule: True
    conda:
        ENVIRONMENT
    message:
        "Fetch the human-rated sentences"
    shell:
        "python -m benchmarks fetch --output {output:q} 2> {log:q}"


rule write_run_spec:
    output:
        "results/runs/{benchmark}/{run}/run.json",
    log:
        "results/logs/{benchmark}/{run}/write_run_spec.txt",
    localrule: True
    conda:
        ENVIRONMENT
    params:
        spec=run_json,
    message:
        "Write the settings of {wildcards.run}"
    shell:
        "printf '%s\\n' {params.spec:q} > {output:q} 2> {log:q}"


rule partition_neurons:
    output:
        "resources/partitions/{partition}.json",
    log:
        "results/logs/partition_neurons/{partition}.txt",
    conda:
        ENVIRONMENT
    threads: 1
    resources:
        mem_mb=3000,
        runtime=60,
    params:
        spec=partition_json,
    message:
        "Cluster neurons: {wildcards.partition}"
    shell:
        "python -m benchmarks partition {params.spec:q} --output {output:q} --threads {threads} 2> {log:q}"


rule train_and_evaluate:
    input:
        run_inputs,
        spec="results/runs/{benchmark}/{run}/run.json",
    output:
        "results/runs/{benchmark}/{run}/metrics.json",
    log:
        "results/runs/{benchmark}/{run}/log.txt",
    conda:
        ENVIRONMENT
    threads: run_threads
    resources:
        mem_mb=run_resource("mem_mb"),
        runtime=run_resource("runtime"),
        gpu=run_resource("gpu"),
    message:
        "Run {wildcards.run}"
    shell:
        "python -m benchmarks run {input.spec:q} --threads {threads} --log {log:q}"
