"""Submit one of Snakemake's jobs to Kubernetes by kubectl: job.yaml, completed by what the job asks for. Writes the name that the cluster gave it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

TEMPLATE = Path(__file__).with_name("job.yaml")
GPU = "nvidia.com/gpu"
_PROPERTIES = "# properties = "  # Snakemake writes them into the script of a job, as JSON


def manifest(script: Path) -> dict[str, Any]:
    """Describe a job for Kubernetes.

    Args:
        script: what it executes, in a folder that its pod sees, too.

    Returns:
        The Job. It is given as much as it asks for and no more, like a job of Slurm's.
    """
    job, gpu_nodes = [*yaml.safe_load_all(TEMPLATE.read_text()), None][:2]
    line = next(line for line in script.read_text().splitlines() if line.startswith(_PROPERTIES))
    properties = json.loads(line.removeprefix(_PROPERTIES))
    resources = properties["resources"]
    asked = {"cpu": properties["threads"], "memory": f"{resources['mem_mb']}M"}
    pod = job["spec"]["template"]["spec"]
    if resources.get("gpu"):
        pod.update(gpu_nodes or {})
        asked[GPU] = resources["gpu"]
    pod["activeDeadlineSeconds"] = 60 * resources["runtime"]  # from when it starts; what waits for a node is not ended
    pod["containers"][0] |= {
        "command": ["/bin/sh", str(script.resolve())],
        "workingDir": str(Path.cwd()),
        "resources": {"requests": asked, "limits": asked},
    }
    rule = properties.get("rule") or properties["groupid"]
    job["metadata"]["generateName"] = f"emoe-{rule.replace('_', '-')[:40]}-"
    # too long for a label; `kubectl get jobs` shows it in a column
    job["metadata"]["annotations"] = {"run": "/".join(properties.get("wildcards", {}).values())}
    return job


def main() -> None:
    """Submit the job of the script that the command line names."""
    command = ["kubectl", "create", "--filename", "-", "--output", "name"]
    try:
        job = json.dumps(manifest(Path(sys.argv[1])))
        found = subprocess.run(command, input=job, stdout=subprocess.PIPE, text=True, check=False)
    except yaml.YAMLError as error:
        sys.exit(f"error: {TEMPLATE}: {' '.join(str(error).split())}")
    except FileNotFoundError as error:
        sys.exit(f"error: {error.filename} is not there")
    if found.returncode:  # it has said why
        sys.exit(found.returncode)
    sys.stdout.write(found.stdout.removeprefix("job.batch/"))


if __name__ == "__main__":
    main()
