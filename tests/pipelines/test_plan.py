"""The plan: every row in one shard, the manifest streamed, and no folder shared by two different runs."""

import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from hbi.infra import storage
from hbi.pipelines.manifest import Row
from hbi.pipelines.sharding import plan as planning
from hbi.pipelines.sharding.plan import plan, read_rows
from tests.support.clips import write_manifest

SETTINGS = {"frames": 12}


def rows_of(out: Path, planned: planning.Plan) -> dict[str, list[tuple[str, Row]]]:
    return {shard_plan.name: read_rows(str(out), shard_plan) for shard_plan in planned.shards}


def test_rows_are_dealt_to_their_splits_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(planning, "PART_BYTES", 500)  # several parts
    rows = [{"video": f"{i}.mp4", "split": "test" if i % 3 == 2 else "train"} for i in range(20)]
    manifest = write_manifest(tmp_path / "m.jsonl", rows)
    planned = plan(manifest, str(tmp_path / "out"), SETTINGS, 4)
    shard_plans = rows_of(tmp_path / "out", planned)
    assert {name: [key for key, _ in shard_plan] for name, shard_plan in shard_plans.items()} == {
        "train-000000.tar": ["000000000", "000000001", "000000003", "000000004"],
        "train-000001.tar": ["000000006", "000000007", "000000009", "000000010"],
        "train-000002.tar": ["000000012", "000000013", "000000015", "000000016"],
        "train-000003.tar": ["000000018", "000000019"],
        "test-000000.tar": ["000000002", "000000005", "000000008", "000000011"],
        "test-000001.tar": ["000000014", "000000017"],
    }
    assert planned.rows == 20 and sum(shard_plan.rows for shard_plan in planned.shards) == 20
    assert len({shard_plan.part for shard_plan in planned.shards}) > 1
    assert all(
        row.video == str(tmp_path / f"{int(key)}.mp4")
        for shard_plan in shard_plans.values()
        for key, row in shard_plan
    )
    assert plan(manifest, str(tmp_path / "out"), SETTINGS, 4) == planned  # read back


def test_any_text_survives(tmp_path: Path):
    odd = [
        "n\udcffot utf-8.mp4",
        "tab\tnew\nline",
        "😀 e\u0301",
        "lone \ud800",
        '"quotes" \\ %00',
        " . ",
        "-",
    ]
    rows = [{"video": f"/{name}", "id": name, "captions": [name], "what": {"k": name}} for name in odd]
    planned = plan(write_manifest(tmp_path / "m.jsonl", rows), str(tmp_path / "out"), SETTINGS, 100)
    found = [row for _, row in read_rows(str(tmp_path / "out"), planned.shards[0])]
    assert [row.id for row in found] == odd
    assert [row.video for row in found] == [f"/{name}" for name in odd]
    assert [row.captions for row in found] == [[name] for name in odd]
    assert [row.extra["what"] for row in found] == [{"k": name} for name in odd]


def test_the_manifest_is_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(planning, "PART_BYTES", 100_000)
    sample = Row.parse({"video": "/a.mp4", "captions": ["a caption of some length " * 4]})

    def peak(count: int) -> int:
        def rows(_: str) -> Iterator[Row]:
            yield from (sample for _ in range(count))

        monkeypatch.setattr(planning, "read_manifest", rows)
        tracemalloc.start()
        plan(__file__, str(tmp_path / str(count)), SETTINGS, 100)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    peak(500)  # what is imported on the way
    # 19,000 more rows of 250 bytes are 4.7 MB; what stays of them is 190 plans.
    assert peak(20_000) - peak(1_000) < 300_000


def test_another_run_is_refused_and_told_why(tmp_path: Path):
    manifest = write_manifest(tmp_path / "m.jsonl", [{"video": "a.mp4"}])
    out = str(tmp_path / "out")
    plan(manifest, out, SETTINGS, 4)
    with pytest.raises(
        ValueError, match=r"out holds shards of another run: frames was 12 and is 8\. Run with"
    ):
        plan(manifest, out, {"frames": 8}, 4)
    write_manifest(tmp_path / "m.jsonl", [{"video": "b.mp4"}])
    with pytest.raises(ValueError, match="another manifest"):
        plan(manifest, out, SETTINGS, 4)


def test_shards_of_another_version_are_not_mixed_with_ours(tmp_path: Path):
    manifest, out = write_manifest(tmp_path / "m.jsonl", [{"video": "a.mp4"}]), str(tmp_path / "out")
    plan(manifest, out, SETTINGS, 4)
    place = tmp_path / "out" / ".plan" / "plan.json"
    place.write_text(place.read_text().replace(f'"version": {planning.VERSION}', '"version": 1'))
    with pytest.raises(
        ValueError, match=r"out holds shards of another version .* choose another folder, or delete it"
    ):
        plan(manifest, out, SETTINGS, 4)


def test_a_plan_that_was_cut_short_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(planning, "PART_BYTES", 200)
    manifest = write_manifest(tmp_path / "m.jsonl", [{"video": f"{i}.mp4"} for i in range(30)])
    whole = plan(manifest, str(tmp_path / "whole"), SETTINGS, 4)
    with monkeypatch.context() as patch:
        put = storage.put_file
        left = [2]

        def fail(*args: str, **more: bool) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            put(*args, **more)

        patch.setattr(storage, "put_file", fail)
        with pytest.raises(KeyboardInterrupt):
            plan(manifest, str(tmp_path / "out"), SETTINGS, 4)
    assert plan(manifest, str(tmp_path / "out"), SETTINGS, 4) == whole
    assert rows_of(tmp_path / "out", whole) == rows_of(tmp_path / "whole", whole)


@pytest.mark.parametrize("split", ["a/b", "", "x" * 300, "new\nline", "\udcff"])
def test_a_split_that_cannot_name_a_file_is_a_fault_of_its_row(tmp_path: Path, split: str):
    manifest = write_manifest(tmp_path / "m.jsonl", [{"video": "a.mp4"}, {"video": "b.mp4", "split": split}])
    planned = plan(manifest, str(tmp_path / "out"), SETTINGS, 4)
    ((_, good), (_, bad)) = read_rows(str(tmp_path / "out"), planned.shards[0])
    assert not good.fault and bad.fault.startswith("line 2: `split` is ") and bad.split == "train"


def test_nothing_to_do_is_an_error(tmp_path: Path):
    with pytest.raises(ValueError, match="no rows"):
        plan(write_manifest(tmp_path / "m.jsonl", []), str(tmp_path / "out"), SETTINGS, 4)
    with pytest.raises(ValueError, match=r"none\.jsonl: no such manifest"):
        plan(str(tmp_path / "none.jsonl"), str(tmp_path / "out"), SETTINGS, 4)
    with pytest.raises(ValueError, match="is a folder"):
        plan(str(tmp_path), str(tmp_path / "out"), SETTINGS, 4)
