"""What others would make such tars with, for `benchmarks.sharding`: a loop by hand, and video2dataset."""

import io
import json
import os
import subprocess
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps


def user_frames(video: str, count: int) -> list[Image.Image]:
    """So many frames of a video, uniform from the first to the last. No code of ours."""
    import av

    with av.open(video) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        total = stream.frames
        if not total:  # some formats do not say
            total = sum(packet.size > 0 for packet in container.demux(stream))
            container.seek(0)
        wanted, images = set(np.linspace(0, total - 1, count).astype(int).tolist()), []
        for number, frame in enumerate(container.decode(stream)):
            if number in wanted:
                images.append(frame.to_image())
                if len(images) == len(wanted):
                    break
        return images


def user_tar(path: str, rows: list[tuple[str, str, list[str]]], frames: int, size: int, quality: int) -> None:
    """Rows of key, video and captions as a WebDataset tar. No code of ours."""
    import av

    with tarfile.open(path, "w") as tar:
        for key, video, captions in rows:
            try:
                images = user_frames(video, frames)
            except (av.FFmpegError, UnicodeDecodeError):  # the latter of tags in another encoding
                continue
            members = {"json": json.dumps({"video": video, "captions": captions}).encode()}
            for number, image in enumerate(images):
                jpeg = io.BytesIO()
                ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC).save(
                    jpeg, "JPEG", quality=quality
                )
                members[f"{number:02}.jpg"] = jpeg.getvalue()
            for extension, content in members.items():
                header = tarfile.TarInfo(f"{key}.{extension}")
                header.size = len(content)
                tar.addfile(header, io.BytesIO(content))


CALL = """
import json, sys
from video2dataset import video2dataset
for call in json.loads(sys.argv[1]):
    video2dataset(**call)
"""


def video2dataset_seconds(
    python: str, videos: list[str], out: str, frame_rate: float, size: int
) -> tuple[int, float]:
    """How many of the videos it makes videos of that frame rate and size of, on all cores, and the seconds.

    The seconds are its own, from a stage's first clip to its last; the start of its processes is left out. It takes two
    stages, since version 1.3.0 fails in the first where it is to do more than copy. python: one that has it, beside
    which an ffmpeg lies.
    """
    cores = len(os.sched_getaffinity(0))
    a_shard = -(-len(videos) // cores)
    Path(f"{out}.txt").write_text("\n".join(["url", *videos]) + "\n")
    copied, made = f"{out}-copied", out
    config = {
        "reading": {
            "yt_args": {"yt_metadata_args": None},
            "timeout": 60,
            "sampler": None,
            "dataloader_args": {},
        },
        "storage": {
            "number_sample_per_shard": a_shard,
            "oom_shard_count": 5,
            "captions_are_subtitles": False,
        },
        "distribution": {
            "processes_count": cores,
            "thread_count": 1,
            "subjob_size": 1000,
            "distributor": "multiprocessing",
        },
    }
    subsampling = {
        "ResolutionSubsampler": {"args": {"video_size": size, "resize_mode": ["scale", "crop"]}},
        "FrameSubsampler": {"args": {"frame_rate": frame_rate}},
    }
    calls = [
        {"url_list": f"{out}.txt", "output_folder": copied, "config": config | {"subsampling": {}}},
        {
            "url_list": f"{copied}/{{00000..{cores - 1:05}}}.tar",
            "input_format": "webdataset",
            "output_folder": made,
            "stage": "subset",
            "config": config | {"subsampling": subsampling},
        },
    ]
    path = f"{Path(python).parent}:{os.environ['PATH']}"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"PATH": path}
    asked = json.dumps([call | {"output_format": "webdataset"} for call in calls])
    subprocess.run([python, "-c", CALL, asked], env=environment, check=True, stdout=subprocess.DEVNULL)
    seconds, count = 0.0, 0
    for folder in (copied, made):
        stats = [json.loads(path.read_text()) for path in Path(folder).glob("*_stats.json")]
        seconds += max(each["end_time"] for each in stats) - min(each["start_time"] for each in stats)
        count = sum(each["successes"] for each in stats)
    return count, seconds
