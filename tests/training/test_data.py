"""Each sample once an epoch, whatever the workers; damage is counted; batches do not depend on who makes them."""

import os
from collections import Counter
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from hbi.infra import storage
from hbi.pipelines.sample import ShardIndex, check_shards
from hbi.training.data.batch import ClipDataset
from hbi.training.data.loader import Loader
from hbi.training.data.order import LoaderState, caption_number, epoch_order, part_of, shares
from hbi.training.data.shards import ShardCache, captions_of, index_digest, scan
from hbi.training.parallel import Process
from tests.support.training_shards import FRAMES, SIZE, make_shards, sample, tiny_model, tiny_run, write_shard


def place(rank: int = 0, world: int = 1) -> Process:
    return Process(rank, world, torch.device("cpu"))


def ids_of(order: np.ndarray) -> list[tuple[int, int]]:
    return [(int(shard), int(number)) for shard, number in order]


def partition(order: np.ndarray, world: int, batch: int) -> list[list[np.ndarray]]:
    """[rank][step] of an epoch."""
    return [part_of(order, shares(len(order), world, batch), rank) for rank in range(world)]


def everything(samples: list[int]) -> Counter:
    return Counter((shard, number) for shard, count in enumerate(samples) for number in range(count))


@given(
    samples=st.lists(st.integers(0, 9), max_size=7),
    seed=st.integers(0, 9),
    window=st.integers(1, 4),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_each_sample_is_dealt_once_however_often_the_workers_change(samples, seed, window, data) -> None:
    order = epoch_order(samples, seed, 3, window)
    assert Counter(ids_of(order)) == everything(samples)
    position, seen = LoaderState(3), Counter()
    for _ in range(3):
        world, batch = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 8))
        left = [position.remaining(order, rank, world, batch) for rank in range(world)]
        lengths = {len(rank) for rank in left}
        assert len(left) == world and len(lengths) == 1, "ranks must take the same number of steps"
        for step in range(data.draw(st.integers(0, lengths.pop()))):
            for rank in left:
                assert len(rank[step]) <= -(-batch // world) + 1
                seen.update(ids_of(rank[step]))
            position = position.advanced(world, batch)
    seen.update(i for batch_ids in position.remaining(order, 0, 1, 4) for i in ids_of(batch_ids))
    assert seen == everything(samples)


def test_the_same_workers_go_on_with_the_very_same_batches() -> None:
    order = epoch_order([7, 5, 9], 0, 0, 2)
    unbroken = partition(order, 3, 4)
    position = LoaderState()
    for step in range(3):
        for rank in range(3):
            left = position.remaining(order, rank, 3, 4)
            assert [ids.tolist() for ids in left] == [ids.tolist() for ids in unbroken[rank][step:]]
        position = position.advanced(3, 4)


def test_a_rank_touches_its_own_shards_and_one_at_each_border() -> None:
    order = epoch_order([10] * 16, 1, 0, shuffle_window=1)
    touched = [{shard for shard, _ in ids_of(part)} for part in np.array_split(order, 4)]
    assert all(len(shards) <= 5 for shards in touched)


def test_the_order_changes_with_the_epoch_and_with_the_seed() -> None:
    orders = [
        epoch_order([8, 8, 8], seed, epoch, 3).tolist() for seed, epoch in ((0, 0), (0, 1), (1, 0), (0, 0))
    ]
    assert orders[0] == orders[3] and orders[0] != orders[1] and orders[0] != orders[2]


def test_a_window_mixes_its_shards_and_no_others() -> None:
    shards = epoch_order([20] * 6, 0, 0, shuffle_window=2)[:, 0].reshape(3, 40)
    assert all(len(set(window.tolist())) == 2 and len(set(window[:10].tolist())) == 2 for window in shards)


def test_a_clip_shows_each_of_its_captions_once_before_any_again() -> None:
    chosen = [caption_number(4, 7, epoch, "000000012") for epoch in range(12)]
    assert [sorted(chosen[i : i + 4]) for i in (0, 4, 8)] == [[0, 1, 2, 3]] * 3
    assert chosen != [caption_number(4, 7, epoch, "000000013") for epoch in range(12)]


# --- batches ----------------------------------------------------------------------------------------------------


def batches(
    index: ShardIndex, position: LoaderState | None = None, rank: int = 0, world: int = 1, **data
) -> list:
    loader = Loader(index, tiny_run(**data), place(rank, world))
    made = list(loader.batches(position or LoaderState()))
    loader.close()
    return made


def test_loader_workers_change_nothing(tmp_path: Path) -> None:
    index = make_shards(tmp_path, train=[5, 7, 4])
    alone = batches(index, batch=6)
    assert sum(len(batch.captions) for batch in alone) == 16
    loader = Loader(index, tiny_run(batch=6, workers=2), place())
    for epoch in range(2):  # the workers live on into the second epoch
        expected = alone if epoch == 0 else batches(index, LoaderState(1), batch=6)
        for mine, theirs in zip(expected, loader.batches(LoaderState(epoch)), strict=True):
            assert mine.captions == theirs.captions and mine.shards == theirs.shards
            assert torch.equal(mine.video, theirs.video) and torch.equal(mine.video_mask, theirs.video_mask)
    loader.close()


def test_frames_are_those_of_the_jpegs_and_short_clips_are_padded(tmp_path: Path) -> None:
    index = make_shards(tmp_path, train=[1])
    made = sample(0, frames=3)
    write_shard(tmp_path / "train-000000.tar", [made])
    (batch,) = batches(index)
    assert batch.video.shape == (1, FRAMES, SIZE, SIZE, 3) and batch.video.dtype == torch.uint8
    assert torch.equal(batch.video[0, :3], torch.from_numpy(made.images().copy()))
    assert batch.video_mask.tolist() == [[True, True, True, False]]
    assert batch.captions[0] in made.captions


def test_frames_that_are_kept_are_decoded_once_and_the_same(tmp_path: Path, monkeypatch) -> None:
    index = make_shards(tmp_path / "shards", train=[3, 3])
    size = FRAMES * SIZE * SIZE * 3
    decoded = []
    usual = ClipDataset._decoded
    monkeypatch.setattr(ClipDataset, "_decoded", lambda self, jpegs: decoded.append(1) or usual(self, jpegs))
    batches = {}
    for keep in (0, 4 * size // 10**6 + 1):
        loader = Loader(index, tiny_run(batch=2, keep_mb=keep), place())
        if keep:
            loader.clips.room = 4 * size  # of six clips, four
        batches[keep] = [list(loader.batches(LoaderState(epoch))) for epoch in range(2)]
        loader.close()
    assert len(decoded) == 12 + 6 + 2
    plain, kept = batches.values()
    for one, other in zip(chain(*plain), chain(*kept), strict=True):
        assert torch.equal(one.video, other.video) and one.captions == other.captions and one.ids == other.ids


def test_a_split_of_one_sample_serves_two_ranks(tmp_path: Path) -> None:
    index = make_shards(tmp_path, train=[1])
    one, none = batches(index, rank=0, world=2), batches(index, rank=1, world=2)
    assert [len(batch.captions) for batch in one] == [1]
    assert [batch.video.shape for batch in none] == [(0, FRAMES, SIZE, SIZE, 3)]


def test_captions_of_a_clip_as_a_paragraph(tmp_path: Path) -> None:
    index = make_shards(tmp_path, train=[1])
    (batch,) = batches(index, paragraph=True)
    assert batch.captions == [" ".join(sample(0).captions)]


def test_clips_without_a_caption_are_left_out_and_counted(tmp_path: Path) -> None:
    index = make_shards(tmp_path, train=[3])
    write_shard(
        tmp_path / "train-000000.tar", [sample(0), sample(1, captions=[]), sample(2, captions=["", " "])]
    )
    (batch,) = batches(index)
    assert len(batch.captions) == len(batch.video) == 1
    assert batch.uncaptioned == 2 and not batch.bad


def test_shards_written_by_webdataset_are_read(tmp_path: Path) -> None:
    index = make_shards(tmp_path, train=[3])
    ours = batches(index)
    with webdataset.TarWriter(str(tmp_path / "train-000000.tar")) as writer:
        for number in range(3):
            made = sample(number)
            frames = {f"{i:02d}.jpg": jpeg for i, jpeg in enumerate(made.frames)}
            writer.write({"__key__": f"folder.x/{made.key}", **frames, "json": {"captions": made.captions}})
    theirs = batches(index)
    assert torch.equal(ours[0].video, theirs[0].video)


# --- damage -----------------------------------------------------------------------------------------------------


def test_a_truncated_shard_gives_what_is_whole_and_counts_the_rest(tmp_path: Path) -> None:
    index = make_shards(tmp_path, train=[6, 6])
    path = tmp_path / "train-000001.tar"
    content = path.read_bytes()
    ends = [max(offset + length for offset, length in entry.members.values()) for entry in scan(str(path))]
    for cut in range(0, len(content), 1536):  # at members' borders and inside them
        path.write_bytes(content[:cut])
        whole = sum(end <= cut for end in ends)
        made = batches(index)
        bad = [shard for batch in made for shard, _ in batch.bad]
        assert sum(len(batch.captions) for batch in made) == 6 + whole, cut
        assert bad == ["train-000001.tar"] * (6 - whole)
    assert 0 < ends[0] < ends[-1]


def test_a_missing_shard_and_broken_samples_are_counted_with_their_reasons(tmp_path: Path) -> None:
    index = make_shards(tmp_path, train=[5, 2])
    (tmp_path / "train-000001.tar").unlink()
    broken = [
        replace(sample(0), frames=[b"no jpeg"] * FRAMES),
        replace(sample(1), frames=[sample(1).frames[0][:-40]] * FRAMES),
        sample(2, size=SIZE + 8),
        sample(3, frames=FRAMES + 1),
        sample(4),
    ]
    write_shard(tmp_path / "train-000000.tar", broken)
    made = batches(index)
    assert sum(len(batch.captions) for batch in made) == 1
    reasons = Counter(shard for batch in made for shard, _ in batch.bad)
    assert reasons == {"train-000000.tar": 4, "train-000001.tar": 2}
    said = " ".join(reason for batch in made for _, reason in batch.bad)
    assert f"{FRAMES + 1} frames" in said and f"{SIZE + 8}x{SIZE + 8}" in said and "FileNotFoundError" in said


def test_shards_of_other_frames_are_refused_with_the_mend(tmp_path: Path) -> None:
    index = make_shards(tmp_path, train=[1])
    check_shards(index, tiny_model())
    with pytest.raises(
        ValueError, match=r"frames 4, but the model takes 6: .*hbi shard --frames 6 --size 16`$"
    ):
        check_shards(index, tiny_model(frames=6))
    towers = replace(tiny_model().towers, image_size=32)
    with pytest.raises(
        ValueError, match=r"size 16, but the model takes 32: .*, or set --model.towers.image-size 16$"
    ):
        check_shards(index, tiny_model(towers=towers), "--model.")


def test_captions_of_all_readable_shards(tmp_path: Path) -> None:
    index = make_shards(tmp_path, train=[2, 3], val=[4])
    os.truncate(tmp_path / "train-000000.tar", 100)
    assert list(captions_of(index, "train")) == [c for number in (2, 3, 4) for c in sample(number).captions]
    assert len(list(captions_of(index, "val", limit=3))) == 8, (
        "the limit ends it after the shard that passes it"
    )


def test_the_digest_tells_other_data(tmp_path: Path) -> None:
    index = make_shards(tmp_path / "one", train=[2, 3])
    assert index_digest(index) == index_digest(make_shards(tmp_path / "two", train=[2, 3]))
    assert index_digest(index) != index_digest(make_shards(tmp_path / "three", train=[3, 2]))


# --- remote shards ----------------------------------------------------------------------------------------------


def test_remote_shards_are_fetched_once_and_the_oldest_dropped(tmp_path: Path, monkeypatch) -> None:
    fetches: Counter = Counter()

    def local_copy(uri: str, folder: str) -> str:
        fetches[uri] += 1
        path = Path(folder) / f"part-{sum(fetches.values())}"
        path.write_text(uri)
        return str(path)

    monkeypatch.setattr(storage, "local_copy", local_copy)
    cache = ShardCache(str(tmp_path / "cache"), keep=3)
    for number in (0, 0, 1, 2, 0, 3, 4):
        path = Path(cache.path(f"s3://bucket/{number}.tar"))
        assert path.read_text() == f"s3://bucket/{number}.tar"
        os.utime(path, (number, number))  # so that ages do not depend on the clock
    assert fetches == Counter({f"s3://bucket/{number}.tar": 1 for number in range(5)})
    assert sorted(p.read_text()[-5] for p in (tmp_path / "cache").glob("*.tar")) == ["2", "3", "4"]
    cache.path("s3://bucket/0.tar")
    assert fetches["s3://bucket/0.tar"] == 2


def test_shards_to_come_are_asked_for_before_they_are_needed(tmp_path: Path) -> None:
    index = make_shards(tmp_path, train=[20, 20, 20])
    loader = Loader(index, tiny_run(batch=2, shuffle_window=1), place())
    plan = loader._soon(partition(epoch_order([20, 20, 20], 0, 0, 1), 1, 2)[0])
    asked = {shard: step for step, shards in enumerate(plan) for shard in shards}
    assert sorted(asked.values()) == [0, 0, 4], "sixteen batches of ten a shard ahead"


@given(n=st.integers(0, 400), world=st.integers(1, 9), batch=st.integers(1, 128))
@settings(max_examples=200, deadline=None)
def test_no_step_is_larger_than_the_batch_and_ranks_share_each_evenly(n: int, world: int, batch: int) -> None:
    order = np.stack([np.zeros(n, np.int32), np.arange(n, dtype=np.int32)], 1)
    parts = partition(order, world, batch)
    sizes = np.array([[len(ids) for ids in rank] for rank in parts])
    assert sizes.shape == (world, -(-n // batch))
    assert sizes.sum(0).max(initial=0) <= batch
    if n:
        assert np.ptp(sizes.sum(0)) <= 1 and np.ptp(sizes, axis=0).max() <= 1 and np.ptp(sizes.sum(1)) <= 1
        assert np.array_equal(np.concatenate([ids for rank in parts for ids in rank]), order)


def test_a_batch_that_the_ranks_do_not_divide_is_kept() -> None:
    order = np.stack([np.zeros(192, np.int32), np.arange(192, dtype=np.int32)], 1)
    parts = partition(order, 64, 96)
    assert [sum(len(rank[step]) for rank in parts) for step in range(2)] == [96, 96]
