"""One sample: what goes into a tar comes out, whatever its text holds, and plain webdataset reads it too."""

import io
import json
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import webdataset
from PIL import Image

from hbi.pipelines.sample import Sample, members_of, read_shard, sample_of


def jpeg(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (level, level, level)).save(buffer, "JPEG")
    return buffer.getvalue()


SAMPLE = Sample(
    key="000000007", id="a.b/c d", captions=["ein Hund läuft 🐕"], qa=[{"question": "wer?", "answer": "Hund"}],
    source="x.mp4", start=0.5, end=2.0, fps=25.0, duration=3.0, timestamps=[0.5, 1.0], width=64, height=48,
    decoder="decord", extra={"licence": "MIT"}, frames=[jpeg(10), jpeg(200)],
)  # fmt: skip


def tar_of(*samples: Sample) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for sample in samples:
            for name, content in members_of(sample):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


@pytest.mark.parametrize(
    "text",
    ["plain", "ein Hund 🐕", "e\u0301", "half a character \ud83d", "not UTF-8 \udcff", 'quotes " \n \0'],
)
def test_any_text_comes_back_and_is_valid_json(text: str) -> None:
    sample = replace(SAMPLE, id=text, captions=[text], source=text)
    (name, content), *frames = members_of(sample)
    assert json.loads(content.decode())["id"] == text
    assert sample_of("000000007", {"json": content} | {n.split(".", 1)[1]: c for n, c in frames}) == sample
    assert name == "000000007.json"


def test_a_tar_of_samples_is_read_in_order_and_cut_tars_are_not_silent() -> None:
    other = replace(SAMPLE, key="000000008", id="other")
    data = tar_of(SAMPLE, other)
    assert list(read_shard(io.BytesIO(data))) == [SAMPLE, other]
    with pytest.raises(tarfile.ReadError):
        list(read_shard(io.BytesIO(data[: data.rindex(jpeg(200)) + 50])))


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # webdataset leaves its file open
def test_plain_webdataset_groups_the_members(tmp_path) -> None:
    path = tmp_path / "train-000000.tar"
    path.write_bytes(tar_of(SAMPLE, replace(SAMPLE, key="000000008")))
    found = list(webdataset.WebDataset(str(path), shardshuffle=False))
    assert [sample["__key__"] for sample in found] == ["000000007", "000000008"]
    assert {"json", "00.jpg", "01.jpg"} <= set(found[0])


def test_images_are_the_frames_in_time_order() -> None:
    images = SAMPLE.images()
    assert images.shape == (2, 16, 16, 3)
    assert images.dtype == np.uint8
    assert images[0].mean() < 20 < 190 < images[1].mean()
