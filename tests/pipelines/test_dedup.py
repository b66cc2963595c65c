"""Filters in a run: rejections are failures of stage `filter`; of repeated clips the first in the manifest stays."""

import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hbi.model.frames import FrameSettings
from hbi.pipelines.decoding.decoder import Decoder
from hbi.pipelines.sharding import run, shards
from hbi.pipelines.sharding.dedup import FIRST, delete_first_pass, find_duplicates, without_duplicates
from hbi.pipelines.sharding.filters import FilterSettings
from hbi.pipelines.sharding.plan import plan
from hbi.pipelines.sharding.settings import ShardSettings
from hbi.pipelines.sharding.shards import ShardError
from hbi.pipelines.sharding.tasks import on_tasks
from tests.pipelines.test_compare import fingerprints_of, write_first_pass
from tests.support.clips import video, write_manifest
from tests.support.s3 import object_storage
from tests.support.sharding import everything, lines, samples, write_index

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")


@pytest.fixture(scope="module")
def decoder() -> Iterator[Decoder]:
    with Decoder(FrameSettings(num_frames=3, size=32), quality=95) as running:
        yield running


def make(
    manifest: str, out: str, settings: ShardSettings, decoder: Decoder, shard_plans: slice = slice(None)
) -> None:
    """Both passes without Ray, one shard after the other; the first in the order that `shard_plans` gives."""
    planned = plan(manifest, out, settings.identity(), settings.samples_per_shard)
    for shard_plan in planned.shards[shard_plans]:
        shards.make_shard(out, shard_plan, settings, decoder, f"{out}/{FIRST}")
    duplicates = find_duplicates(out, planned, settings.filters)
    for shard_plan in planned.shards:
        without_duplicates(out, shard_plan, duplicates)
    delete_first_pass(out, planned)
    write_index(out, planned)


def corpus(folder: Path) -> str:
    """Twelve rows, of which five repeat earlier ones, across splits and shards."""
    folder.mkdir()
    for seed in range(6):
        (folder / f"{seed}.mp4").write_bytes(video(seed))
    (folder / "copy of 1.mp4").write_bytes(video(1))
    (folder / "broken.mp4").write_bytes(b"\0" * 1000)
    names = ["0", "1", "broken", "2", "copy of 1", "3", "broken", "0", "4", "2", "5", "0"]
    rows = [
        {
            "video": f"{name}.mp4",
            "id": f"row {i}",
            "split": "test" if i % 3 == 1 else "train",
            "captions": ["a noise"],
        }
        for i, name in enumerate(names)
    ]
    rows.append({"video": "0.mp4", "id": "another cut", "start": 0.5, "end": 1.0, "captions": ["a noise"]})
    return write_manifest(folder / "manifest.jsonl", rows)


def test_the_first_in_the_manifest_stays(tmp_path: Path, decoder: Decoder):
    settings = ShardSettings(frames=3, size=32, samples_per_shard=3, filters=FilterSettings(same=True))
    make(corpus(tmp_path / "in"), str(tmp_path / "out"), settings, decoder)
    kept = {sample.id for sample in samples(tmp_path / "out")}
    assert kept == {"row 0", "row 1", "row 3", "row 5", "row 8", "row 10", "another cut"}
    reasons = {row["id"]: (row["stage"], row["reason"]) for row in lines(tmp_path / "out")}
    assert {name: reasons[name] for name in ("row 4", "row 7", "row 9", "row 11")} == {
        "row 4": ("filter", "the same bytes and times as row 2"),
        "row 7": ("filter", "the same bytes and times as row 1"),
        "row 9": ("filter", "the same bytes and times as row 4"),
        "row 11": ("filter", "the same bytes and times as row 1"),
    }
    assert reasons["row 2"][0] == reasons["row 6"][0] == "decode"
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert index["samples"] + index["failures"] == index["manifest"]["rows"] == 13
    assert index["settings"]["filters"] == {"same": True}
    assert list((tmp_path / "out" / FIRST).glob("*.tar")) == []


def test_what_is_kept_has_the_bytes_of_a_run_without_comparison(tmp_path: Path, decoder: Decoder):
    """Where nothing repeats, the second pass copies bit for bit."""
    (tmp_path / "in").mkdir()
    rows = [{"video": f"{seed}.mp4"} for seed in range(5)]
    for seed in range(5):
        (tmp_path / "in" / f"{seed}.mp4").write_bytes(video(seed))
    manifest = write_manifest(tmp_path / "in" / "m.jsonl", rows)
    make(
        manifest,
        str(tmp_path / "out"),
        ShardSettings(frames=3, size=32, samples_per_shard=3, filters=FilterSettings(same=True)),
        decoder,
    )
    plain = ShardSettings(frames=3, size=32, samples_per_shard=3)
    for shard_plan in plan(manifest, str(tmp_path / "plain"), plain.identity(), 3).shards:
        shards.make_shard(str(tmp_path / "plain"), shard_plan, plain, decoder)
    for tar in (tmp_path / "plain").glob("*.tar"):
        assert (tmp_path / "out" / tar.name).read_bytes() == tar.read_bytes()


def test_near_repeats(tmp_path: Path, decoder: Decoder):
    """A re-encoded copy has other bytes and nearly the same pictures."""
    import av

    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.mp4").write_bytes(video(0))
    (tmp_path / "in" / "c.mp4").write_bytes(video(1))
    with av.open(io.BytesIO(video(0))) as source, av.open(str(tmp_path / "in" / "b.mp4"), "w") as target:
        stream = target.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 96
        stream.pix_fmt = "yuv420p"
        for frame in source.decode(video=0):
            small = Image.fromarray(frame.to_ndarray(format="rgb24"))
            target.mux(stream.encode(av.VideoFrame.from_image(small)))
        target.mux(stream.encode())
    manifest = write_manifest(tmp_path / "in" / "m.jsonl", [{"video": f"{name}.mp4"} for name in "abc"])
    settings = ShardSettings(
        frames=3, size=32, samples_per_shard=2, filters=FilterSettings(same=True, near=8)
    )
    make(manifest, str(tmp_path / "out"), settings, decoder)
    assert [sample.id for sample in samples(tmp_path / "out")] == ["a", "c"]
    (failure,) = lines(tmp_path / "out")
    assert (failure["id"], failure["reason"]) == ("b", "nearly the same pictures as row 1")


def test_a_rejected_clip_does_not_count_as_the_first(tmp_path: Path, decoder: Decoder):
    (tmp_path / "a.mp4").write_bytes(video(0))
    rows = [
        {"video": "a.mp4", "id": "bare"},
        {"video": "a.mp4", "id": "told", "captions": ["two words"]},
        {"video": "a.mp4", "id": "again", "captions": ["two words"]},
    ]
    settings = ShardSettings(
        frames=3, size=32, samples_per_shard=2, filters=FilterSettings(same=True, min_words=1)
    )
    make(write_manifest(tmp_path / "m.jsonl", rows), str(tmp_path / "out"), settings, decoder)
    assert [sample.id for sample in samples(tmp_path / "out")] == ["told"]
    assert [(row["id"], row["stage"]) for row in lines(tmp_path / "out")] == [
        ("bare", "filter"),
        ("again", "filter"),
    ]


def test_ray_makes_the_same_and_goes_on_where_it_was_cut(
    ray_session: None, tmp_path: Path, decoder: Decoder, monkeypatch: pytest.MonkeyPatch
):
    manifest = corpus(tmp_path / "in")
    settings = ShardSettings(frames=3, size=32, samples_per_shard=2, filters=FilterSettings(same=True))
    make(manifest, str(tmp_path / "reference"), settings, decoder, slice(None, None, -1))

    def same() -> bool:
        found, wanted = everything(tmp_path / "out"), everything(tmp_path / "reference")
        found.pop(".plan/lock")
        return found == wanted

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run, "drop_duplicates", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        run.shard(manifest, str(tmp_path / "out"), settings)
    assert not list((tmp_path / "out").glob("*.tar"))
    run.shard(manifest, str(tmp_path / "out"), settings)
    assert same()
    (tmp_path / "out" / "train-000001.tar").unlink()
    (tmp_path / "out" / ".done" / "test-000000.tar.json").unlink()
    run.shard(manifest, str(tmp_path / "out"), settings)
    assert same()
    (tmp_path / "out" / FIRST / "train-000000.tar").write_bytes(b"a run was killed as it deleted these")
    run.shard(manifest, str(tmp_path / "out"), settings)
    assert same()
    with pytest.raises(ValueError, match="same was True and is None"):
        run.shard(manifest, str(tmp_path / "out"), ShardSettings(frames=3, size=32, samples_per_shard=2))


def test_in_storage_the_same_is_found_and_the_first_pass_leaves_its_records(tmp_path: Path, decoder: Decoder):
    settings = ShardSettings(
        frames=3, size=32, samples_per_shard=3, filters=FilterSettings(same=True, near=2)
    )
    manifest = corpus(tmp_path / "in")
    make(manifest, str(tmp_path / "out"), settings, decoder)
    with object_storage(tmp_path / "s3") as remote, pytest.MonkeyPatch.context() as patch:
        remote.use(patch)
        make(manifest, remote.uri("out"), settings, decoder)
        assert everything(remote.path("out")) == everything(tmp_path / "out")


def test_parts_are_compared_by_tasks(ray_session: None, tmp_path: Path):
    rng = np.random.default_rng(0)
    drawn = [
        (int(rng.integers(6)), set(rng.integers(0, 192, 6).tolist()), int(rng.integers(60)))
        for _ in range(120)
    ]
    found, filters = fingerprints_of(drawn), FilterSettings(same=True, near=3)
    planned = write_first_pass(tmp_path, found, 10)
    rows = list(range(planned.rows))
    here = find_duplicates(str(tmp_path), planned, filters, spread=False, part_rows=50).reasons(rows)
    comparison = find_duplicates(str(tmp_path), planned, filters, part_rows=50)
    assert comparison.parts == 5 and comparison.reasons(rows) == here
    assert len({text.split(" as ")[0] for text in here.values()}) == 2


def test_what_a_task_raises_is_raised_as_it_is(ray_session: None):
    def tenth(number: int) -> int:
        if number == 30:
            raise ShardError("no space left")
        return number * 10

    assert list(on_tasks(tenth, range(20), spread=True)) == [10 * number for number in range(20)]
    with pytest.raises(ShardError, match=r"^no space left$"):
        list(on_tasks(tenth, range(40), spread=True))
