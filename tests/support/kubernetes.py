"""A fake Kubernetes cluster: the part of its API that the plugin uses, with processes as pods.

    python -P tests/support/kubernetes.py FOLDER OPTIONS OF SNAKEMAKE

runs Snakemake with the plugin's own code. A pod is a shell in an empty folder like `/workdir`, with
the path and the job's secrets as its only variables. The volume is the working folder of Snakemake.
FOLDER/specs has the specifications of all jobs. Placement, mounts and limits are not simulated.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kubernetes.client
import kubernetes.config
from kubernetes.client.rest import ApiException


class Cluster:
    """Secrets, jobs and pods, each job with one pod of its name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.secrets: dict[str, dict[str, str]] = {}
        self.pods: dict[str, subprocess.Popen[bytes]] = {}
        (folder / "specs").mkdir(parents=True, exist_ok=True)

    def create_namespaced_secret(self, namespace: str, body: Any) -> None:
        self.secrets[body.metadata.name] = body.data

    def delete_namespaced_secret(self, name: str, namespace: str, **_: Any) -> None:
        del self.secrets[name]

    def create_namespaced_job(self, namespace: str, body: Any) -> None:
        name = body.metadata.name
        spec = kubernetes.client.ApiClient().sanitize_for_serialization(body)
        (self.folder / "specs" / f"{name}.json").write_text(json.dumps(spec, indent=2))
        (container,) = body.spec.template.spec.containers
        place = self.folder / "pods" / name
        place.mkdir(parents=True)
        environment = {key: os.environ[key] for key in ("PATH", "HOME", "OMP_NUM_THREADS")}
        for variable in container.env or []:
            key = variable.value_from.secret_key_ref
            environment[variable.name] = base64.b64decode(self.secrets[key.name][key.key]).decode()
        with (self.folder / f"{name}.log").open("wb") as log:
            self.pods[name] = subprocess.Popen(
                [*container.command, *container.args],
                cwd=place,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def read_namespaced_job_status(self, name: str, namespace: str) -> Any:
        code = self.pods[name].poll()
        status = SimpleNamespace(succeeded=int(code == 0), failed=int(code not in (None, 0)))
        return SimpleNamespace(status=status)

    def list_namespaced_pod(self, namespace: str, label_selector: str) -> Any:
        name = label_selector.removeprefix("job-name=")
        code = self.pods[name].poll()
        ended = None if code is None else SimpleNamespace(exit_code=code)
        container = SimpleNamespace(name="snakemake", state=SimpleNamespace(terminated=ended))
        pod = SimpleNamespace(
            metadata=SimpleNamespace(name=name),
            status=SimpleNamespace(container_statuses=[container]),
        )
        return SimpleNamespace(items=[pod])

    def read_namespaced_pod_log(self, name: str, previous: bool = False, **_: Any) -> str:
        """Refuse the log of a previous container, which does not exist."""
        if previous:
            raise ApiException(status=400, reason="Bad Request")
        return (self.folder / f"{name}.log").read_text()

    def delete_namespaced_pod(self, name: str, namespace: str, **_: Any) -> None:
        if self.pods[name].poll() is None:
            self.pods[name].terminate()

    def delete_namespaced_job(self, name: str, namespace: str, **_: Any) -> None:
        self.delete_namespaced_pod(name, namespace)


def main() -> None:
    """Run Snakemake with the fake cluster."""
    cluster = Cluster(Path(sys.argv.pop(1)))
    kubernetes.config.load_kube_config = lambda: None
    kubernetes.client.CoreV1Api = kubernetes.client.BatchV1Api = lambda: cluster
    from snakemake.cli import main as snakemake

    sys.argv[0] = "snakemake"
    snakemake(sys.argv[1:])


if __name__ == "__main__":
    main()
