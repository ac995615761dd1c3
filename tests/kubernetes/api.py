"""As much of Kubernetes' API as kubectl needs to make, see and delete jobs, on the loopback. A job's command runs on this machine, in its own folder and
without the environment of the test; images, volumes and limits are written down and nothing else is done with them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

_JOBS = "/apis/batch/v1/namespaces/default/jobs"
_KIND = {"group": "batch", "version": "v1", "kind": "Job"}
# what kubectl asks for before it sends anything
_DISCOVERY = {
    "/api": {"kind": "APIVersions", "versions": []},
    "/apis": {
        "kind": "APIGroupList",
        "groups": [
            {
                "name": "batch",
                "versions": [{"groupVersion": "batch/v1", "version": "v1"}],
                "preferredVersion": {"groupVersion": "batch/v1", "version": "v1"},
            }
        ],
    },
    "/apis/batch/v1": {
        "kind": "APIResourceList",
        "groupVersion": "batch/v1",
        "resources": [
            {
                "name": "jobs",
                "singularName": "job",
                "namespaced": True,
                "kind": "Job",
                "verbs": ["create", "get", "list", "delete"],
            }
        ],
    },
    "/openapi/v3": {"paths": {"apis/batch/v1": {"serverRelativeURL": "/openapi/v3/apis/batch/v1"}}},
    "/openapi/v3/apis/batch/v1": {
        "openapi": "3.0.0",
        "info": {"title": "Kubernetes", "version": "v1.32.0"},
        "paths": {
            f"{_JOBS}/{{name}}": {
                "patch": {
                    "x-kubernetes-group-version-kind": _KIND,
                    "parameters": [{"name": "fieldValidation", "in": "query"}],
                    "responses": {},
                }
            }
        },
    },
}


class Cluster:
    """A cluster of this machine.

    Attributes:
        jobs: what was asked for, by name, in the order in which it came.
        down: nothing is answered.
    """

    def __init__(self, folder: Path) -> None:
        self.jobs: dict[str, dict[str, Any]] = {}
        self.down = False
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._ended: set[str] = set()
        self._folder = folder
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.config = folder / "kubeconfig"
        server = {"server": f"http://127.0.0.1:{self._server.server_port}"}
        self.config.write_text(
            json.dumps(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "clusters": [{"name": "test", "cluster": server}],
                    "users": [{"name": "test", "user": {}}],
                    "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
                    "current-context": "test",
                }
            )
        )

    def stop(self) -> None:
        for name in list(self._processes):
            self.end(name)
        self._server.shutdown()
        self._server.server_close()

    @property
    def running(self) -> list[str]:
        return [name for name, process in self._processes.items() if process.poll() is None]

    def end(self, name: str) -> None:
        """As the cluster ends a pod: over its memory, over its time, or with its node."""
        process = self._processes[name]
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def create(self, job: dict[str, Any]) -> dict[str, Any]:
        name = f"{job['metadata']['generateName']}{len(self.jobs):05d}"
        job["metadata"] |= {"name": name, "namespace": "default", "uid": name}
        self.jobs[name] = job
        container = job["spec"]["template"]["spec"]["containers"][0]
        with (self._folder / f"{name}.txt").open("wb") as log:
            self._processes[name] = subprocess.Popen(
                container["command"],
                cwd=container["workingDir"],
                env={"PATH": os.defpath, "HOME": str(self._folder)},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return self.read(name)

    def read(self, name: str) -> dict[str, Any]:
        status = self._processes[name].poll()
        conditions = [{"type": "Suspended", "status": "False"}]
        if status is not None:
            conditions.append({"type": "Failed" if status else "Complete", "status": "True"})
        return {**self.jobs[name], "status": {"conditions": conditions}}

    def delete(self, name: str) -> None:
        self.end(name)
        self._ended.add(name)

    def known(self, name: str) -> bool:
        return name in self.jobs and name not in self._ended

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        cluster = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self, status: int, content: dict[str, Any]) -> None:
                if cluster.down:
                    status, content = 503, _failure(503, "ServiceUnavailable")
                body = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_GET(self) -> None:
                path = self.path.split("?")[0]
                name = path.removeprefix(f"{_JOBS}/")
                if path in _DISCOVERY:
                    self.answer(200, _DISCOVERY[path])
                elif cluster.known(name):
                    self.answer(200, cluster.read(name))
                else:
                    self.answer(404, _failure(404, "NotFound"))

            def do_POST(self) -> None:
                job = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                self.answer(201, cluster.create(job))

            def do_DELETE(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                name = self.path.split("?")[0].removeprefix(f"{_JOBS}/")
                if cluster.known(name):
                    cluster.delete(name)
                    self.answer(200, {"kind": "Status", "apiVersion": "v1", "status": "Success"})
                else:
                    self.answer(404, _failure(404, "NotFound"))

            def log_message(self, *args: object) -> None:
                pass

        return Handler


def _failure(code: int, reason: str) -> dict[str, Any]:
    return {
        "kind": "Status",
        "apiVersion": "v1",
        "status": "Failure",
        "reason": reason,
        "message": reason,
        "code": code,
        "metadata": {},
    }
