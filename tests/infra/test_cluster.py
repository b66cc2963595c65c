"""Jobs on a real cluster: submitted as a user submits them, to nodes that share nothing, come and go.

The manifest lies in object storage, runs and models on an MLflow server over HTTP. What a job leaves is what it leaves
where nothing is lost: the same bytes, the same weights, the same rows.
"""

import io
import json
import re
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray

from hbi import cli
from hbi.pipelines.sharding import shards as plain
from hbi.pipelines.sharding.settings import ShardSettings
from tests.support.asking import ask
from tests.support.clips import video, write_manifest
from tests.support.cluster import Node, RayCluster, ray_cluster
from tests.support.mlflow_server import Server
from tests.support.s3 import ObjectStorage, free_port, object_storage
from tests.support.sharding import make
from tests.support.waiting import wait_for

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(600),
    # Of the way in which Ray's client follows a log.
    pytest.mark.filterwarnings("ignore:ssl=None:DeprecationWarning"),
]
CLIPS = 96
SETTINGS = ShardSettings(frames=4, size=32, samples_per_shard=4)
DECODER = "Map(ShardMaker)"
SPLITS = ("train", "train", "val", "test")


@dataclass
class World:
    """What jobs run on."""

    cluster: RayCluster
    storage: ObjectStorage
    server: Server

    def submit(self, *args: str) -> tuple[int, str]:
        """`hbi submit`, and all that it says."""
        return hbi("submit", *args)

    def at_work(self, title: str) -> list[Node]:
        """The nodes where a process of this title runs."""
        alive = self.cluster.alive()
        return [node for node in self.cluster.nodes if node.id in alive and node.runs(title)]

    def lose(self, node: Node) -> None:
        """A node, at once; returns when the cluster knows."""
        node.kill()
        wait_for(
            lambda: node.id not in self.cluster.alive(), 60, "the cluster still counts a node that is gone"
        )


def hbi(*args: str) -> tuple[int, str]:
    """A command in this process: its exit status, and all that it says."""
    said, status = io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(said), redirect_stderr(said):
        patch.setattr(sys, "argv", ["hbi", *args])
        patch.setattr(cli, "end_on_signal", lambda: None)
        try:
            cli.main()
        except SystemExit as ending:
            status = int(ending.code or 0)
    return status, said.getvalue()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A head and two nodes of one CPU; a bucket with the manifest; the MLflow server."""
    folder = tmp_path_factory.mktemp("cluster")
    server = Server(folder / "mlflow")
    with object_storage(folder / "s3") as storage, pytest.MonkeyPatch.context() as patch:
        storage.use(patch)
        patch.setenv("FSSPEC_S3", json.dumps({"config_kwargs": {"read_timeout": 600}}))
        patch.setenv("HBI_CACHE", str(folder / "cache"))
        patch.setenv("MLFLOW_TRACKING_URI", server.uri)
        _write_corpus(storage)
        try:
            server.start()
            with ray_cluster() as cluster:
                patch.setenv("RAY_API_SERVER_ADDRESS", cluster.address)
                for _ in range(2):
                    cluster.add(1)
                yield World(cluster, storage, server)
        finally:
            server.kill()


def _write_corpus(storage: ObjectStorage) -> None:
    """Half of the clips are of early.mp4, and the rest of late.mp4, which a test may hold back."""
    for seed, name in enumerate(("early", "late")):
        storage.put(f"videos/{name}.mp4", video(seed))
    rows = [
        {
            "video": f"videos/{'early' if i < CLIPS / 2 else 'late'}.mp4",
            "id": f"clip {i}",
            "captions": [f"noise number {i}"],
            "split": SPLITS[i % 4],
        }
        for i in range(CLIPS)
    ]
    write_manifest(storage.path("manifest.jsonl"), rows)


def shard_to(out: str) -> list[str]:
    """The job that makes the shards."""
    given = ("--frames", "4", "--size", "32", "--samples-per-shard", "4")
    return ["--", "shard", "s3://corpus/manifest.jsonl", out, *given]


def left_in(storage: ObjectStorage, folder: str) -> dict[str, bytes]:
    """All that a job left in a folder of the bucket, by name."""
    place = storage.path(folder)
    return {str(path.relative_to(place)): path.read_bytes() for path in place.rglob("*") if path.is_file()}


def tars(storage: ObjectStorage, folder: str) -> int:
    return len(list(storage.path(folder).glob("*.tar")))


def has_begun(storage: ObjectStorage, folder: str, node: Node) -> bool:
    """Whether a node has a shard under way."""
    return any(node.id in path.read_text() for path in storage.path(folder).glob(".done/*.json"))


@pytest.fixture(scope="module")
def shards(world: World) -> str:
    """Shards that nothing disturbed, made by a job."""
    status, said = world.submit(*shard_to("s3://corpus/shards"))
    assert status == 0 and f"{CLIPS} samples and 0 failures of {CLIPS} rows" in said, said
    return "shards"


# ---------------------------------------------------------------------------------------------- refusals


def test_what_the_cluster_cannot_see_is_refused_before_anything_is_sent(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out, there, manifest = "s3://corpus/none", "s3://corpus/there", str(tmp_path / "m.jsonl")
    world.storage.put("there/index.json", b"{}")
    write_manifest(tmp_path / "m.jsonl", [{"video": "x.mp4"}])
    unseen = "the cluster does not see this machine's files"
    for line, said in [
        (["shard", manifest, out], f"MANIFEST {manifest}: {unseen}: give an s3:// path"),
        (["train", "debug", "--data", out, "--out", out], f"--data {out}: {out}/index.json is not there"),
        (["train", "debug", "--data", there], f"--out runs/debug: {unseen}"),
        (
            ["train", "debug", "--data", there, "--out", out, "--tracking", "sqlite:///x.db"],
            f"--tracking sqlite:///x.db: {unseen}: start `mlflow server` and give its http:// address",
        ),
        (["index", "model", there, out], f"MODEL model: {unseen}: give a models:/ name or an s3:// folder"),
    ]:
        assert_one_line(world.submit("--", *line), said)
    with monkeypatch.context() as patch:
        patch.setattr(ray, "__version__", "2.9.0")
        assert_one_line(world.submit(*shard_to(out)), "and this machine Ray 2.9.0 on Python")
    assert world.submit("--list")[1] == f"{world.cluster.address}: no jobs of hbi yet\n"


def assert_one_line(answer: tuple[int, str], said: str) -> None:
    status, text = answer
    assert status == 2 and said in text and text.startswith("hbi submit: ") and text.count("\n") == 1, text


def test_a_job_without_credentials_says_so_and_is_not_tried_again(
    world: World, monkeypatch: pytest.MonkeyPatch
):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    status, said = world.submit(*shard_to("s3://corpus/none"))
    lines = [line for line in said.splitlines() if line.startswith("hbi shard: ")]
    assert status == 2 and len(lines) == 1 and "Unable to locate credentials" in lines[0], said
    assert not world.storage.path("none").exists()


# -------------------------------------------------------------------------------------------------- shard


def test_a_job_makes_the_bytes_of_the_plain_loop(world: World, shards: str):
    with plain.decoder(SETTINGS) as decoder:
        make("s3://corpus/manifest.jsonl", "s3://corpus/plain", decoder, SETTINGS)
    assert left_in(world.storage, shards) == left_in(world.storage, "plain")


def test_a_node_is_lost_and_a_new_one_used_while_sharding(world: World, shards: str):
    job = ["--name", "disturbed", *shard_to("s3://corpus/disturbed")]
    with world.storage.holding("/videos/late"):
        assert world.submit("--no-wait", *job)[0] == 0
        wait_for(lambda: tars(world.storage, "disturbed") >= 2, 90, "no shard is made")
        new = world.cluster.add(1)
        wait_for(lambda: has_begun(world.storage, "disturbed", new), 90, "the new node has no work")
        world.lose(next(node for node in world.at_work(DECODER) if node is not new))
        assert tars(world.storage, "disturbed") < CLIPS // 4, "nothing was left to do"
    status, said = world.submit(*job)
    assert status == 0 and f"{CLIPS} samples and 0 failures of {CLIPS} rows" in said, said
    assert left_in(world.storage, "disturbed") == left_in(world.storage, shards)


def test_a_job_that_was_stopped_goes_on_when_it_is_submitted_again(world: World, shards: str):
    job = ["--name", "again", *shard_to("s3://corpus/again")]
    with world.storage.holding("/videos/late"):
        assert world.submit("--no-wait", *job)[0] == 0
        wait_for(lambda: tars(world.storage, "again") >= 2, 90, "no shard is made")
        assert "again-1: stopped" in world.submit("--stop", "again")[1]
        done = {tar: tar.stat().st_mtime_ns for tar in _recorded(world.storage.path("again"))}
        assert 0 < len(done) < CLIPS // 4
    status, said = world.submit(*job)
    assert status == 0 and "again-2 on" in said, said
    assert {tar: tar.stat().st_mtime_ns for tar in done} == done, "finished shards were made again"
    assert left_in(world.storage, "again") == left_in(world.storage, shards)
    listed = [line.split()[:2] for line in world.submit("--list")[1].splitlines()]
    assert ["again-1", "stopped"] in listed and ["again-2", "succeeded"] in listed


def _recorded(folder: Path) -> list[Path]:
    """The tars that count."""
    return [
        tar
        for tar in folder.glob("*.tar")
        if b'"begun"' not in (folder / ".done" / f"{tar.name}.json").read_bytes()
    ]


def test_decoding_prefers_the_nodes_kept_for_it_and_goes_on_without_them(world: World):
    rows = world.storage.path("manifest.jsonl").read_text().splitlines(keepends=True)
    world.storage.put("few.jsonl", "".join(rows[::4][:12]).encode())
    job = ["--name", "few", "--", "shard", "s3://corpus/few.jsonl", "s3://corpus/few"]
    kept = world.cluster.add(2, "--labels", "decode=yes")
    with world.storage.holding("/videos/"):
        assert world.submit("--no-wait", *job)[0] == 0
        wait_for(lambda: bool(world.at_work(DECODER)), 90, "no worker")
        assert world.at_work(DECODER) == [kept]
        wait_for(lambda: has_begun(world.storage, "few", kept), 30, "the shard is not begun")
        world.lose(kept)
    status, said = world.submit(*job)
    assert status == 0 and "12 samples and 0 failures of 12 rows" in said, said


# -------------------------------------------------------------------------------------------------- train


def train_to(out: str) -> list[str]:
    """The job that trains, with a worker on each of two nodes."""
    return [
        "--", "train", "debug", "--data", "s3://corpus/shards", "--out", out,
        "--set.workers.count", "2", "--set.workers.cpus", "1", "--set.optim.epochs", "4", "--set.optim.steps", "24",
        "--set.checkpoint.every-steps", "4", "--set.evaluate.every-epochs", "0",
        "--set.tracking.register", "--set.tracking.alias", "champion",
    ]  # fmt: skip


def runs(world: World) -> list[Any]:
    from mlflow import MlflowClient

    return MlflowClient(world.server.uri).search_runs(["1"])


@pytest.fixture(scope="module")
def model(world: World, shards: str) -> str:
    """A model that was trained undisturbed, and registered."""
    status, said = world.submit(*train_to("s3://corpus/run"))
    assert status == 0 and "name   models:/hbi@champion, models:/hbi/1" in said, said
    return "run"


def test_a_training_node_is_lost_and_another_takes_its_place(world: World, model: str):
    job = ["--name", "training", *train_to("s3://corpus/lost")]
    place = world.storage.path("lost")
    with world.storage.holding(held := "step-00000012", "PUT"):
        assert world.submit("--no-wait", *job)[0] == 0
        wait_for(lambda: _asked(world, "/lost/", held), 120, "no such checkpoint")
        at = world.at_work("ray::RayTrainWorker")
        assert len(at) == 2
        world.lose(at[1])
        world.cluster.add(1)
    status, said = world.submit(*job)
    assert status == 0 and "debug goes on at step 8 " in said, said
    weights = [world.storage.path(f"{run}/model/model.safetensors").read_bytes() for run in ("lost", model)]
    assert weights[0] == weights[1]
    from mlflow import MlflowClient

    (run_id,) = {run.info.run_id for run in runs(world)} - {world.storage.path("run/run-id.txt").read_text()}
    assert run_id == (place / "run-id.txt").read_text()
    steps = [m.step for m in MlflowClient(world.server.uri).get_metric_history(run_id, "train/loss")]
    assert sorted(steps) == list(range(1, 25))


def _asked(world: World, *parts: str) -> bool:
    """Whether storage was asked for something of such a name."""
    return any(all(part in path for part in parts) for _, path in world.storage.requests)


# ---------------------------------------------------------------------------------------- index and serve


def index_to(out: str) -> list[str]:
    """The job that makes an index by the model's name."""
    return ["--", "index", "models:/hbi@champion", "s3://corpus/shards", out, "--batch", "4"]


@pytest.fixture(scope="module")
def index(world: World, model: str) -> str:
    """An index that was made undisturbed."""
    status, said = world.submit(*index_to("s3://corpus/index"))
    assert status == 0 and f"tokens of {CLIPS} clips by models:/hbi/1" in said, said
    return "s3://corpus/index"


def rows_of(index: str) -> list[dict[str, Any]]:
    from hbi.serving.index.table import ClipTable

    table = ClipTable.open(index)._table.to_arrow().sort_by("id")
    return table.to_pylist()


def test_a_node_is_lost_while_embedding(world: World, index: str):
    job = ["--name", "embedding", *index_to("s3://corpus/embedded")]
    with world.storage.holding("/shards/val"):
        assert world.submit("--no-wait", *job)[0] == 0
        wait_for(lambda: _rows(world.storage.uri("embedded")) > 0, 120, "no clip is in the index")
        world.lose(world.at_work("Embed")[0])
        world.cluster.add(1)
    status, said = world.submit(*job)
    assert status == 0, said
    assert rows_of("s3://corpus/embedded") == rows_of(index)


def _rows(index: str) -> int:
    from hbi.serving.index.table import ClipTable

    try:
        return ClipTable.open(index, unfinished=True).snapshot().rows
    except ValueError:
        return 0


def test_search_and_serve_answer_by_the_name_of_the_model(world: World, index: str):
    sentence, port = "noise 3", free_port()
    status, said = hbi("search", index, sentence, "-k", "5")
    assert status == 0, said
    found = re.findall(r"^ *\d+ +[\d.]+  (.+?)  s3://", said, re.MULTILINE)
    job = ["--name", "answering", "--", "serve", "models:/hbi@champion", index, "--port", str(port)]
    assert world.submit("--no-wait", *job)[0] == 0
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: ask(address, "GET", "/health").status == 200, 120, "nothing answers")
        answer = ask(address, "POST", "/search", {"text": sentence, "k": 5})
    finally:
        stopped = world.submit("--stop", "answering")[1]
    assert answer.status == 200 and [each["id"] for each in answer.json["results"]] == found
    assert len(found) == 5 and "answering-1: stopped" in stopped


# -------------------------------------------------------------------------------------------- what is left


def test_nothing_is_left_on_the_cluster(world: World):
    from ray.util.state import list_actors

    actors = list_actors(world.cluster.address, filters=[("state", "!=", "DEAD")])
    left = {actor.class_name for actor in actors if not actor.class_name.startswith("_")}
    assert left <= {"ActorLocationTracker"}  # Ray Data's own, kept for the next job
    # Of Ray, of its dashboard's processes, of torch; the shards that training keeps (--set.data.cache), and what a
    # worker that was killed could not send to MLflow.
    kept = ("ray", "pymp-", "torchinductor_", "hbi-shards-", "hbi-tracking-")
    for node in world.cluster.nodes:
        if node.id in world.cluster.alive():
            names = [path.name for path in (node.folder / "tmp").iterdir()]
            assert not [name for name in names if not name.startswith(kept)]
    assert not [path for path in world.storage.path().rglob("*") if path.name in ("writing", ".staging")]
