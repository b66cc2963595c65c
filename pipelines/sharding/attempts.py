"""A shard that ends its worker is given up after three attempts of its own: its rows are failures, the run goes on.

The attempts are counted where the records are: until a shard is finished, its record's place names the nodes on which
it was begun. An attempt whose node is gone says nothing about the shard, nor does one of another job.
"""

import json
from contextlib import suppress

from hbi.infra import storage
from hbi.infra.nodes import alive_nodes
from hbi.pipelines.sample import ShardInfo
from hbi.pipelines.sharding.plan import ShardPlan, read_rows
from hbi.pipelines.sharding.records import Failure, ShardManifest, record_path

ATTEMPTS = 3
"""How often a shard may end its worker."""
REASON = f"its shard ended {ATTEMPTS} workers in a row: memory, or a crash outside the decoder"


def begin(folder: str, name: str) -> bool:
    """Notes an attempt at a shard by this worker; False where too many have failed. Raises what storage raises."""
    import ray

    context = ray.get_runtime_context()
    job, place = context.get_job_id(), record_path(folder, name)
    nodes = _begun(place, job)
    if len(nodes) >= ATTEMPTS:
        alive = {node["NodeID"] for node in alive_nodes()}
        nodes = [node for node in nodes if node in alive]
        if len(nodes) >= ATTEMPTS:
            return False
    content = {"job": job, "begun": [*nodes, context.get_node_id()]}
    # A power cut takes the node along, and with it what this says of the shard: no waiting for the disk.
    storage.write_bytes(place, json.dumps(content).encode(), durable=False)
    return True


def _begun(place: str, job: str) -> list[str]:
    """The nodes on which this job began the shard and did not finish it."""
    with suppress(FileNotFoundError, ValueError, KeyError, TypeError):
        found = json.loads(storage.read_bytes(place))
        return list(found["begun"]) if found["job"] == job else []
    return []


def give_up(out: str, folder: str, shard_plan: ShardPlan) -> ShardManifest:
    """Records the rows of a shard as failures of stage `decode`. out: where the plan lies; folder: the records."""
    failures = [Failure(key, row.id, row.video, "decode", REASON) for key, row in read_rows(out, shard_plan)]
    shard = ShardInfo(shard_plan.name, shard_plan.split, 0, 0, "")
    record = ShardManifest(shard, shard_plan.rows, failures, [])
    storage.write_bytes(record_path(folder, shard_plan.name), record.json())
    return record
