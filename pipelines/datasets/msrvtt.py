"""MSR-VTT: 10,000 videos, twenty captions each."""

from collections.abc import Iterator

from hbi.pipelines.datasets.files import Files, Videos, read_csv, read_json
from hbi.pipelines.datasets.questions import question_files, read_questions, rows_by_video
from hbi.pipelines.manifest import Row


def msrvtt_1ka(files: Files, videos: Videos) -> Iterator[Row]:
    """9,000 (or 7,010) videos with all their captions to train, 1,000 videos with one sentence each to test."""
    captions = _msrvtt_captions([files.need("MSRVTT_data.json")])
    for line in read_csv(files.need("MSRVTT_train.9k.csv", "MSRVTT_train.7k.csv")):
        id = line["video_id"]
        yield Row(videos.path(id), id, captions.get(id, []), "train")
    for line in read_csv(files.need("MSRVTT_JSFUSION_test.csv")):
        yield Row(videos.path(line["video_id"]), line["video_id"], [line["sentence"]], "test")


def msrvtt_full(files: Files, videos: Videos) -> Iterator[Row]:
    """6,513 videos to train, 497 to validate, 2,990 to test, with all their captions."""
    one = files.find("MSRVTT_data.json")
    paths = (
        [one] if one else [files.need("train_val_videodatainfo.json"), files.need("test_videodatainfo.json")]
    )
    captions = _msrvtt_captions(paths)
    names = {"train": "train", "validate": "val", "test": "test"}
    for path in paths:
        for video in read_json(path)["videos"]:
            id = video["video_id"]
            split = names[video["split"]]
            yield Row(
                videos.path(id), id, captions.get(id, []), split, extra={"category": video.get("category")}
            )


def msrvtt_qa(files: Files, videos: Videos) -> Iterator[Row]:
    """A row a video, with all its questions."""
    for split, path in question_files(files):
        yield from rows_by_video(split, read_questions(path, "video"), lambda id: videos.path(id))


def _msrvtt_captions(paths: list[str]) -> dict[str, list[str]]:
    captions: dict[str, list[str]] = {}
    for path in paths:
        for sentence in read_json(path)["sentences"]:
            captions.setdefault(sentence["video_id"], []).append(sentence["caption"])
    return captions
