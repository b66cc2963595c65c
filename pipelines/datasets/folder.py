"""Any folder of videos, without annotations."""

import os
import unicodedata
from collections import Counter

from hbi.infra import storage
from hbi.pipelines.decoding.filetype import begins_as_video
from hbi.pipelines.manifest import VIDEO_NAME, Row, write_manifest


def folder_manifest(folder: str, out: str) -> int:
    """Writes a manifest of all videos below a folder, local or `s3://`, without captions; how many there are.

    Videos are the files with a video's extension, and those without any that begin as videos do; what lies in a hidden
    folder is none. The id is the path below the folder, without its extension where that leaves it unique, whatever
    becomes of case and of composed letters later. ValueError if there are none.
    """
    folder = storage.absolute(folder)
    start = len(folder.rstrip("/")) + 1
    files = [path for path in storage.list_files(folder, recursive=True) if _is_video(path, path[start:])]
    if not files:
        raise ValueError(f"{folder}: no videos in it (*.mp4, *.mkv, *.webm, *.avi, *.mov and their like)")
    below = [path[start:] for path in files]
    bare = [os.path.splitext(path)[0] for path in below]  # noqa: PTH122 (any bytes that a name may hold)
    uses = Counter(
        map(_folded, [*bare, *(path for path, name in zip(below, bare, strict=True) if path != name)])
    )
    ids = (name if uses[_folded(name)] == 1 else path for name, path in zip(bare, below, strict=True))
    return write_manifest((Row(path, id) for path, id in zip(files, ids, strict=True)), out)


def _folded(name: str) -> str:
    """What two names have in common that some file system, or a careless reader, takes for one."""
    return unicodedata.normalize("NFC", name).casefold()


def _is_video(path: str, below: str) -> bool:
    *folders, name = below.split("/")
    if any(folder.startswith(".") for folder in folders):
        return False
    if "." in name:
        return bool(VIDEO_NAME.search(name))
    with storage.open_file(path) as stream:
        return begins_as_video(stream.read(4096))
