"""What the cluster has, and what each node of it sees. Two nodes in one process's Ray, by Ray's own test cluster."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hbi.infra import nodes
from hbi.infra.ray_runtime import messages


def node(**of: object) -> dict:
    return {"Alive": True, "Resources": {}, "Labels": {}, "NodeManagerAddress": "10.0.0.2", **of}


def test_cores_are_those_that_the_process_may_use():
    one = "import os; os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:1]); "
    code = one + "from hbi.infra.nodes import cores; print(cores())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "1\n"
    assert nodes.cores() <= len(os.sched_getaffinity(0))


def test_the_limit_of_a_container_counts(monkeypatch: pytest.MonkeyPatch):
    from joblib.externals.loky.backend import context

    monkeypatch.setattr(context, "_cpu_count_cgroup", lambda count: 1)
    assert nodes.cores() == 1


def test_decoding_prefers_the_nodes_that_are_kept_for_it(monkeypatch: pytest.MonkeyPatch):
    has = [node()]
    monkeypatch.setattr(nodes, "alive_nodes", lambda: has)
    assert nodes.decode_options() == {}
    anywhere = [{"label_selector": {}}]
    has += [node(Resources={"decode": 4.0}, NodeID="b"), node(Resources={"decode": 1.0}, NodeID="a")]
    assert nodes.decode_options() == {
        "label_selector": {"ray.io/node-id": "in(a,b)"},
        "fallback_strategy": anywhere,
    }
    has += [node(Labels={"decode": "yes"}), node(Labels={"decode": "false"}), node(Labels={"decode": "spot"})]
    assert nodes.decode_options() == {
        "label_selector": {"decode": "in(spot,yes)"},
        "fallback_strategy": anywhere,
    }
    has[:] = [node(Labels={"decode": "false"})]
    assert nodes.decode_options() == {}


def test_what_the_cluster_lacks_is_said(ray_session: None):
    nodes.require_resources("--gpus", {"CPU": 2, "GPU": 0})
    with pytest.raises(
        ValueError, match=r"^--gpus: asks for 4 GPUs, and the cluster has 0 \(on 1 node, with 2 CPUs\)"
    ):
        nodes.require_resources("--gpus", {"GPU": 4})


def test_one_node_sees_every_local_path(ray_session: None, tmp_path: Path):
    nodes.require_shared({"--out": str(tmp_path / "none"), "--tracking": "sqlite:///x.db"})
    assert not (tmp_path / "none").exists()


def test_a_path_that_another_node_does_not_see_is_refused(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "out"
    monkeypatch.setattr(nodes, "alive_nodes", lambda: [node(), node()])
    monkeypatch.setattr(nodes, "on_every_node", lambda _, places: {"10.0.0.2": dict.fromkeys(places)})
    with pytest.raises(ValueError, match=rf"^--out {out}: node 10.0.0.2 does not see this folder[^\n]*s3://"):
        nodes.require_shared({"--out": str(out)})
    with pytest.raises(ValueError, match=r"^--tracking sqlite:///x.db: 2 nodes cannot share a sqlite file"):
        nodes.require_shared({"--tracking": "sqlite:///x.db"})
    nodes.require_shared({"model": "models:/hbi/3", "shards": "s3://b/shards", "--tracking": "http://m:5000"})


def test_a_path_that_every_node_sees_will_do(ray_session: None, tmp_path: Path):
    seen = nodes.on_every_node(nodes._stamps, [str(tmp_path), str(tmp_path / "none")])
    stat = tmp_path.stat()
    assert list(seen.values()) == [
        {str(tmp_path): (stat.st_size, stat.st_mtime_ns), str(tmp_path / "none"): None}
    ]


def test_messages_of_workers_arrive_in_order(ray_session: None):
    import ray

    def send(sender: object, name: int) -> None:
        for number in range(49):
            sender((name, number))  # pyright: ignore[reportCallIssue]
        ray.get(sender((name, 49)))  # pyright: ignore[reportCallIssue]

    received: list[tuple[int, int]] = []
    with messages(received.append) as line:
        ray.get([ray.remote(send).remote(line.say, name) for name in range(2)])
    assert sorted(received) == [(name, number) for name in range(2) for number in range(50)]
    assert [m for m in received if m[0] == 0] == [(0, number) for number in range(50)]
