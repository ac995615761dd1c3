# Loads and checks the configuration; short input functions. Logic lives in benchmarks/harness/workflow.
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
from benchmarks.harness.config import catalogue, runs
from benchmarks.harness.config.suite import load_suite, suite_names
from benchmarks.harness.report import artifacts, claims, paper_items
from benchmarks.harness.report.artifacts import CLAIMS
from benchmarks.harness.run import devices
from benchmarks.harness.run.data import missing_sets
from benchmarks.harness.run.forkserver import Server
from benchmarks.harness.workflow import plan, sources, targets
from benchmarks.harness.workflow.environment import job_environment
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
    SUITE = load_suite(config)
    # A job on a cluster parses these files again. It gets its run from the plan of the main process if it sees that file.
    IN_JOB = not workflow.is_main_process and plan.is_written(SUITE)
    SHOWN = artifacts.suite_artifacts(SUITE)
    RECORDS = targets.parts_by_records(SUITE)
    CLAIMED = claims.claimed_benchmarks(SUITE)
    # both refuse wrong files before any work
    artifacts.all_artifacts()
    paper_items.load_paper()
    if not IN_JOB:
        runs.refuse_old_folders()
        SUITE.runs
    WEIGHTS = plan.weights_by_benchmark(SUITE, in_job=IN_JOB)

RESULTS = f"results/{SUITE.name}"
RUN_ID = "[0-9a-f]{12}"


# only used with `--sdm conda`
ENVIRONMENT = "../envs/emoe.yaml"


# only used with `--sdm apptainer`: made of the Dockerfile's image (docs/cluster.md)
container: "emoe.sif"


wildcard_constraints:
    benchmark="[a-z][a-z0-9_]*",
    run=RUN_ID,
    partition=r"[A-Za-z0-9._+-]+-[0-9a-f]{8}",
    model=r"[a-z0-9][a-z0-9._-]*",
    package=r"[A-Za-z0-9._@+-]+\.(whl|tar\.gz)",


os.environ.update(job_environment(SUITE))


# Jobs of this machine fork from a process that has imported what they need, unless `--sdm` gives each its own Python.
FORKSERVER = Server(SUITE.settings.benchmarks)


onstart:
    needed = [
        run_of(job.wildcards)
        for job in workflow.dag.needrun_jobs()
        if job.rule.name.startswith("run_")
    ]
    with one_line_errors():
        if workflow.local_exec:  # else a cluster's nodes have the accelerators
            devices.check_accelerators(SUITE.name, needed)
        if needed:
            # imported here, because it takes a second
            from benchmarks.harness.report.presentation import check_presentations

            check_presentations(SUITE.settings.benchmarks)
        plan.write_plan(SUITE)
    if not workflow.deployment_settings.deployment_method:
        FORKSERVER.start()
    if missing := missing_sets(SUITE):
        print(
            f"not there: {', '.join(missing)}. What needs them will fail; `python -m benchmarks data --check "
            f"--suite {SUITE.name}` says where they come from, `--config exclude=[{','.join(missing)}]` leaves them out",
            file=sys.stderr,
        )


onsuccess:
    FORKSERVER.stop()


onerror:
    FORKSERVER.stop()


def sources_of(*benchmarks):
    # local: they are on this machine although results may be in a storage
    return local(sources.table_sources(*benchmarks))


def benchmark_and_part(benchmark, part):
    return f"--benchmark {benchmark}" + (f" --part {part}" if part else "")


def run_of(wildcards):
    folder = f"{wildcards.benchmark}/{wildcards.run}"
    with one_line_errors():
        if IN_JOB:
            return plan.read_run_of_job(folder, SUITE)
        return plan.find_run(folder, SUITE)


def partition_of(wildcards):
    with one_line_errors():
        if IN_JOB:
            return plan.read_partition_of_job(wildcards.partition, SUITE)
        return plan.find_partition(wildcards.partition, SUITE)


def package_of_model(wildcards):
    with one_line_errors():
        return catalogue.rebuilt_from(wildcards.model).path


def inputs_of_run(wildcards):
    # A finished run needs nothing. Its id is the hash of all that shapes its numbers, so time stamps do not matter.
    run = run_of(wildcards)
    return [] if run.is_finished else runs.run_inputs(run)


def rule_of_runs(benchmark, keeps_weights):
    has_both = len(set(WEIGHTS[benchmark].values())) == 2
    return (
        f"run_{benchmark}_untrained"
        if has_both and not keeps_weights
        else f"run_{benchmark}"
    )


def pattern_of_runs(benchmark, keeps_weights):
    # the plan knows which runs keep their weights
    without = [run for run, kept in WEIGHTS[benchmark].items() if not kept]
    if len(without) in (0, len(WEIGHTS[benchmark])):
        return RUN_ID
    ids = "|".join(without)
    return f"(?!{ids}){RUN_ID}" if keeps_weights else f"(?:{ids})"


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


def refuse(explain):
    # the input of a target that cannot be made: it ends with the reason when the target is asked for
    def reason(wildcards):
        with one_line_errors():
            text = explain(wildcards)
        sys.exit(f"error: {text}")

    return reason
