# Loads and checks the configuration, and defines short input functions.
# Longer ones are in benchmarks/harness/workflow.
import gc
import os
import sys
from contextlib import contextmanager

# Snakemake keeps millions of objects for ten thousand jobs. The garbage collector would
# walk through them again and again.
gc.set_threshold(100_000, 20, 20)

sys.path.insert(0, str(workflow.basedir))

# this import registers the kinds of benchmarks
import benchmarks.kinds
from benchmarks.harness.base import hide_passwords
from benchmarks.harness.config import catalogue, runs
from benchmarks.harness.config.suite import load_suite, suite_names
from benchmarks.harness.report import artifacts, claims, paper_items
from benchmarks.harness.run import devices
from benchmarks.harness.run.data import missing_sets
from benchmarks.harness.run.forkserver import Server
from benchmarks.harness.workflow import plan, sources, targets
from benchmarks.harness.workflow.environment import job_environment
from benchmarks.harness.workflow.run_rules import run_rules
from emoe.errors import EMoEError
from snakemake.exceptions import WorkflowError
from snakemake.logging import logger

# these two messages say only that the scheduler starts the next jobs
logger.addFilter(
    lambda record: not record.getMessage().startswith(("Select jobs", "Execute "))
)


@contextmanager
def one_line_errors():
    # End with the message of an expected error. A traceback would hide it. Errors of the operating
    # system name the file, such as one on a full disk.
    try:
        yield
    except (EMoEError, OSError) as error:
        sys.exit(f"error: {error}")


with one_line_errors():
    SUITE = load_suite(config)
    # A job on a cluster parses these files again. It reads its run from the plan of the main
    # process if it sees that file.
    IN_JOB = not workflow.is_main_process and plan.is_written(SUITE)
    SHOWN = artifacts.suite_artifacts(SUITE)
    RECORDS = targets.sets_by_record_file(SUITE)
    CLAIMED = claims.claimed_benchmarks(SUITE)
    CLAIM_ARTIFACTS = artifacts.claim_artifacts(SUITE)
    # these two report errors in their files before any work
    artifacts.all_artifacts()
    paper_items.load_paper()
    if not IN_JOB:
        runs.refuse_old_folders()
    # By benchmark and id of the run, True if the run keeps its weights. This plans the
    # runs, so that errors in a grid are reported here.
    KEEPS_WEIGHTS = plan.keeps_weights_by_run(SUITE, in_job=IN_JOB)

RESULTS = f"results/{SUITE.name}"


# only used with `--sdm conda`
ENVIRONMENT = "../envs/emoe.yaml"


# only used with `--sdm apptainer`: made of the Dockerfile's image (docs/cluster.md)
container: "emoe.sif"


wildcard_constraints:
    benchmark="[a-z][a-z0-9_]*",
    run=runs.RUN_ID,
    partition=r"[A-Za-z0-9._+-]+-[0-9a-f]{8}",
    model=r"[a-z0-9][a-z0-9._-]*",
    package=r"[A-Za-z0-9._@+-]+\.(whl|tar\.gz)",


os.environ.update(job_environment(SUITE))


# Jobs of this machine fork from a process that has imported what they need, unless
# `--sdm` gives each job its own Python.
FORKSERVER = Server(SUITE.settings.benchmarks)


onstart:
    jobs = workflow.dag.needrun_jobs()
    run_jobs = [job for job in jobs if job.rule.name.startswith("run_")]
    needed = [run_of(job.wildcards) for job in run_jobs]
    with one_line_errors():
        # on a cluster, the nodes have the accelerators
        if workflow.local_exec:
            devices.check_accelerators(SUITE.name, needed)
        if needed:
            # imported here, because it takes a second
            from benchmarks.harness.report.presentation import check_presentations

            check_presentations(SUITE.settings.benchmarks)
        plan.write_plan(SUITE)
    if not workflow.deployment_settings.deployment_method:
        FORKSERVER.start()
    missing = missing_sets(SUITE)
    if missing:
        print(targets.warn_of_missing_sets(missing, SUITE), file=sys.stderr)


onsuccess:
    FORKSERVER.stop()


onerror:
    FORKSERVER.stop()


def sources_of(*benchmarks):
    # The files that shape the tables of benchmarks. They are local, although results may
    # be in a storage.
    return local(sources.table_sources(*benchmarks))


def benchmark_and_set(benchmark, data_set):
    # the options for a command that works on a benchmark, or on one of its data sets
    if data_set:
        return f"--benchmark {benchmark} --part {data_set}"
    return f"--benchmark {benchmark}"


def numbers_for_claims(shown):
    # a list with the file of a benchmark's numbers, if the paper's claims compare them
    if shown.data_set is None and shown.benchmark in CLAIMED:
        return [artifacts.numbers_file(SUITE.name, shown.benchmark)]
    return []


def run_of(wildcards):
    # the planned run of a job
    folder = f"{wildcards.benchmark}/{wildcards.run}"
    with one_line_errors():
        if IN_JOB:
            return plan.read_run_of_job(folder, SUITE)
        return plan.find_run(folder, SUITE)


def partition_of(wildcards):
    # the planned partition of a job
    with one_line_errors():
        if IN_JOB:
            return plan.read_partition_of_job(wildcards.partition, SUITE)
        return plan.find_partition(wildcards.partition, SUITE)


def package_of_model(wildcards):
    # the package file that a model is rebuilt from
    with one_line_errors():
        return catalogue.rebuilt_from(wildcards.model).path


def inputs_of_run(wildcards):
    # A finished run needs nothing. Its id is the hash of all that shapes its numbers, so
    # time stamps do not matter.
    run = run_of(wildcards)
    if run.has_all_results:
        return []
    return runs.run_inputs(run)


def run_resource(name, usual=None):
    # Make the function of a rule's resource: the value that the suite reserves for the run, or
    # `usual` if it reserves none.
    return lambda wildcards: run_of(wildcards).resources.get(name, usual)


def growing_resource(name):
    # Make the function of a resource that grows each time that a job is tried again. It matters
    # only on clusters.
    return lambda wildcards, attempt: run_of(wildcards).resources[name] * attempt


def all_threads():
    # All threads of this machine. Those of a cluster's nodes are unknown.
    try:
        return workflow.cores
    except WorkflowError:
        return 2


def run_threads(wildcards):
    # 0 stands for all threads, so that nothing else runs during a measurement
    return run_of(wildcards).resources["threads"] or all_threads()


def refuse(explain):
    # Make the input function of a target that cannot be made. It ends the workflow with the reason
    # if someone asks for the target.
    def reason(wildcards):
        with one_line_errors():
            text = explain(wildcards)
        sys.exit(f"error: {text}")

    return reason
