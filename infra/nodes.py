"""What the cluster that Ray runs on has: CPUs and GPUs, its nodes, and whether they see a path."""

import os
from collections.abc import Callable, Mapping
from typing import Any

from hbi.infra import storage

DECODE = "decode"
"""Label (any value but `false`) or resource of the nodes that decoding prefers."""


def cores() -> int:
    """CPUs that this process may use: its affinity, and the limit of its container."""
    from joblib import cpu_count

    return max(1, cpu_count())


def alive_nodes() -> list[dict[str, Any]]:
    """The nodes of the running cluster, as `ray.nodes()` describes them."""
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def decode_options() -> dict[str, Any]:
    """Ray's options for what decodes: on the nodes kept for that while they have room, else anywhere.

    A resource that is asked for would be waited for without end where its node is gone: nodes that have one are named.
    """
    nodes = alive_nodes()
    labels = {node.get("Labels", {}).get(DECODE) for node in nodes} - {None, "false"}
    having = sorted(node["NodeID"] for node in nodes if node["Resources"].get(DECODE))
    if labels:
        wanted = {DECODE: f"in({','.join(sorted(labels))})"}
    elif having:
        wanted = {"ray.io/node-id": f"in({','.join(having)})"}
    else:
        return {}
    return {"label_selector": wanted, "fallback_strategy": [{"label_selector": {}}]}


def require_resources(what: str, wanted: Mapping[str, float]) -> None:
    """ValueError where the cluster has not, and cannot grow to have, what is wanted of it (`{"GPU": 2}`)."""
    import ray
    from ray._private.state import state

    now = ray.cluster_resources()
    most = state.get_max_resources_from_cluster_config() or {}
    for name, count in wanted.items():
        has = max(now.get(name, 0), most.get(name, 0))
        if count > has:
            nodes = len(alive_nodes())
            raise ValueError(
                f"{what}: asks for {count:g} {name}s, and the cluster has {has:g} (on {nodes} "
                f"node{'s' if nodes > 1 else ''}, with {now.get('CPU', 0):g} CPUs): ask for less, or add nodes"
            )


def require_shared(paths: Mapping[str, str]) -> None:
    """ValueError for a local path that a node of the running cluster does not see as this machine does.

    paths: what each is called in the message (`--out`), with the path or the sqlite URI; what is remote passes. A
    folder that is not there yet is made.
    """
    local = {name: path for name, path in paths.items() if _is_local(path)}
    nodes = alive_nodes()
    if len(nodes) < 2 or not local:
        return
    for name, path in local.items():
        if path.startswith("sqlite:"):
            raise ValueError(
                f"{name} {path}: {len(nodes)} nodes cannot share a sqlite file: start `mlflow server` and give its "
                "http:// address (MLFLOW_TRACKING_URI)"
            )
    places = {name: storage.absolute(path) for name, path in local.items()}
    for place in places.values():
        if not os.path.exists(place):  # noqa: PTH110
            os.makedirs(place)  # noqa: PTH103
    here = _stamps(list(places.values()))
    for node, there in on_every_node(_stamps, list(places.values())).items():
        for name, place in places.items():
            if there[place] != here[place]:
                raise ValueError(
                    f"{name} {place}: node {node} does not see this folder, and the cluster has {len(nodes)} nodes: "
                    "use s3://, a models:/ name, or a file system that all of them share"
                )


def _is_local(path: str) -> bool:
    return path.startswith("sqlite:") or not (
        path.startswith(("models:/", "http://", "https://")) or storage.is_remote(path)
    )


def _stamps(places: list[str]) -> dict[str, tuple[int, int] | None]:
    """By what files and folders are known again; None for what is not there."""
    found: dict[str, tuple[int, int] | None] = {}
    for place in places:
        try:
            stat = os.stat(place)  # noqa: PTH116
            found[place] = stat.st_size, stat.st_mtime_ns
        except OSError:
            found[place] = None
    return found


def on_every_node(function: Callable[..., Any], *arguments: object) -> dict[str, Any]:
    """What a function returns on each node, by the node's address; nodes that die meanwhile are left out.

    On a cluster of one node it is called here. Elsewhere it needs what it imports to be there.
    """
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = alive_nodes()
    if len(nodes) == 1:
        return {nodes[0]["NodeManagerAddress"]: function(*arguments)}
    asked = {
        f"{node['NodeManagerAddress']} ({node['NodeID'][:8]})": ray.remote(function)
        .options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False))
        .remote(*arguments)
        for node in nodes
    }
    answers = {}
    for address, answer in asked.items():
        try:
            answers[address] = ray.get(answer)
        except RayError:
            continue
    return answers
