"""Shards without Ray: every row accounted for, whole tars or none, whatever the files and the disk do."""

import errno
import io
import json
import os
import socket
import stat
import subprocess
import tarfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from hbi.infra import storage
from hbi.pipelines.decoding.decoder import Decoder
from hbi.pipelines.sample import ShardIndex, read_shard
from hbi.pipelines.sharding import shards
from hbi.pipelines.sharding.plan import plan
from hbi.pipelines.sharding.records import Failure
from hbi.pipelines.sharding.shards import ShardError
from tests.support.clips import video, write_clips, write_manifest
from tests.support.sharding import SETTINGS, everything, lines, make, samples, write_index


def test_samples_carry_what_the_manifest_says(tmp_path: Path, decoder: Decoder):
    write_clips(tmp_path, 0)
    qa = [{"question": "what?", "answer": "noise"}]
    rows = [
        {"video": "0.mp4", "id": "a", "captions": ["one", "two"], "qa": qa, "licence": "CC0", "n": 3},
        {"video": "1.mp4", "start": 0.35, "end": 1.0},
    ]
    make(write_manifest(tmp_path / "m.jsonl", rows), str(tmp_path / "out"), decoder)
    first, second = samples(tmp_path / "out")
    assert (first.id, first.captions, first.qa) == ("a", ["one", "two"], qa)
    assert first.extra == {"licence": "CC0", "n": 3}
    assert first.source == str(tmp_path / "0.mp4") and first.key == "000000000"
    assert (first.width, first.height, first.fps) == (96, 96, 10) and first.duration == pytest.approx(1.4)
    assert first.images().shape == (3, 32, 32, 3)
    assert first.timestamps == pytest.approx([0, 0.6, 1.3])
    assert second.id == "1" and second.captions == []
    assert second.timestamps == pytest.approx([0.4, 0.6, 0.9])


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_plain_webdataset_reads_them(tmp_path: Path, decoder: Decoder):
    import webdataset

    ids = ["dots.in.it", "sla/sh", "spa ce", "😀e\u0301", "same", "same", "n\udcff", "000000001", "x.00.jpg"]
    write_clips(tmp_path, 0)
    rows = [{"video": f"{i % 5}.mp4", "id": name} for i, name in enumerate(ids)]
    make(write_manifest(tmp_path / "m.jsonl", rows), str(tmp_path / "out"), decoder)
    found = []
    for tar in sorted((tmp_path / "out").glob("*.tar")):
        for group in webdataset.WebDataset(str(tar), shardshuffle=False, empty_check=False):
            assert {name for name in group if not name.startswith("__")} == {
                "json",
                "00.jpg",
                "01.jpg",
                "02.jpg",
            }
            found.append(json.loads(group["json"].decode("utf-8", "surrogateescape"))["id"])
    assert found == ids
    assert [sample.id for sample in samples(tmp_path / "out")] == ids


def test_headers_hold_nothing_of_the_moment(tmp_path: Path, decoder: Decoder):
    manifest = write_clips(tmp_path / "in", 3)
    make(manifest, str(tmp_path / "out"), decoder)
    with tarfile.open(tmp_path / "out" / "train-000000.tar") as tar:
        members = tar.getmembers()
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o644)}
    assert [m.name for m in members][:5] == [
        *("000000000.json", "000000000.00.jpg", "000000000.01.jpg", "000000000.02.jpg", "000000001.json")
    ]
    make(manifest, str(tmp_path / "again"), decoder)
    assert everything(tmp_path / "out") == everything(tmp_path / "again")


def test_odd_names(tmp_path: Path, decoder: Decoder):
    """Names that trip shells, globs, URLs and decoders; each is one sample."""
    odd = [
        "-dash.mp4", ".dot.mp4", "a.b.c.mp4", "spa ce.mp4", "quo'te\".mp4", "tab\tnew\nline.mp4", "per%20cent.mp4",
        "gl*b?[x].mp4", "{a,b}.mp4", "$(sh);|&.mp4", "😀.mp4", "e\u0301.mp4", "\xe9.mp4", "not utf\udcff8.mp4",
        "x" * 245 + ".mp4", "no-extension", "UPPER.MP4", "# ?a=b.mp4", "back\\slash.mp4",
    ]  # fmt: skip
    for name in odd:
        (tmp_path / name).write_bytes(video(0))
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same.mp4").write_bytes(video(1))
        odd.append(f"{folder}/same.mp4")
    (tmp_path / "link.mp4").symlink_to("no-extension")
    odd.append("link.mp4")
    manifest = write_manifest(tmp_path / "m.jsonl", [{"video": name} for name in odd])
    make(manifest, str(tmp_path / "out"), decoder)
    assert lines(tmp_path / "out") == []
    assert [sample.source for sample in samples(tmp_path / "out")] == [f"{tmp_path}/{name}" for name in odd]


def test_what_cannot_be_read_is_a_failure_with_its_reason(tmp_path: Path, decoder: Decoder):
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "dangling.mp4").symlink_to("nowhere.mp4")
    (tmp_path / "loop.mp4").symlink_to("loop.mp4")
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "list.mp4").write_text("#EXTM3U\n0.mp4\n")
    os.mkfifo(tmp_path / "fifo.mp4")
    (tmp_path / "good.mp4").write_bytes(video(0))
    with socket.socket(socket.AF_UNIX) as listener, suppress(OSError):
        listener.bind(str(tmp_path / "socket.mp4"))
    want = {
        "folder.mp4": "is a folder",
        "dangling.mp4": "no such file",
        "missing.mp4": "no such file",
        "loop.mp4": "too many levels of symbolic links",
        "fifo.mp4": "not a regular file",
        "/dev/zero": "not a regular file",
        "good.mp4/inside.mp4": "not a directory",
        "nul\0l.mp4": "null",
        "lone\ud800.mp4": "surrogates",
        "y" * 300 + ".mp4": "name too long",
        "ftp://host/a.mp4": "ftp://",
        "empty.mp4": "",
        "list.mp4": "",
    }
    rows = [{"video": name} for name in want] + [{"video": "good.mp4", "id": "good"}]
    make(write_manifest(tmp_path / "m.jsonl", rows), str(tmp_path / "out"), decoder)
    failures = lines(tmp_path / "out")
    assert [Path(row["video"]).name for row in failures] == [Path(name).name for name in want]
    for row, reason in zip(failures, want.values(), strict=True):
        assert row["stage"] == ("read" if reason else "decode"), row
        assert reason in row["reason"].lower() and row["reason"], row
    assert [sample.id for sample in samples(tmp_path / "out")] == ["good"]


def test_a_shard_of_failures_has_no_tar(tmp_path: Path, decoder: Decoder):
    rows = [{"video": f"missing{i}.mp4"} for i in range(7)]
    records = make(write_manifest(tmp_path / "m.jsonl", rows), str(tmp_path / "out"), decoder)
    assert [record.rows for record in records] == [6, 1] and list((tmp_path / "out").glob("*.tar")) == []
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert (index["samples"], index["failures"], index["shards"]) == (0, 7, [])


def test_only_what_is_missing_is_made(tmp_path: Path, decoder: Decoder, monkeypatch: pytest.MonkeyPatch):
    manifest, out = write_clips(tmp_path / "in", 32), tmp_path / "out"
    make(manifest, str(out), decoder)
    before = everything(out)
    (out / "train-000000.tar").unlink()
    (out / "train-000001.tar").write_bytes(b"cut short")
    (out / ".done" / "train-000002.tar.json").unlink()
    (out / ".done" / "test-000000.tar.json").write_bytes(b"{broken")
    (out / "index.json").unlink()
    made = []
    monkeypatch.setattr(
        "tests.support.sharding.make_shard",
        lambda *args: made.append(args[1].name) or shards.make_shard(*args),
    )
    make(manifest, str(out), decoder)
    assert sorted(made) == ["test-000000.tar", "train-000000.tar", "train-000001.tar", "train-000002.tar"]
    assert everything(out) == before


def test_an_index_in_parts_reads_as_one_file_does(tmp_path: Path, decoder: Decoder):
    manifest, out = write_clips(tmp_path / "in", 32), str(tmp_path / "out")
    make(manifest, out, decoder)
    whole = ShardIndex.read(out)
    planned = plan(manifest, out, SETTINGS.identity(), SETTINGS.samples_per_shard)
    write_index(out, planned, parts=True)
    assert ShardIndex.read(out) == whole and "shards" not in json.loads(
        (tmp_path / "out/index.json").read_text()
    )
    part = tmp_path / "out" / "index" / "train-000.json"
    part.write_text(part.read_text().replace('"samples": 6', '"samples": 5', 1))
    with pytest.raises(
        ValueError, match=r"index/train-000\.json is not the part of this index.*run `hbi shard` again"
    ):
        ShardIndex.read(out)
    part.unlink()
    with pytest.raises(ValueError, match=r"index/train-000\.json is missing.*run `hbi shard` again"):
        ShardIndex.read(out)


@pytest.mark.parametrize("moment", range(6))
def test_cut_short_at_any_moment_it_ends_the_same(
    tmp_path: Path, decoder: Decoder, monkeypatch: pytest.MonkeyPatch, moment: int
):
    """Stopped before the n-th thing that it writes, then run again."""
    manifest = write_clips(tmp_path / "in", 12)
    make(manifest, str(tmp_path / "whole"), decoder)
    left = [2 + moment]  # the plan takes two

    def counted(write: Any) -> Any:
        def wrapped(*args: Any, **more: Any) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            write(*args, **more)

        return wrapped

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(storage, "put_file", counted(storage.put_file))
        patch.setattr(storage, "write_bytes", counted(storage.write_bytes))
        make(manifest, str(tmp_path / "out"), decoder)
    make(manifest, str(tmp_path / "out"), decoder)
    assert everything(tmp_path / "out") == everything(tmp_path / "whole")


def test_a_full_disk_stops_with_whole_shards_only(tmp_path: Path, decoder: Decoder):
    out = tmp_path / "out"
    out.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=100k", "none", str(out)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    try:
        manifest = write_clips(tmp_path / "in", 40)
        with pytest.raises(ShardError, match=r"^no space left for train-00000\d\.tar .*run again"):
            make(manifest, str(out), decoder)
        there = sorted(out.glob("*.tar"))
        assert there
        assert all(len(list(read_shard(io.BytesIO(tar.read_bytes())))) == 6 for tar in there)
        assert list((out / ".staging").iterdir()) == [] and not (out / "index.json").exists()
        subprocess.run(["mount", "-o", "remount,size=10m", str(out)], check=True)
        make(manifest, str(out), decoder)
        assert len(samples(out)) == 40
    finally:
        subprocess.run(["umount", "-l", str(out)], check=True)


def test_a_full_disk_is_told_from_a_broken_clip(
    tmp_path: Path, decoder: Decoder, monkeypatch: pytest.MonkeyPatch
):
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tarfile.TarFile, "addfile", full)
    with pytest.raises(ShardError, match=r"no space left for .*No space left on device"):
        make(write_clips(tmp_path / "in", 4), str(tmp_path / "out"), decoder)
    assert list((tmp_path / "out").glob("*.tar")) == []


def test_an_output_that_may_not_be_written_is_named(tmp_path: Path, decoder: Decoder):
    manifest, out = write_clips(tmp_path / "in", 4), tmp_path / "out"
    plan(manifest, str(out), SETTINGS.identity(), SETTINGS.samples_per_shard)
    (out / "train-000000.tar").mkdir()
    with pytest.raises(ShardError, match=r"train-000000\.tar cannot be written to .*out"):
        make(manifest, str(out), decoder)


def test_failures_say_nothing_but_the_contract(tmp_path: Path, decoder: Decoder):
    make(write_manifest(tmp_path / "m.jsonl", [{"video": "x.mp4"}]), str(tmp_path / "out"), decoder)
    assert [list(row) for row in lines(tmp_path / "out")] == [["key", "id", "video", "stage", "reason"]]
    assert stat.S_IMODE((tmp_path / "out" / "index.json").stat().st_mode) == 0o644
    assert Failure("1", "i", "v", "read", "r").passing is False


def test_a_row_that_cannot_be_meant_is_a_failure_of_the_manifest(tmp_path: Path, decoder: Decoder):
    write_clips(tmp_path, 0)
    good = [{"video": f"{i}.mp4"} for i in range(3)]
    bad = [
        {"video": "3.mp4", "start": "soon"},
        {"film": "4.mp4", "id": "x"},
        {"video": "4.mp4", "split": "a/b"},
    ]
    rows = [good[0], bad[0], good[1], bad[1], bad[2], good[2]]
    make(write_manifest(tmp_path / "m.jsonl", rows), str(tmp_path / "out"), decoder)
    assert [sample.id for sample in samples(tmp_path / "out")] == ["0", "1", "2"]
    found = lines(tmp_path / "out")
    assert [row["stage"] for row in found] == ["manifest"] * 3
    assert [row["id"] for row in found] == ["3", "x", "4"]
    assert [row["key"] for row in found] == ["000000001", "000000003", "000000004"]
    assert found[0]["reason"].startswith("line 2: `start` is") and "no `video`" in found[1]["reason"]
