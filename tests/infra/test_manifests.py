"""What `hbi submit --print` writes: valid for KubeRay's own schemas, and the same as the files in infra/cluster."""

import copy
import gzip
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from hbi.infra.cluster import kuberay, slurm
from hbi.infra.cluster.kuberay import ClusterSettings

MANIFESTS = Path(__file__).resolve().parents[2] / "infra" / "cluster" / "manifests"
SHARD = ["shard", "s3://bucket/manifest.jsonl", "s3://bucket/shards"]
TRAIN = ["train", "msrvtt", "--data", "s3://bucket/shards", "--out", "s3://bucket/run"]
SERVE = {"model": "models:/hbi@champion", "index": "s3://bucket/index"}
PRINTED = {
    "shard.rayjob.yaml": lambda: kuberay.rayjob(SHARD, "shard", 3, ClusterSettings(gpus=0)),
    "train.rayjob.yaml": lambda: kuberay.rayjob(TRAIN, "train", 3, ClusterSettings()),
    "serve.rayservice.yaml": lambda: kuberay.rayservice(SERVE, "search", ClusterSettings(gpus=0)),
    "train.sbatch": lambda: slurm.sbatch(TRAIN, "train", 3, ClusterSettings()),
}


@pytest.fixture(scope="module")
def schemas() -> dict[str, Any]:
    """KubeRay's schemas with unknown fields refused, by kind: `<kinds>.v1.strict.json.gz` in the folder HBI_KUBERAY."""
    folder = os.environ.get("HBI_KUBERAY")
    if not folder:
        pytest.skip("needs KubeRay's schemas: set HBI_KUBERAY to a folder with rayjobs.v1.strict.json.gz")
    return {
        kind: json.loads(gzip.decompress(Path(folder, f"{kind.lower()}s.v1.strict.json.gz").read_bytes()))
        for kind in ("RayJob", "RayService")
    }


@pytest.mark.parametrize("name", PRINTED)
def test_the_files_are_what_is_printed(name: str):
    assert (MANIFESTS / name).read_text() == PRINTED[name](), (
        "write it anew: python -m tests.infra.test_manifests"
    )


@pytest.mark.parametrize("name", [name for name in PRINTED if name.endswith(".yaml")])
def test_kuberay_takes_them_and_no_misspelt_field(name: str, schemas: dict[str, Any]):
    manifest = yaml.safe_load(PRINTED[name]())
    schema = schemas[manifest["kind"]]
    jsonschema.validate(manifest, schema)
    spec = manifest["spec"]
    cluster = "rayClusterSpec" if "rayClusterSpec" in spec else "rayClusterConfig"
    for path in (
        ["shutdownAfterJobFinish"],
        [cluster, "autoscalerOption"],
        [cluster, "headGroupSpec", "labls"],
    ):
        wrong = copy.deepcopy(manifest)
        place = wrong["spec"]
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = True
        with pytest.raises(jsonschema.ValidationError, match=path[-1]):
            jsonschema.validate(wrong, schema)


def test_a_job_has_a_head_without_work_and_two_kinds_of_nodes():
    spec = yaml.safe_load(PRINTED["train.rayjob.yaml"]())["spec"]
    # The schemas let any string pass here.
    assert spec["submissionMode"] in ("K8sJobMode", "HTTPMode", "SidecarMode")
    assert spec["shutdownAfterJobFinishes"] and spec["ttlSecondsAfterFinished"] > 0
    cluster = spec["rayClusterSpec"]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert cluster["enableInTreeAutoscaling"] and cluster["autoscalerOptions"]["version"] == "v2"
    cpu, gpu = cluster["workerGroupSpecs"]
    assert (cpu["groupName"], cpu["minReplicas"], cpu["labels"]) == ("cpu", 0, {"decode": "true"})
    assert "affinity" in cpu["template"]["spec"] and "affinity" not in gpu["template"]["spec"]
    limits = gpu["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == "8"
    pods = [cluster["headGroupSpec"], cpu, gpu]
    assert {pod["template"]["spec"]["restartPolicy"] for pod in pods} == {"Never"}
    assert all(
        pod["template"]["spec"]["containers"][0]["envFrom"] == [{"secretRef": {"name": "hbi"}}]
        for pod in pods
    )
    assert spec["entrypoint"] == (
        "python -m hbi.infra.cluster.attempts 3 train msrvtt --data s3://bucket/shards --out s3://bucket/run"
    )


@pytest.mark.parametrize("name", ["Shard", "9", "a_b", "a" * 48, "-a", "a-", ""])
def test_names_that_kubernetes_does_not_take_are_refused(name: str):
    with pytest.raises(ValueError, match=r"^--name [^\n]*Kubernetes wants"):
        kuberay.rayjob(SHARD, name, 3, ClusterSettings())


def test_what_does_not_end_is_no_job():
    with pytest.raises(ValueError, match="--print rayservice"):
        kuberay.rayjob(["serve", "m", "i"], "serve", 3, ClusterSettings())
    with pytest.raises(ValueError, match="does not end"):
        slurm.sbatch(["serve", "m", "i"], "serve", 3, ClusterSettings())
    with pytest.raises(ValueError, match="cpu_nodes is 0"):
        ClusterSettings(cpu_nodes=0)


@pytest.mark.parametrize(
    ("status", "restarts", "requeued"), [(0, 0, False), (1, 0, True), (2, 0, False), (1, 3, False)]
)
def test_slurm_takes_up_again_what_may_pass(tmp_path: Path, status: int, restarts: int, requeued: bool):
    """The script as bash runs it, with stand-ins for Slurm's three programs."""
    stubs = {
        "srun": f'echo "srun $*" >> {tmp_path}/said; exit {status}',
        "scontrol": f'echo "scontrol $*" >> {tmp_path}/said; [ "$1" = show ] && echo localhost || true',
    }
    for name, body in stubs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "job.sh").write_text(PRINTED["train.sbatch"]())
    variables = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "77",
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_RESTART_COUNT": str(restarts),
    }
    ran = subprocess.run(["bash", tmp_path / "job.sh"], env=variables, capture_output=True, text=True)
    assert ran.returncode == status, ran.stderr
    said = (tmp_path / "said").read_text().splitlines()
    assert "srun --kill-on-bad-exit=0 ray symmetric-run --address 127.0.0.1:20077 --min-nodes 2 --" in said[1]
    assert said[1].endswith("-- python -m hbi.infra.cluster.attempts 3 " + " ".join(TRAIN))
    assert ("scontrol requeue 77" in said) == requeued


if __name__ == "__main__":
    for file, text in PRINTED.items():
        (MANIFESTS / file).write_text(text())
