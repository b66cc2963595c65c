"""What lies in a shard folder, one sample of it, and whether its bytes are those that were written."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hbi.pipelines.sharding import shards
from hbi.pipelines.sharding.inspect import contact_sheet, contents, describe_sample, find_sample
from hbi.pipelines.sharding.plan import plan
from hbi.pipelines.sharding.records import unfinished
from hbi.pipelines.sharding.verify import verified
from tests.support.clips import write_clips, write_manifest
from tests.support.sharding import SETTINGS, make, samples


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 clips: 12 to train, 4 to test."""
    place = tmp_path_factory.mktemp("inspect")
    with shards.decoder(SETTINGS) as decoder:
        make(write_clips(place / "in", 16), str(place / "out"), decoder)
    return place


def test_each_split_is_counted(folder: Path) -> None:
    found = contents(str(folder / "out"))
    assert {name: (held.samples, held.captions, held.shards) for name, held in found.items()} == {
        "test": (4, 4, 1),
        "train": (12, 12, 2),
    }
    held = found["train"]
    assert held.seconds == pytest.approx(12 * 1.4) and held.sizes == {(96, 96): 12}
    text = str(held)
    assert "12 in 2 shards" in text and "12 of 96x96" in text and "12 pyav" in text and "none for" not in text
    assert list(contents(str(folder / "out"), "test")) == ["test"]
    with pytest.raises(ValueError, match=r"no samples in split 'val' \(it has test, train\)"):
        contents(str(folder / "out"), "val")


def test_a_copied_folder_without_records_is_read(folder: Path, tmp_path: Path) -> None:
    for path in [*(folder / "out").glob("*.tar"), folder / "out" / "index.json"]:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert contents(str(tmp_path)) == contents(str(folder / "out"))


def test_a_sample_is_found_by_its_key(folder: Path) -> None:
    every = {sample.key: sample for sample in samples(folder / "out")}
    for key in ("000000007", "7"):
        assert find_sample(str(folder / "out"), key) == every["000000007"]
    assert find_sample(str(folder / "out"), "3", "test") == every["000000003"]
    for key, split in (("7", "train"), ("99", None), ("x", None)):
        with pytest.raises(ValueError, match=f"no sample '{key}'"):
            find_sample(str(folder / "out"), key, split)
    sample = every["000000007"]
    assert json.loads(describe_sample(sample))["captions"] == ["noise number 7"]
    sheet = np.asarray(Image.open(io.BytesIO(contact_sheet(sample))))
    assert np.array_equal(sheet, np.concatenate(list(sample.images()), axis=1))


def test_changed_bytes_of_the_same_size_are_found_and_only_those(folder: Path) -> None:
    manifest, out = str(folder / "in" / "manifest.jsonl"), str(folder / "out")
    planned = plan(manifest, out, SETTINGS.identity(), SETTINGS.samples_per_shard)
    tar = folder / "out" / "train-000001.tar"
    content = tar.read_bytes()
    middle = len(content) // 2
    tar.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    there = list(unfinished(out, planned.shards))
    assert all(record is not None for _, record in there), "the size is as recorded"
    lost = [shard_plan for shard_plan, record in verified(out, there) if record is None]
    assert [shard_plan.name for shard_plan in lost] == ["train-000001.tar"]
    with shards.decoder(SETTINGS) as decoder:
        shards.make_shard(out, lost[0], SETTINGS, decoder)
    assert tar.read_bytes() == content
    assert all(record is not None for _, record in verified(out, unfinished(out, planned.shards)))


def test_names_that_are_not_utf_8_can_be_described(tmp_path: Path) -> None:
    write_clips(tmp_path, 0)
    rows = [{"video": "0.mp4", "id": "n\udcff", "captions": ["ein Hund 🐕"]}]
    with shards.decoder(SETTINGS) as decoder:
        make(write_manifest(tmp_path / "m.jsonl", rows), str(tmp_path / "out"), decoder)
    assert json.loads(describe_sample(find_sample(str(tmp_path / "out"), "0")))["id"] == "n\udcff"
