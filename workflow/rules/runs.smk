# From a benchmark's grid to metrics.json, one job per run.


rule fetch_package:
    output:
        "resources/packages/{package}",
    log:
        "results/logs/fetch_package/{package}.txt",
    retries: 2
    localrule: True
    conda:
        ENVIRONMENT
    message:
        "Fetch {wildcards.package}"
    shell:
        "python -m benchmarks fetch {wildcards.package:q} --output {output:q} 2> {log:q}"


rule rebuild_model:
    input:
        package_of_model,
    output:
        weights="resources/models/{model}/model.safetensors",
        config="resources/models/{model}/config.json",
    log:
        "results/logs/rebuild_model/{model}.txt",
    conda:
        ENVIRONMENT
    resources:
        mem_mb=3000,
        runtime=10,
    params:
        folder="resources/models/{model}",
    message:
        "Rebuild {wildcards.model} from its package"
    shell:
        "python -m benchmarks rebuild {wildcards.model:q} --output {params.folder:q} 2> {log:q}"


rule partition_neurons:
    input:
        lambda wildcards: runs.model_files(partition_of(wildcards).model),
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
        spec=lambda wildcards: partition_of(wildcards).to_json(),
    message:
        "Cluster neurons: {wildcards.partition}"
    shell:
        "python -m benchmarks partition {params.spec:q} --output {output:q} --threads {threads} 2> {log:q}"


# One rule a benchmark, so that small benchmarks come first: readers see their tables early. A benchmark of which only
# some runs keep their weights has one more, for the others.
for place, name in enumerate(sorted(WEIGHTS, key=lambda name: len(WEIGHTS[name]))):
    for keeps in sorted(set(WEIGHTS[name].values()), reverse=True):

        rule:
            name:
                rule_of_runs(name, keeps)
            input:
                inputs_of_run,
            output:
                "results/runs/{benchmark}/{run}/metrics.json",
                *(
                    [f"results/runs/{{benchmark}}/{{run}}/{paths.WEIGHTS}"]
                    if keeps
                    else []
                ),
            log:
                "results/runs/{benchmark}/{run}/log.txt",
            wildcard_constraints:
                benchmark=name,
                run=pattern_of_runs(name, keeps),
            priority: -place
            conda:
                ENVIRONMENT
            threads: run_threads
            resources:
                mem_mb=grown("mem_mb"),
                runtime=grown("runtime"),
                gpu=run_resource("gpu"),
                # of instruction tuning: how torchrun spreads a run
                processes=run_resource("processes", 1),
                parallel=run_resource("parallel", "ddp"),
                # for the message; unlike a parameter it never makes a run repeat
                called=lambda wildcards: run_of(wildcards).name,
            params:
                # written here: a job of its own for each would keep Snakemake busier than the runs
                spec=lambda wildcards: run_of(wildcards).to_json(),
                file="results/runs/{benchmark}/{run}/run.json",
            message:
                "Run {resources.called}"
            shell:
                "printf '%s\\n' {params.spec:q} > {params.file:q}.part && mv {params.file:q}.part {params.file:q} && "
                "python -m benchmarks run {params.file:q} --threads {threads} --log {log:q}"
                " --processes {resources.processes} --parallel {resources.parallel} --gpus {resources.gpu}"


# Only asked for if a finished run has lost it.
rule write_run_json:
    output:
        "results/runs/{benchmark}/{run}/run.json",
    log:
        "results/logs/write_run_json/{benchmark}/{run}.txt",
    localrule: True
    conda:
        ENVIRONMENT
    params:
        spec=lambda wildcards: run_of(wildcards).to_json(),
    message:
        "Write {output} again"
    shell:
        "printf '%s\\n' {params.spec:q} > {output:q}.part 2> {log:q} && mv {output:q}.part {output:q} 2> {log:q}"
