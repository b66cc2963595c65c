"""Shards from and to object storage, whatever it does."""

import json
from pathlib import Path

import pytest

from hbi.infra import storage
from hbi.pipelines.decoding.decoder import Decoder
from hbi.pipelines.sharding.account import Accountant
from hbi.pipelines.sharding.plan import plan, slices
from hbi.pipelines.sharding.shards import ShardError
from tests.support.clips import video, write_clips, write_manifest
from tests.support.s3 import Fault, ObjectStorage, object_storage
from tests.support.sharding import SETTINGS, lines, make, samples


@pytest.fixture(scope="module")
def s3_server(s3_server: ObjectStorage) -> ObjectStorage:
    """With five videos."""
    for seed in range(5):
        s3_server.path(f"{seed}.mp4").write_bytes(video(seed))
    return s3_server


def rows(count: int) -> list[dict[str, str]]:
    return [{"video": f"{i % 5}.mp4", "id": f"clip {i}"} for i in range(count)]


def test_from_storage_to_storage_equals_local(
    tmp_path: Path, decoder: Decoder, remote: ObjectStorage, monkeypatch: pytest.MonkeyPatch
):
    """With something wrong at every turn: the bytes are those of a run without storage, but for the source."""
    storage.write_bytes(remote.uri("m.jsonl"), write_bytes_of(rows(10)))
    remote.hang_seconds = 1.2
    remote.faults[:] = [
        Fault("503", "m.jsonl"), Fault("cut", "0.mp4"), Fault("short", "1.mp4", times=2), Fault("drop", "2.mp4"),
        Fault("hang", "3.mp4"), Fault("500", "4.mp4"), Fault("503", "train-000000.tar", "PUT", 2),
        Fault("drop", "train-000001.tar", "PUT"), Fault("503", "index.json", "PUT"), Fault("503", "plan.json", "HEAD"),
        Fault("503", "0.mp4", "HEAD"),
    ]  # fmt: skip
    make(remote.uri("m.jsonl"), remote.uri("out"), decoder)
    assert all(fault.times == 0 for fault in remote.faults), remote.faults
    for seed in range(5):
        (tmp_path / f"{seed}.mp4").write_bytes(video(seed))
    make(write_manifest(tmp_path / "m.jsonl", rows(10)), str(tmp_path / "out"), decoder)
    there, here = samples(remote.path("out")), samples(tmp_path / "out")
    assert [sample.frames for sample in there] == [sample.frames for sample in here]
    assert [sample.source for sample in there] == [remote.uri(f"{i % 5}.mp4") for i in range(10)]
    remote.requests.clear()
    make(remote.uri("m.jsonl"), remote.uri("out"), decoder)
    assert not [path for method, path in remote.requests if method == "PUT" and ".tar" in path], "made again"


def write_bytes_of(rows: list[dict[str, str]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def test_a_key_that_stays_missing_is_a_failure(tmp_path: Path, decoder: Decoder, remote: ObjectStorage):
    manifest = write_manifest(
        tmp_path / "m.jsonl",
        [
            {"video": remote.uri("none.mp4")},
            {"video": remote.uri("1.mp4")},
            {"video": "s3://no-bucket/a.mp4"},
        ],
    )
    make(manifest, str(tmp_path / "out"), decoder)
    assert [(row["stage"], row["reason"]) for row in lines(tmp_path / "out")] == [
        ("read", "no such object")
    ] * 2
    assert len(samples(tmp_path / "out")) == 1


def test_what_an_outage_cost_is_made_up_for(tmp_path: Path, decoder: Decoder, remote: ObjectStorage):
    """A clip that the storage kept refusing is a failure, and the next run tries its shard again."""
    videos = [{"video": remote.uri(f"{i}.mp4")} for i in range(3)]
    manifest = write_manifest(tmp_path / "m.jsonl", videos)
    remote.faults[:] = [Fault("503", "1.mp4", times=1000)]
    make(manifest, str(tmp_path / "out"), decoder)
    (failure,) = lines(tmp_path / "out")
    assert failure["stage"] == "read" and "storage kept failing" in failure["reason"]
    assert len(samples(tmp_path / "out")) == 2
    remote.faults.clear()
    make(manifest, str(tmp_path / "out"), decoder)
    assert lines(tmp_path / "out") == [] and len(samples(tmp_path / "out")) == 3


def test_an_outage_of_everything_stops_the_run(tmp_path: Path, decoder: Decoder, remote: ObjectStorage):
    manifest = write_manifest(tmp_path / "m.jsonl", [{"video": remote.uri(f"{i}.mp4")} for i in range(3)])
    remote.faults[:] = [Fault("503", ".mp4", times=1000)]
    with pytest.raises(ShardError, match=r"storage kept failing.*Run again"):
        make(manifest, str(tmp_path / "out"), decoder)
    remote.faults.clear()
    make(manifest, str(tmp_path / "out"), decoder)
    assert len(samples(tmp_path / "out")) == 3


def test_a_remote_video_of_many_clips_is_fetched_once(
    tmp_path: Path, decoder: Decoder, remote: ObjectStorage
):
    cuts = [{"video": remote.uri("2.mp4"), "start": i / 10, "end": i / 10 + 0.5} for i in range(5)]
    make(write_manifest(tmp_path / "m.jsonl", cuts), str(tmp_path / "out"), decoder)
    assert len(samples(tmp_path / "out")) == 5
    assert sum(method == "GET" and "2.mp4" in path for method, path in remote.requests) == 1


def test_a_resume_asks_storage_once_for_each_shard(decoder: Decoder, tmp_path: Path):
    with object_storage(tmp_path / "s3") as remote, pytest.MonkeyPatch.context() as patch:
        remote.use(patch)
        manifest, out = write_clips(tmp_path / "in", 60), remote.uri("out")
        make(manifest, out, decoder)
        planned = plan(manifest, out, SETTINGS.identity(), SETTINGS.samples_per_shard)
        remote.requests.clear()
        of_plan = slices(planned.shards)
        accounts = [Accountant(out, parts=False).account(shards) for shards in of_plan]
        assert not any(found.missing for found in accounts)
        records = [path for _, path in remote.requests if "/.done/" in path]
        assert len(records) == len(planned.shards) == 11
        assert len(remote.requests) - len(records) == 2 * len(of_plan)  # lists of the tars and the records
