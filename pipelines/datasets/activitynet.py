"""ActivityNet Captions and ActivityNet-QA: long videos, a sentence for each moment."""

from collections.abc import Iterator
from typing import Any

from hbi.pipelines.datasets.files import Files, Videos, read_json
from hbi.pipelines.datasets.questions import rows_by_video
from hbi.pipelines.manifest import Row


def activitynet(files: Files, videos: Videos) -> Iterator[Row]:
    """The sentences of a video as one paragraph; retrieval is tested on `val`, which is val_1."""
    for split, id, video in _activitynet(files):
        paragraph = " ".join(sentence.strip() for sentence in video["sentences"])
        yield Row(_path(videos, id), id, [paragraph], split, extra={"duration": video["duration"]})


def activitynet_segments(files: Files, videos: Videos) -> Iterator[Row]:
    """A clip for each sentence."""
    for split, id, video in _activitynet(files):
        pairs = zip(video["timestamps"], video["sentences"], strict=True)
        for number, ((start, end), sentence) in enumerate(pairs):
            # Some moments are annotated backwards.
            begin, finish = sorted((float(start), float(end)))
            finish = finish if finish > begin else None
            yield Row(_path(videos, id), f"{id}_{number}", [sentence.strip()], split, begin, finish)


def activitynet_qa(files: Files, videos: Videos) -> Iterator[Row]:
    """Likewise; questions and answers are apart, joined by question_id."""
    for split, path in files.splits("{}_q.json"):
        answers = {
            answer["question_id"]: answer["answer"] for answer in read_json(files.need(f"{split}_a.json"))
        }
        asked = ((q["video_name"], q["question"], answers.get(q["question_id"])) for q in read_json(path))
        pairs = ((id, question, answer) for id, question, answer in asked if answer is not None)
        yield from rows_by_video(split, pairs, lambda id: _path(videos, id))


def _activitynet(files: Files) -> Iterator[tuple[str, str, dict[str, Any]]]:
    names = [("train", "train.json", "train_ids.json"), ("val", "val_1.json", "val_ids.json")]
    names += [("val_2", "val_2.json", "val_ids.json")]
    if not any(files.find(name) for _, name, _ in names):
        files.need("train.json")
    for split, name, ids in names:
        if path := files.find(name):
            keep = set(read_json(listed)) if (listed := files.find(ids)) else None
            for id, video in read_json(path).items():
                if keep is None or id in keep:
                    yield split, id, video


def _path(videos: Videos, id: str) -> str:
    return videos.path(id, id.removeprefix("v_"), f"v_{id}")
