"""The report: one page that stands alone, holds little, and believes nothing that it shows."""

import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from hbi.pipelines.sample import ShardInfo
from hbi.pipelines.sharding import records, report, shards
from hbi.pipelines.sharding.plan import plan
from hbi.pipelines.sharding.records import ClipStats, Failure, ShardManifest
from hbi.pipelines.sharding.report import Page
from hbi.pipelines.sharding.settings import ShardSettings
from tests.support.clips import video, write_manifest

EVIL = "<script>alert('x')</script>\" onerror=\"x &amp;"


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        assert not any(name.startswith("on") for name, _ in attrs)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_shows_clips_and_failures_and_nothing_runs(tmp_path: Path):
    (tmp_path / "a.mp4").write_bytes(video(0))
    rows = [
        {"video": "a.mp4", "id": EVIL, "captions": [EVIL]},
        {"video": "n\udcff.mp4", "id": "lost\ud800"},
        {"video": f"{EVIL}.mp4", "id": EVIL},
    ]
    settings, out = ShardSettings(frames=4, size=32, samples_per_shard=2), str(tmp_path / "out")
    planned = plan(write_manifest(tmp_path / "m.jsonl", rows), out, settings.identity(), 2)
    page = Page()
    with shards.decoder(settings) as decoder:
        for shard_plan in planned.shards:
            shards.make_shard(out, shard_plan, settings, decoder)
    for _, record in records.read_records(out, [shard_plan.name for shard_plan in planned.shards]):
        assert record is not None
        page.add(record)
    page.write(out, str(tmp_path / "report.html"), "a summary <b>")
    content = (tmp_path / "report.html").read_bytes().decode("utf-8")
    parsed = Tags()
    parsed.feed(content)
    assert "script" not in parsed.tags and parsed.tags.count("img") == 4
    assert all(link.startswith("data:image/jpeg;base64,") for link in parsed.links)
    assert not re.search(r"https?://", content)
    assert EVIL in parsed.text and "no such file" in parsed.text and "a summary <b>" in parsed.text
    assert "96 × 96" in parsed.text and "1–2 s" in parsed.text


def test_what_it_holds_is_bounded():
    page = Page()
    clip = ClipStats(2.5, 30.0, 320, 240, 7, "decord")
    for number in range(1000):
        failures = [Failure("0", "i", "v", "read", f"reason {number}")] * 2
        page.add(
            ShardManifest(ShardInfo(f"train-{number:06d}.tar", "train", 3, 1, ""), 5, failures, [clip] * 3)
        )
    assert len(page.failures) == report.FAILURES
    assert report.SHEETS <= len(page.sheets) <= 2 * report.SHEETS
    numbers = [int(name[6:12]) for name in page.sheets]
    assert numbers[0] == 0 and numbers[-1] > 800 and len({b - a for a, b in pairwise(numbers)}) == 1
    assert page.seconds == {1: 3000} and page.words == {7: 3000} and page.sizes == {(320, 240): 3000}


@pytest.mark.parametrize(("seconds", "power"), [(0.5, -1), (1.0, 0), (1.99, 0), (2.0, 1), (700.0, 9)])
def test_lengths_are_binned_by_powers_of_two(seconds: float, power: int):
    page = Page()
    page.add(ShardManifest(ShardInfo("a", "a", 1, 1, ""), 1, [], [ClipStats(seconds, 1, 1, 1, 0, "pyav")]))
    assert list(page.seconds) == [power]
