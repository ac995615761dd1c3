# Loads and checks the configuration; short input functions. Logic lives in benchmarks/harness.
import gc
import os
import sys
from contextlib import contextmanager

# the millions of objects that Snakemake keeps for ten thousand jobs would be walked through again and again
gc.set_threshold(100_000, 20, 20)

sys.path.insert(0, str(workflow.basedir))

import benchmarks.kinds
from benchmarks.harness import base as paths
from benchmarks.harness.base import hide_passwords
from benchmarks.harness.config import artifacts, catalogue, claims, paper_items, runs
from benchmarks.harness.config.artifacts import CLAIMS
from benchmarks.harness.config import suite as suites
from benchmarks.harness.run import devices
from benchmarks.harness.run.forkserver import Server
from emoe.errors import EMoEError
from snakemake.exceptions import WorkflowError
from snakemake.logging import logger

# a finished run is news; that the scheduler starts the next one is not
logger.addFilter(
    lambda record: not record.getMessage().startswith(("Select jobs", "Execute "))
)


@contextmanager
def one_line_errors():
    # an expected error explains itself; a traceback would hide it
    try:
        yield
    except EMoEError as error:
        sys.exit(f"error: {error}")


with one_line_errors():
    SUITE = suites.load_suite(config)
    SHOWN = artifacts.all_artifacts()
    paper_items.load_paper()
    if (
        workflow.is_main_process
    ):  # a job on a cluster has its run from the main process, and plans nothing
        SUITE.runs
        claims.load_claims()


# only used with `--sdm conda`
ENVIRONMENT = "../envs/emoe.yaml"


# only used with `--sdm apptainer`: made of the Dockerfile's image (docs/cluster.md)
container: "emoe.sif"


# by whether they train; None for both
RUN_NAMES = {
    None: r"[A-Za-z0-9._+-]+-[0-9a-f]{8}",
    True: r"[A-Za-z0-9._+-]+-lr[0-9][A-Za-z0-9._+-]*-[0-9a-f]{8}",
    False: r"(?:(?!-lr[0-9])[A-Za-z0-9._+-])+-[0-9a-f]{8}",
}


wildcard_constraints:
    suite="[a-z][a-z0-9_]*",
    benchmark="[a-z][a-z0-9_]*",
    run=RUN_NAMES[None],
    partition=r"[A-Za-z0-9._+-]+-[0-9a-f]{8}",
    model=r"[a-z0-9][a-z0-9._-]*",
    package=r"[A-Za-z0-9._@+-]+\.(whl|tar\.gz|tgz)",


# Local paths and the plan reach the jobs through the environment: as parameters of a rule they would
# make Snakemake run everything again when they change.
os.environ.update(SUITE.environment())


# Jobs of this machine fork from a process that has imported what they need, unless `--sdm` gives each its own Python.
FORKSERVER = Server(SUITE.settings.benchmarks)


def run_jobs(jobs):
    return [job for job in jobs if job.rule.name.startswith("run_")]


onstart:
    needed = [
        run_of(job.wildcards) for job in run_jobs(workflow.dag.needrun_jobs())
    ]
    with one_line_errors():
        if workflow.local_exec:  # else a cluster's nodes have the accelerators
            devices.check_accelerators(SUITE.name, needed)
        if needed:
            from benchmarks.harness.report.presentation import (
                check_presentations,
            )  # it takes a second

            check_presentations(SUITE.settings.benchmarks)
    if not workflow.deployment_settings.deployment_method:
        FORKSERVER.start()
    # of the targets that were asked for: of one table they are fewer than the suite's
    SUITE.write_plan(
        {
            f"{job.wildcards.benchmark}/{job.wildcards.run}"
            for job in run_jobs(workflow.dag.jobs)
        }
    )
    if missing := SUITE.missing_sets():
        print(
            f"not there: {', '.join(missing)}. What needs them will fail; `python -m benchmarks data --check "
            f"--suite {SUITE.name}` says where they come from, `--config exclude=[{','.join(missing)}]` leaves them out",
            file=sys.stderr,
        )


onsuccess:
    FORKSERVER.stop()


onerror:
    FORKSERVER.stop()


def suite_named(name):
    """The configured suite, or another one by name (`snakemake smoke` under any configuration)."""
    if name == SUITE.name:
        return SUITE
    with one_line_errors():
        suite = suites.plain_suite(name)
        suite.runs
        return suite


def sources_of(*benchmarks):
    # local: they are on this machine although results may be in a storage
    return local(artifacts.table_sources(*benchmarks))


def in_report(shown, category):
    # figures, which Snakemake's own report names by what they show
    labels = {}
    for file in shown.figure_files("{suite}"):
        stem, end = os.path.basename(file).rsplit(".", 1)
        labels[file] = {"figure": stem.replace("_", " "), "format": end}
    said = dict(caption="../report/figure.rst", category=category)
    return [report(file, labels=labels[file], **said) for file in labels]


def suite_outputs(suite):
    # runs and weights are named too: a deleted one is made again although its tables are still there
    return [
        f"results/{suite.name}/report.html",
        f"results/{suite.name}/mlflow.txt",
        *suite.metric_files(),
        *suite.weight_files(),
        *suite.output_files(),
        *suite.pages(),
        *paper_items.paper_files(suite),
    ]


def outputs_of(benchmark):
    # of the configured suite, or of the suite of the benchmark's own name; the first is the page
    if benchmark in SUITE.settings.benchmarks:
        return [*SUITE.pages(benchmark), *SUITE.output_files(benchmark)]
    if benchmark in suites.suite_names():
        return lambda wildcards: suite_outputs(suite_named(benchmark))
    return not_here(benchmark, [benchmark])


# inputs of targets that cannot be made: they end with the reason when the target is asked for
def refused(reason):
    return lambda wildcards: sys.exit(f"error: {reason}")


def not_here(target, wanted, part=None):
    def reason(wildcards):
        with one_line_errors():
            hint = suites.suites_hint(target, wanted, SUITE, part)
        sys.exit(f"error: {hint}")

    return reason


def run_of(wildcards):
    folder = f"{wildcards.benchmark}/{wildcards.run}"
    with one_line_errors():
        return suites.find_run(folder, SUITE, on_cluster=not workflow.is_main_process)


def run_resource(name, usual=None):
    return lambda wildcards: run_of(wildcards).resources.get(name, usual)


def grown(name):
    # more of it each time that a job is tried again; only schedulers of clusters care
    return lambda wildcards, attempt: run_of(wildcards).resources[name] * attempt


def all_threads():
    # of a cluster's nodes nobody knows how many they have
    try:
        return workflow.cores
    except WorkflowError:
        return 2


def run_threads(wildcards):
    # 0 stands for all, so that nothing runs beside a measurement
    return run_of(wildcards).resources["threads"] or all_threads()


def partition_of(wildcards):
    on_cluster = not workflow.is_main_process
    with one_line_errors():
        return suites.find_partition(wildcards.partition, SUITE, on_cluster=on_cluster)


def suite_metrics(wildcards):
    return suite_named(wildcards.suite).metric_files()


def suite_tables(wildcards):
    return suite_named(wildcards.suite).output_files()
