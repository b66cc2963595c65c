"""VATEX: ten English captions a video."""

from collections.abc import Iterator

from hbi.pipelines.datasets.files import SPLITS, Files, Videos, read_json, read_words
from hbi.pipelines.manifest import Row


def vatex(files: Files, videos: Videos) -> Iterator[Row]:
    """Ten English captions a video; `{train,val,test}_list.txt`, where there, decide the splits."""
    names = {
        "train": ("vatex_training_v1.0.json",),
        "val": ("vatex_validation_v1.0.json",),
        "test": ("vatex_public_test_english_v1.1.json", "vatex_public_test_english_v1.0.json"),
    }
    if not any(files.find(*some) for some in names.values()):
        files.need(*names["train"])
    lists = {split: path for split in SPLITS if (path := files.find(f"{split}_list.txt"))}
    listed = {id: split for split, path in lists.items() for id in read_words(path)}
    for split, some in names.items():
        if path := files.find(*some):
            for video in read_json(path):
                id = video["videoID"]
                if listed and id not in listed:
                    continue
                # <youtube id>_<start>_<end>: whole videos, too, can be used.
                whole, start, end = id.rsplit("_", 2)
                cut = videos.known(id) is None and videos.known(whole) is not None
                times = (float(start), float(end)) if cut else (None, None)
                yield Row(videos.path(id, whole), id, list(video["enCap"]), listed.get(id, split), *times)
