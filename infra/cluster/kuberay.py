"""A command as a KubeRay manifest: a RayJob of its own cluster, or a RayService for `serve`. KubeRay 1.5 or newer."""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import yaml

from hbi.infra.nodes import DECODE

NAME_CHARACTERS = 47
"""KubeRay makes longer names of a job's, and Kubernetes takes 63."""
CACHE = "/cache"
SPOT = {
    "cloud.google.com/gke-spot": "true",
    "eks.amazonaws.com/capacityType": "SPOT",
    "karpenter.sh/capacity-type": "spot",
    "kubernetes.azure.com/scalesetpriority": "spot",
}
"""How clouds mark the nodes that they may take back."""


@dataclass(frozen=True)
class ClusterSettings:
    """The cluster that a printed manifest asks for."""

    image: str = "hbi:latest"
    """Made with infra/cluster/Dockerfile, in a registry that the nodes reach."""
    secret: str = "hbi"
    """The Secret whose keys become variables on every node: AWS_*, MLFLOW_TRACKING_URI, HF_TOKEN."""
    cpu_nodes: int = 16
    """Most CPU nodes, on which clips are decoded; they come and go with the work."""
    cpus: int = 16
    """CPUs of a CPU node."""
    gpu_nodes: int = 1
    """Most GPU nodes (Slurm: nodes)."""
    gpus: int = 8
    """GPUs of a GPU node; 0 for a cluster without any."""
    spot: bool = True
    """Whether CPU nodes may be taken back at any time; what was done stays done."""
    hours: int = 24
    """Slurm's time limit; a job that needs more is taken up again."""

    def __post_init__(self) -> None:
        for name in ("cpu_nodes", "cpus", "hours"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, must be at least 1")
        if self.gpus and self.gpu_nodes < 1:
            raise ValueError(f"gpu_nodes is {self.gpu_nodes}, must be at least 1 (or gpus 0)")


def rayjob(command: Sequence[str], name: str, retries: int, settings: ClusterSettings) -> str:
    """The manifest of a RayJob, YAML. ValueError for a name that Kubernetes does not take, or a command without end."""
    if command[0] == "serve":
        raise ValueError("--print rayjob: serve does not end: --print rayservice")
    entrypoint = shlex.join(["python", "-m", "hbi.infra.cluster.attempts", str(retries), *command])
    job = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": _checked(name)},
        "spec": {
            "entrypoint": entrypoint,
            "submissionMode": "K8sJobMode",
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 600,
            # The command's own attempts are made on the cluster; this one is for a cluster that is lost.
            "backoffLimit": 1,
            "rayClusterSpec": _cluster(settings),
        },
    }
    return _text(job, settings)


def rayservice(arguments: Mapping[str, str], name: str, settings: ClusterSettings) -> str:
    """The manifest of a RayService, YAML. arguments: what `hbi.serving.front:application` is given."""
    serve = {
        "applications": [
            {
                "name": "hbi",
                "import_path": "hbi.serving.front:application",
                "route_prefix": "/",
                "args": dict(arguments),
            }
        ]
    }
    service = {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": _checked(name)},
        "spec": {
            "serveConfigV2": yaml.safe_dump(serve, sort_keys=False),
            "rayClusterConfig": _cluster(settings),
        },
    }
    return _text(service, settings)


def _checked(name: str) -> str:
    if len(name) > NAME_CHARACTERS or not re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", name):
        raise ValueError(
            f"--name {name}: Kubernetes wants small letters, digits and dashes, a letter first, "
            f"{NAME_CHARACTERS} characters at most"
        )
    return name


class _Plain(yaml.SafeDumper):
    """YAML as people write it: nothing by reference, several lines as a block."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Plain.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style="|" if "\n" in text else None
    ),
)


def _text(manifest: Mapping[str, Any], settings: ClusterSettings) -> str:
    head = (
        "# Checked against KubeRay's schemas; no Kubernetes ran it.\n"
        f"# Its credentials: kubectl create secret generic {settings.secret} --from-env-file=FILE\n"
    )
    return head + yaml.dump(manifest, Dumper=_Plain, sort_keys=False, width=110)


def _cluster(settings: ClusterSettings) -> dict[str, Any]:
    """Head without work, CPU nodes that come and go, GPU nodes."""
    groups = [_group("cpu", settings.cpu_nodes, _pod(settings, settings.cpus, 0, settings.spot))]
    groups[0]["labels"] = {DECODE: "true"}
    if settings.gpus:
        groups.append(
            _group("gpu", settings.gpu_nodes, _pod(settings, 8 * settings.gpus, settings.gpus, False))
        )
    head = _pod(settings, 4, 0, False)
    # The second autoscaler asks for a head that Kubernetes does not start again by itself.
    return {
        "rayVersion": metadata.version("ray"),
        "authOptions": {"mode": "token"},
        "enableInTreeAutoscaling": True,
        "autoscalerOptions": {"version": "v2", "idleTimeoutSeconds": 120},
        "headGroupSpec": {"rayStartParams": {"num-cpus": "0", "dashboard-host": "0.0.0.0"}, "template": head},
        "workerGroupSpecs": groups,
    }


def _group(name: str, most: int, pod: dict[str, Any]) -> dict[str, Any]:
    return {
        "groupName": name,
        "minReplicas": 0,
        "maxReplicas": most,
        "replicas": 0,
        "rayStartParams": {},
        "template": pod,
    }


def _pod(settings: ClusterSettings, cpus: int, gpus: int, spot: bool) -> dict[str, Any]:
    """A node: as many CPUs as it says, 4 GiB for each, and a cache that all its processes share."""
    resources = {"cpu": str(cpus), "memory": f"{4 * cpus}Gi"} | (
        {"nvidia.com/gpu": str(gpus)} if gpus else {}
    )
    container = {
        "name": "ray",
        "image": settings.image,
        "envFrom": [{"secretRef": {"name": settings.secret}}],
        "env": [{"name": "HBI_CACHE", "value": CACHE}],
        "resources": {"requests": resources, "limits": resources},
        "volumeMounts": [{"name": "cache", "mountPath": CACHE}],
    }
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "securityContext": {"runAsNonRoot": True, "fsGroup": 1000},
        "containers": [container],
        "volumes": [{"name": "cache", "emptyDir": {}}],
    }
    if gpus:
        pod["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    if spot:
        pod["tolerations"] = [
            {"key": key, "operator": "Equal", "value": value, "effect": "NoSchedule"}
            for key, value in SPOT.items()
        ]
        terms = [
            {
                "weight": 1,
                "preference": {"matchExpressions": [{"key": key, "operator": "In", "values": [value]}]},
            }
            for key, value in SPOT.items()
        ]
        pod["affinity"] = {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": terms}}
    return {"spec": pod}
