"""The index: what was written is read, the best is found, and the stages agree with the exhaustive comparison."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from hbi.model.similarity import weighted_similarity
from hbi.model.tokens import Tokens
from hbi.serving.index import table as table_module
from hbi.serving.index.rows import Clip, Encoded, IndexUnavailable, as_text, labelled, rows_of
from hbi.serving.index.snapshot import SegmentScan
from hbi.serving.index.stages import (
    SearchSettings,
    exhaustive,
    padded,
    search,
    segment_scores,
    segments_of,
)
from hbi.serving.index.table import ClipTable, IdInUse, IndexMetadata
from tests.support.s3 import object_storage

DIM = 16
METADATA = IndexMetadata("models:/hbi/1", "ab" * 32, "sqlite:///x.db", {"frames": 6, "size": 32}, DIM)


def unit(array: np.ndarray) -> np.ndarray:
    return array / np.linalg.norm(array, axis=-1, keepdims=True)


def encoded(seed: int, frames: int = 6) -> Encoded:
    """A clip whose neighbouring frames are alike, as those of videos are."""
    rng = np.random.default_rng(seed)
    drift = 0.3 * np.cumsum(rng.standard_normal((frames, DIM)), axis=0)
    tokens = unit(rng.standard_normal(DIM) + drift).astype(np.float16)
    logits = rng.standard_normal(frames).astype(np.float32)
    return Encoded(tokens, logits, *segments_of(tokens.astype(np.float32), logits), [b"jpeg", b"of it"])


def clip(id: str, frames: int = 6, **more: object) -> Clip:
    times = [0.5 * i for i in range(frames)]
    return Clip(id, f"{id}.mp4", 0.0, 3.0, times, **{"source": f"/videos/{id}.mp4", "part": "p"} | more)  # type: ignore[arg-type]


def filled(folder: Path, count: int) -> ClipTable:
    table = ClipTable.create(str(folder), METADATA)
    table.add(rows_of([clip(f"v{i}") for i in range(count)], [encoded(i) for i in range(count)]))
    return table


def query(seed: int = 900) -> Tokens:
    words = encoded(seed, frames=5)
    return Tokens(torch.from_numpy(words.tokens.astype(np.float32))[None], torch.from_numpy(words.logits)[None],
                  torch.ones(1, 5, dtype=torch.bool))  # fmt: skip


def ids(table: ClipTable, found: list[tuple[float, int]]) -> list[str]:
    return [clip.id for clip in table.snapshot().clips([row for _, row in found])]


def test_what_was_written_is_read_by_another_reader(tmp_path: Path) -> None:
    table = filled(tmp_path, 3)
    odd = clip(
        "w é/'\"\\", frames=2, captions=["<b>a cat</b>"], split="test", metadata={"license": "MIT", "n": 3}
    )
    table.add(rows_of([odd], [encoded(7, frames=2)]))
    other = ClipTable.open(str(tmp_path))
    assert other.metadata == METADATA
    snapshot = other.snapshot()
    assert snapshot.rows == 4
    assert snapshot.clip(odd.id) == odd
    assert snapshot.thumbnails(odd.id) == [b"jpeg", b"of it"]
    rows, tokens, logits = snapshot.tokens(np.array([snapshot.row("v1"), snapshot.row(odd.id)]))
    kept = {int(row): (t, w) for row, t, w in zip(rows, tokens, logits, strict=True)}
    for id, made in (("v1", encoded(1)), (odd.id, encoded(7, frames=2))):
        np.testing.assert_array_equal(kept[snapshot.row(id)][0], made.tokens)
        np.testing.assert_array_equal(kept[snapshot.row(id)][1], made.logits)


def test_segments_are_the_weighted_means_of_three_runs() -> None:
    made = encoded(3)
    tokens, weights = made.tokens.astype(np.float64), np.exp(made.logits) / np.exp(made.logits).sum()
    for i, run in enumerate(([0, 1], [2, 3], [4, 5])):
        mean = sum(weights[f] * tokens[f] for f in run)
        np.testing.assert_allclose(made.segments[i], unit(mean), atol=2e-3)
        assert made.segment_weights[i] == pytest.approx(weights[run].sum(), abs=1e-5)
    one = segments_of(tokens[:1], made.logits[:1])
    np.testing.assert_allclose(one[0], np.repeat(tokens[:1], 3, 0), atol=2e-3)
    assert one[1] == pytest.approx([1 / 3] * 3)


def test_segment_scores_are_the_similarity_with_segments_for_frames() -> None:
    made = [encoded(i) for i in range(5)]
    vectors, weights = np.stack([m.segments for m in made]), np.stack([m.segment_weights for m in made])
    scan = SegmentScan.empty(DIM, 8).plus(np.arange(5), vectors, weights)
    segments = Tokens(torch.from_numpy(vectors.astype(np.float32)), torch.from_numpy(weights).log(),
                      torch.ones(5, 3, dtype=torch.bool))  # fmt: skip
    expected = weighted_similarity(query(), segments)[0]
    words = query().tokens[0].numpy()
    scores = segment_scores(unit(words).astype(np.float32), query().weights()[0].numpy(), scan)
    np.testing.assert_allclose(scores, expected, atol=4e-3)
    gone = segment_scores(words, query().weights()[0].numpy(), scan.only(np.array([0, 1, 3, 4])))
    assert np.isneginf(gone[2]) and np.isfinite(np.delete(gone, 2)).all()


def test_search_ranks_by_the_exact_similarity(tmp_path: Path) -> None:
    table = filled(tmp_path, 60)
    made = [encoded(i) for i in range(60)]
    held = padded([m.tokens for m in made], [m.logits for m in made])
    expected = weighted_similarity(query(), held)[0]
    found = search(table.snapshot(), query(), 60)
    assert ids(table, found) == [f"v{i}" for i in expected.argsort(descending=True).tolist()]
    np.testing.assert_allclose(
        [score for score, _ in found], expected.sort(descending=True).values, atol=1e-5
    )
    assert found == exhaustive(table.snapshot(), query())
    few = SearchSettings(exact=12)
    assert [row for _, row in search(table.snapshot(), query(), 3, settings=few)] == [
        row for _, row in found[:3]
    ]


def test_an_ann_index_is_built_above_a_size_and_finds_what_scanning_finds(
    tmp_path: Path, monkeypatch
) -> None:
    table = filled(tmp_path, 600)
    scanned = [search(table.snapshot(), query(900 + i), 10) for i in range(8)]
    monkeypatch.setattr(table_module, "SCANNED_BYTES", 600 * 3 * DIM * 2)
    table.maintain()
    assert not table.snapshot().indexed  # just that many are scanned
    monkeypatch.setattr(table_module, "SCANNED_BYTES", 599 * 3 * DIM * 2)
    monkeypatch.setattr(table_module, "ROWS_OF_A_PARTITION", 64)
    table.maintain()
    assert table.snapshot().indexed
    settings = SearchSettings(nearest=60, probes=6, nearest_mean=100, probes_mean=9, candidates=200)
    by_index = [search(table.snapshot(), query(900 + i), 10, settings=settings) for i in range(8)]
    pairs = zip(scanned, by_index, strict=True)
    recall = np.mean([len({r for _, r in a} & {r for _, r in b}) / 10 for a, b in pairs])
    assert recall >= 0.95
    # What is added later is found at once, before the index is brought up to date.
    table.add(rows_of([clip("new")], [encoded(900, frames=6)]))
    alike = Tokens(torch.from_numpy(encoded(900).tokens.astype(np.float32))[None],
                   torch.from_numpy(encoded(900).logits)[None], torch.ones(1, 6, dtype=torch.bool))  # fmt: skip
    assert ids(table, search(table.snapshot(), alike, 1, settings=settings)) == ["new"]


def test_adding_refuses_an_id_in_use_unless_it_replaces(tmp_path: Path) -> None:
    table = filled(tmp_path, 4)
    again = rows_of([clip("v1", part="q", captions=["another"])], [encoded(70)])
    with pytest.raises(IdInUse, match="v1"):
        table.add(again)
    assert table.snapshot().clip("v1").captions == []
    table.add(again, replace=True)
    assert table.snapshot().rows == 4
    assert table.snapshot().clip("v1").captions == ["another"]


def test_removing_removes_one_and_names_what_is_not_there(tmp_path: Path) -> None:
    table = filled(tmp_path, 4)
    before = table.snapshot()
    table.remove(["v2"])
    assert sorted(ids(table, search(table.snapshot(), query(), 9))) == ["v0", "v1", "v3"]
    assert before.rows == 4 and before.clip("v2").id == "v2"  # a version stays as it was
    with pytest.raises(KeyError, match="v2"):
        table.remove(["v2"])
    with pytest.raises(KeyError):
        table.snapshot().clip("v2")


def test_scanned_segments_follow_the_table_without_being_read_anew(tmp_path: Path) -> None:
    table = filled(tmp_path, 30)
    old = table.snapshot()
    first = old.segments()
    for i in range(40):
        table.add(rows_of([clip(f"n{i}")], [encoded(100 + i)]))
        if i % 3 == 0:
            table.remove([f"n{i}"])
        table.snapshot().segments()
    followed, anew = table.snapshot().segments(), ClipTable.open(str(tmp_path)).snapshot().segments()
    order = np.argsort(followed.present_rows), np.argsort(anew.present_rows)
    np.testing.assert_array_equal(followed.present_rows[order[0]], anew.present_rows[order[1]])
    vectors = followed.vectors[: followed.used][torch.from_numpy(followed.present)]
    torch.testing.assert_close(
        vectors[torch.from_numpy(order[0])], anew.vectors[: anew.used][torch.from_numpy(order[1])]
    )
    assert old.segments() is first and first.used == 30


def test_versions_that_share_memory_do_not_write_over_each_other() -> None:
    base = SegmentScan.empty(DIM, 8).plus(np.array([1]), np.ones((1, 3, DIM)), np.ones((1, 3)))
    left = base.plus(np.array([2]), np.full((1, 3, DIM), 2.0), np.ones((1, 3)))
    right = base.plus(np.array([3]), np.full((1, 3, DIM), 3.0), np.ones((1, 3)))
    assert left.present_rows.tolist() == [1, 2] and right.present_rows.tolist() == [1, 3]
    assert float(left.vectors[1, 0, 0]) == 2.0 and float(right.vectors[1, 0, 0]) == 3.0


def test_labels_filter_whatever_they_hold(tmp_path: Path) -> None:
    table = ClipTable.create(str(tmp_path), METADATA)
    clips = [
        clip("a", split="test", metadata={"by": "O'Neil"}),
        clip("b", split="train", metadata={"by": "x' OR 1=1"}),
    ]
    table.add(rows_of(clips, [encoded(1), encoded(2)]))
    for filters, expected in (
        ({"split": "test"}, ["a"]),
        ({"by": "O'Neil"}, ["a"]),
        ({"by": "x' OR 1=1", "split": "train"}, ["b"]),
        ({"by": "' OR '1'='1"}, []),
    ):
        assert ids(table, search(table.snapshot(), query(), 9, labelled(filters))) == expected


def test_names_that_are_no_utf8_are_written_so_that_json_holds_them(tmp_path: Path) -> None:
    name = "/videos/caf\udce9-\udcff.mp4"  # as os.fsdecode gives bytes that are no UTF-8
    assert as_text(name) == "/videos/caf\\xe9-\\xff.mp4"
    assert as_text("half \ud83d") == "half \\ud83d"
    assert as_text("whole 🎬 é") == "whole 🎬 é"
    table = ClipTable.create(str(tmp_path), METADATA)
    table.add(rows_of([clip(as_text("caf\udce9"), source=name)], [encoded(1)]))
    held = table.snapshot().clip("caf\\xe9")
    assert held.source == name
    assert json.loads(json.dumps(held.id)) == "caf\\xe9"
    table.remove(["caf\\xe9"])
    assert table.snapshot().rows == 0


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "not an index .* make one with `hbi index`"),
        ({"version": 1, "model": "m", "parts": []}, "format 1, .* make it anew from its shards"),
        ({"shards": [], "settings": {}}, "a folder of shards, not an index: make one of it with"),
        ([1, 2], "format None"),
        ("{", "not the file of an index"),
    ],
)
def test_what_is_no_index_says_what_to_do(tmp_path: Path, content: object, says: str) -> None:
    if content is not None:
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / "index.json").write_text(text)
    with pytest.raises(ValueError, match=says):
        ClipTable.open(str(tmp_path))


def test_an_unfinished_index_and_one_without_its_table_say_so(tmp_path: Path) -> None:
    filled(tmp_path, 2)
    about = json.loads((tmp_path / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps(about | {"complete": False}))
    with pytest.raises(ValueError, match="not finished: run the same `hbi index` again"):
        ClipTable.open(str(tmp_path))
    assert ClipTable.open(str(tmp_path), unfinished=True).snapshot().rows == 2
    (tmp_path / "index.json").write_text(json.dumps(about))
    held = ClipTable.open(str(tmp_path))
    shutil.rmtree(tmp_path / "clips.lance")
    with pytest.raises(ValueError, match="its table is gone"):
        ClipTable.open(str(tmp_path))
    with pytest.raises(IndexUnavailable, match="cannot be reached"):
        held.snapshot()


def test_an_index_made_anew_under_a_reader_is_not_taken_for_the_old_one(tmp_path: Path) -> None:
    held = filled(tmp_path, 5)
    held.snapshot().segments()
    shutil.rmtree(tmp_path / "clips.lance")
    anew = filled(tmp_path, 5)
    assert anew.snapshot().version == 2  # its versions and rows are numbered as those of the first were
    with pytest.raises(IndexUnavailable, match="another index was made in its place"):
        held.snapshot()
    with pytest.raises(IndexUnavailable, match="another index was made in its place"):
        held.add(rows_of([clip("new")], [encoded(9)]))
    assert ClipTable.open(str(tmp_path)).snapshot().rows == 5


def test_an_index_lives_in_object_storage_and_says_when_that_fails(tmp_path: Path, monkeypatch) -> None:
    with object_storage(tmp_path / "s3") as remote:
        remote.use(monkeypatch)
        table = ClipTable.create(remote.uri("index"), METADATA)
        table.add(rows_of([clip(f"v{i}") for i in range(40)], [encoded(i) for i in range(40)]))
        other = ClipTable.open(remote.uri("index"))
        local = filled(tmp_path / "local", 40)
        found = search(other.snapshot(), query(), 5)
        assert ids(other, found) == ids(local, search(local.snapshot(), query(), 5))
        remote.requests.clear()
        search(other.snapshot(60), query(), 5)
        assert all("index.json" not in path for _, path in remote.requests)
        table.remove(["v3"])
        assert other.snapshot().rows == 39
    with pytest.raises((IndexUnavailable, ValueError)):  # the server is gone
        monkeypatch.setattr(table_module.storage, "PAUSES", (0.01,), raising=False)
        other.snapshot().tokens(np.array([row for _, row in found]))
