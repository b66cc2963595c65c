"""DiDeMo: moments described, a paragraph a video."""

from collections.abc import Iterator

from hbi.pipelines.datasets.files import Files, Videos, read_json, read_words
from hbi.pipelines.manifest import VIDEO_NAME, Row


def didemo(files: Files, videos: Videos) -> Iterator[Row]:
    """A video's descriptions as one paragraph, in the order of the file; the annotated part is its beginning."""
    for split, path in files.splits("{}_data.json"):
        wanted = files.find(f"{split}_list.txt")
        keep = set(read_words(wanted)) if wanted else None
        texts: dict[str, list[str]] = {}
        for moment in read_json(path):
            texts.setdefault(moment["video"], []).append(moment["description"])
        for id, descriptions in texts.items():
            if keep is None or id in keep or VIDEO_NAME.sub("", id) in keep:
                # Annotators saw the first 30 s; the published protocol ends at 31.
                yield Row(videos.path(id), id, [" ".join(descriptions)], split, 0.0, 31.0)
