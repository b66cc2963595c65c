"""Any folder of videos, without annotations."""

import os
from collections import Counter

from hbi.infra import storage
from hbi.pipelines.manifest import VIDEO_NAME, Row, write_manifest


def folder_manifest(folder: str, out: str) -> int:
    """Writes a manifest of all videos below a folder, local or `s3://`, without captions; how many there are.

    Videos are the files with a video's extension and those without any; the id is the path below the folder, without
    its extension where that leaves it unique. ValueError if there are none.
    """
    folder = storage.absolute(folder)
    files = [path for path in storage.list_files(folder, recursive=True) if _looks_like_video(path)]
    if not files:
        raise ValueError(f"{folder}: no videos in it (*.mp4, *.mkv, *.webm, *.avi, *.mov and their like)")
    below = [path[len(folder.rstrip("/")) + 1 :] for path in files]
    bare = [os.path.splitext(path)[0] for path in below]  # noqa: PTH122 (any bytes that a name may hold)
    uses = Counter(bare)
    ids = (name if uses[name] == 1 else path for name, path in zip(bare, below, strict=True))
    return write_manifest((Row(path, id) for path, id in zip(files, ids, strict=True)), out)


def _looks_like_video(path: str) -> bool:
    name = path.rsplit("/", 1)[-1]
    return bool(VIDEO_NAME.search(name)) or "." not in name
