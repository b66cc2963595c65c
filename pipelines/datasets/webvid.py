"""WebVid: videos of the web, a caption each."""

from collections.abc import Iterator

from hbi.infra import storage
from hbi.pipelines.datasets.files import Files, Videos, read_csv
from hbi.pipelines.manifest import Row


def webvid(files: Files, videos: Videos) -> Iterator[Row]:
    """One caption a video; columns videoid, contentUrl, duration, page_dir, name. Videos lie in `<page_dir>/`."""
    names = [(f"results_{size}_{split}.csv", split) for size in ("2M", "10M") for split in ("train", "val")]
    found = [(path, split) for name, split in names if (path := files.find(name))]
    if not found:
        files.need(*(name for name, _ in names))
    for path, split in found:
        for line in read_csv(path):
            id = line["videoid"]
            place = videos.known(id)
            if place is None:
                videos.missing.add(id)
                place = storage.join(videos.folder, line["page_dir"], f"{id}.mp4")
            yield Row(place, id, [line["name"]], split)
