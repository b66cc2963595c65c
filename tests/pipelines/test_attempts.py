"""A shard that ends its worker is given up after three attempts of its own, whatever nodes were lost meanwhile."""

import json
import os
import signal
from pathlib import Path

import pytest

from hbi.pipelines.sharding import attempts, shards
from hbi.pipelines.sharding.plan import ShardPlan, plan
from hbi.pipelines.sharding.records import ShardManifest, read_records, record_path
from hbi.pipelines.sharding.settings import ShardSettings
from hbi.pipelines.sharding.workers import ShardMaker, _spread
from tests.support.clips import write_clips
from tests.support.sharding import SETTINGS

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")


class Deadly(ShardMaker):
    """A worker that one shard ends, as a decoder's bug or the kernel's memory killer would."""

    def make(self, shard_plan: ShardPlan) -> ShardManifest:
        def end(*_: object) -> ShardManifest:
            with Path(self.folder, "deaths").open("a") as deaths:
                deaths.write(f"{os.getpid()}\n")
            os.kill(os.getpid(), signal.SIGKILL)
            raise AssertionError("unreachable")

        real = shards.make_shard
        shards.make_shard = end if shard_plan.name == "test-000000.tar" else real
        try:
            return super().make(shard_plan)
        finally:
            shards.make_shard = real


def test_a_shard_that_ends_its_workers_is_given_up_and_the_others_are_made(ray_session: None, tmp_path: Path):
    manifest, out = write_clips(tmp_path / "in", 24), str(tmp_path / "out")
    planned = plan(manifest, out, SETTINGS.identity(), SETTINGS.samples_per_shard)
    told: list[object] = []
    done = list(_spread(Deadly, (out, SETTINGS, out, told.append), planned.shards))
    assert sum(result.rows for result in done) == 24
    assert {result.name for result in done if result.failures} == {"test-000000.tar"}
    assert len((tmp_path / "out" / "deaths").read_text().split()) == attempts.ATTEMPTS
    records = dict(read_records(out, [shard.name for shard in planned.shards]))
    given_up = records.pop("test-000000.tar")
    assert given_up is not None and given_up.shard.samples == 0
    assert [(f.stage, f.reason) for f in given_up.failures] == [("decode", attempts.REASON)] * given_up.rows
    assert [f.id for f in given_up.failures][:2] == ["clip 3", "clip 7"]
    assert all(record is not None and not record.failures for record in records.values())


@pytest.fixture
def begun(ray_session: None, tmp_path: Path):
    """Writes who began a shard before, and says where that stands."""
    import ray

    context = ray.get_runtime_context()
    (tmp_path / ".done").mkdir()

    def write(nodes: list[str], job: str | None = None) -> Path:
        place = Path(record_path(str(tmp_path), "a.tar"))
        here = [context.get_node_id() if node == "here" else node for node in nodes]
        place.write_text(json.dumps({"job": job or context.get_job_id(), "begun": here}))
        return place

    return write


def test_attempts_on_nodes_that_are_gone_do_not_count(begun, tmp_path: Path):
    place = begun(["here", "gone", "here", "gone", "gone"])
    assert attempts.begin(str(tmp_path), "a.tar")
    assert len(json.loads(place.read_text())["begun"]) == 3
    assert not attempts.begin(str(tmp_path), "a.tar")


def test_attempts_of_another_job_do_not_count(begun, tmp_path: Path):
    place = begun(["here"] * 5, "another")
    assert attempts.begin(str(tmp_path), "a.tar")
    assert len(json.loads(place.read_text())["begun"]) == 1


def test_what_was_begun_is_no_record(begun, tmp_path: Path):
    begun(["here"])
    assert list(read_records(str(tmp_path), ["a.tar"])) == [("a.tar", None)]
    assert ShardSettings().samples_per_shard == 100
