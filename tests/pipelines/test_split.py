"""Long videos become clips that cover them exactly, and what cannot be read stays one row."""

import io
import itertools
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hbi.model.config import FrameSettings
from hbi.pipelines.decoding.decoder import Decoder
from hbi.pipelines.manifest import Row, read_manifest, write_manifest
from hbi.pipelines.split import SplitSettings, cut, pieces, split_manifest
from tests.support.videos import make

# Ray Data warns of its own settings when it sends them to its workers.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")


def shots(*levels: int, frames: int = 12) -> bytes:
    """A video of plain shots of 12 frames at 10 a second."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as out:
        stream = out.add_stream("libx264", rate=10)
        stream.width = stream.height = 64
        for level in levels:
            for _ in range(frames):
                out.mux(
                    stream.encode(
                        av.VideoFrame.from_ndarray(np.full((64, 64, 3), level, np.uint8), format="rgb24")
                    )
                )
        out.mux(stream.encode(None))
    return buffer.getvalue()


@settings(deadline=None)  # a busy machine is slow
@given(
    st.floats(0.5, 300),
    st.floats(1, 20),
    st.floats(0.1, 1),
    st.lists(st.floats(0, 300), max_size=8),
    st.sampled_from(["stride", "shots"]),
)
def test_clips_cover_the_video_without_gaps(
    duration: float, seconds: float, least: float, cuts: list[float], by: str
) -> None:
    settings = SplitSettings(by, seconds, least * seconds)  # type: ignore[arg-type]
    duration = round(duration, 3)
    given_cuts = sorted({round(cut, 3) for cut in cuts}) if by == "shots" else []
    clips = pieces(Row("v.mp4", "v", ["c"]), duration, given_cuts, settings)
    if len(clips) == 1:
        assert clips == [Row("v.mp4", "v", ["c"])]
        return
    assert clips[0].start == 0 and clips[-1].end == duration
    assert all(a.end == b.start for a, b in itertools.pairwise(clips))
    assert len({clip.id for clip in clips}) == len(clips) and clips[1].extra == {"cut_from": "v"}
    lengths = [(clip.end or 0) - (clip.start or 0) for clip in clips]
    assert min(lengths) > 0
    if by == "stride":
        assert lengths[:-1] == pytest.approx([seconds] * (len(clips) - 1), abs=1e-4)
        assert settings.min_seconds - 1e-4 <= lengths[-1] < seconds + settings.min_seconds + 1e-4
    else:
        assert max(lengths) <= seconds + 1e-4


def test_rows_with_times_are_cut_within_them() -> None:
    row = Row("v.mp4", "v", start=5.0, end=26.0)
    clips = pieces(row, 60.0, [], SplitSettings(seconds=10.0, min_seconds=2.0))
    assert [(clip.id, clip.start, clip.end) for clip in clips] == [
        ("v-000", 5.0, 15.0),
        ("v-001", 15.0, 26.0),
    ]


@pytest.fixture
def manifest(tmp_path: Path) -> str:
    (tmp_path / "shots.mp4").write_bytes(shots(20, 200, 90))
    (tmp_path / "broken.mp4").write_bytes(make(30)[:900])
    (tmp_path / "list.mp4").write_bytes(b"#EXTM3U\n#EXTINF:1,\nshots.mp4\n")
    rows = [
        Row(str(tmp_path / name), name, ["c"]) for name in ("broken.mp4", "shots.mp4", "list.mp4", "gone.mp4")
    ]
    write_manifest(rows, str(tmp_path / "m.jsonl"))
    return str(tmp_path / "m.jsonl")


def test_by_shots(ray_session: None, manifest: str, tmp_path: Path) -> None:
    out = str(tmp_path / "clips.jsonl")
    assert split_manifest(manifest, out, SplitSettings("shots", min_seconds=0.5)) == 6
    rows = list(read_manifest(out))
    # What cannot be read keeps its row: it fails, with its reason, when shards are made.
    assert [row.id for row in rows] == [
        "broken.mp4",
        "shots.mp4-000",
        "shots.mp4-001",
        "shots.mp4-002",
        "list.mp4",
        "gone.mp4",
    ]
    assert [(row.start, row.end) for row in rows[1:4]] == [(0.0, 1.2), (1.2, 2.4), (2.4, 3.6)]
    assert rows[2].captions == ["c"]


def test_by_stride_as_a_plain_loop_does(ray_session: None, manifest: str, tmp_path: Path) -> None:
    settings = SplitSettings(seconds=1.0, min_seconds=0.5)
    out, plain = str(tmp_path / "out.jsonl"), str(tmp_path / "plain.jsonl")
    split_manifest(manifest, out, settings)
    with Decoder(FrameSettings()) as decoder:
        write_manifest(
            (clip for row in read_manifest(manifest) for clip in cut(row, decoder, settings)), plain
        )
    assert Path(out).read_bytes() == Path(plain).read_bytes()
    times = [(row.start, row.end) for row in read_manifest(out) if row.start is not None]
    assert times == [(0.0, 1.0), (1.0, 2.0), (2.0, 3.0), (3.0, 3.6)]


def test_a_manifest_that_is_not_there_is_told_before_ray_starts(tmp_path: Path) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=r"none\.jsonl"):
        split_manifest(str(tmp_path / "none.jsonl"), str(tmp_path / "out.jsonl"), SplitSettings())


def test_settings_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match="--by scenes: must be stride or shots"):
        SplitSettings("scenes")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="--min-seconds 20: must be above 0 and at most --seconds"):
        SplitSettings(seconds=10.0, min_seconds=20.0)
