"""The wall around decoding: whatever happens to the worker, the clip gets a reason and its neighbours their frames."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from threading import Timer

import numpy as np
import pytest

from hbi.model.frames import FrameSettings
from hbi.pipelines.decoding.clip import DecodeError, decode_clip
from hbi.pipelines.decoding.decoder import Decoder
from hbi.pipelines.decoding.shots import find_cuts
from hbi.pipelines.decoding.worker import encode_jpeg
from tests.support.videos import make, number_of

FEW = FrameSettings(num_frames=4, size=64)
ROOT = Path(__file__).resolve().parents[2]


def worker_of(decoder: Decoder) -> int:
    assert decoder._worker is not None
    return decoder._worker._process.pid


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_frames_equal_those_decoded_in_process(tmp_path: Path) -> None:
    video = make(20)
    (tmp_path / "a.mp4").write_bytes(video)
    here = decode_clip(video, FEW, 0.5, 1.5)
    with Decoder(FEW) as decoder:
        for data in (video, tmp_path / "a.mp4", str(tmp_path / "a.mp4")):
            clip = decoder.decode(data, 0.5, 1.5)
            assert np.array_equal(clip.frames, here.frames)
            assert (clip.timestamps, clip.decoder, clip.end) == (here.timestamps, here.decoder, here.end)
    with Decoder(FEW, quality=90) as decoder:
        clip = decoder.decode(video, 0.5, 1.5)
        assert clip.jpegs == [encode_jpeg(frame, 90) for frame in here.frames] and clip.frames == []


def test_the_worker_of_a_shard_folders_settings() -> None:
    settings = {
        "frames": 3,
        "size": 32,
        "choice": "segments",
        "fps": 1.0,
        "jpeg_quality": 80,
        "samples_per_shard": 9,
    }
    with Decoder.of_settings(settings, clip_timeout=20) as decoder:
        assert decoder.settings == FrameSettings(3, 32, "segments", 1.0)
        assert len(decoder.decode(make(9)).jpegs) == 3


def test_one_worker_serves_many_clips_and_is_renewed() -> None:
    with Decoder(FEW, renew_after=3) as decoder:
        pids = []
        for _ in range(5):
            decoder.decode(make(4))
            pids.append(worker_of(decoder) if decoder._worker else None)
        assert pids[0] == pids[1] and pids[2] is None and pids[3] == pids[4] != pids[0]
        last = worker_of(decoder)
    assert not alive(last)


def test_a_failure_leaves_the_worker_to_the_next_clip() -> None:
    with Decoder(FEW) as decoder:
        decoder.decode(make(4))
        pid = worker_of(decoder)
        with pytest.raises(DecodeError, match="the file is empty"):
            decoder.decode(b"")
        assert len(decoder.decode(make(4)).frames) == 4 and worker_of(decoder) == pid


def test_a_hang_is_ended_at_the_limit() -> None:
    with Decoder(FEW, clip_timeout=3.0) as decoder:
        decoder.decode(make(4))
        os.kill(worker_of(decoder), signal.SIGSTOP)  # as a decoder that never returns
        with pytest.raises(DecodeError, match="ran past the time limit of 3 s"):
            decoder.decode(make(4))
        assert len(decoder.decode(make(4)).frames) == 4


def test_a_hang_of_decord_leaves_half_the_time_to_the_second_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    with Decoder(FEW, clip_timeout=8.0, decoder="decord") as decoder:
        video = make(4, options={"preset": "ultrafast"})
        decoder.decode(video)
        stopped = worker_of(decoder)
        assert decoder._worker is not None
        os.kill(stopped, signal.SIGSTOP)
        real = type(decoder._worker).exchange

        def as_if_decord(worker, *given):  # type: ignore[no-untyped-def]
            if worker._process.pid != stopped:
                return real(worker, *given)
            _request, payload, deadline, timeout = given
            worker.trying = "decord"
            return worker._talk(b"x", payload, deadline, timeout)

        monkeypatch.setattr(type(decoder._worker), "exchange", as_if_decord)
        clip = decoder.decode(video)
        assert clip.decoder == "pyav" and [number_of(frame) for frame in clip.frames] == [0, 1, 2, 3]


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL])
def test_a_crash_is_a_reason(number: signal.Signals) -> None:
    with Decoder(FEW, clip_timeout=20.0) as decoder:
        decoder.decode(make(4))
        os.kill(worker_of(decoder), signal.SIGSTOP)

        def crash(pid: int) -> None:
            os.kill(pid, number)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

        Timer(0.3, crash, (worker_of(decoder),)).start()
        with pytest.raises(DecodeError, match=rf"crashed \({number.name}\)"):
            decoder.decode(make(4))
        assert len(decoder.decode(make(4)).frames) == 4


def test_memory_is_bounded() -> None:
    big = make(3, width=3840, height=2160, options={"preset": "ultrafast"})
    with Decoder(FEW, clip_memory=32 << 20, clip_timeout=30) as decoder:
        with pytest.raises(DecodeError, match="memory limit of 32 MiB"):
            decoder.decode(big)
        assert len(decoder.decode(make(4)).frames) == 4
    with Decoder(FEW, clip_timeout=60) as decoder:
        assert len(decoder.decode(big).frames) == 3


def test_a_killed_parent_leaves_no_worker() -> None:
    code = (
        f"import sys, time; sys.path[:0] = [{str(ROOT)!r}]\n"
        "from tests.support.videos import make; from hbi.pipelines.decoding.decoder import Decoder\n"
        "from hbi.model.frames import FrameSettings\n"
        "decoder = Decoder(FrameSettings()); decoder.decode(make(4))\n"
        "print(decoder._worker._process.pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        os.kill(pid, signal.SIGSTOP)  # even one that is stuck and reads nothing
        os.kill(pid, signal.SIGCONT)
        assert alive(pid)
        parent.kill()
    deadline = time.monotonic() + 5
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not alive(pid)


def test_the_worker_starts_without_the_heavy_libraries() -> None:
    heavy = {"torch", "ray", "s3fs", "cv2", "decord", "tyro"}
    code = f"import sys; import hbi.pipelines.decoding.worker, av; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_nothing_of_the_folder_it_stands_in_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "av.py").write_text("raise SystemExit('imported from the working directory')")
    monkeypatch.chdir(tmp_path)
    with Decoder(FEW) as decoder:
        assert len(decoder.decode(make(4)).frames) == 4


def test_cuts_are_found_where_the_picture_changes() -> None:
    frames = [
        (index / 10, np.full((36, 64, 3), 30 + 150 * (index // 12 % 2), np.uint8)) for index in range(36)
    ]
    assert find_cuts(frames, 27.0, 0.5) == [1.2, 2.4]
    assert find_cuts(frames, 27.0, 2.0) == [2.4]
    assert find_cuts([], 27.0, 0.5) == []


def test_a_decoder_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"--decoder decord: it is not installed: pip install 'hbi\[decord\]'"
    ):
        Decoder(FEW, decoder="decord")
    Decoder(FEW)
