"""MSVD: 1,970 videos, about forty captions each."""

import io
import pickle
from collections.abc import Iterator
from typing import Any

from hbi.infra import storage
from hbi.pipelines.datasets.files import Files, Videos, read_lines, read_words
from hbi.pipelines.datasets.questions import question_files, read_questions, rows_by_video
from hbi.pipelines.manifest import Row


def msvd(files: Files, videos: Videos) -> Iterator[Row]:
    """1,200, 100 and 670 videos with all their captions (about 40 each)."""
    pickled = files.find("raw-captions.pkl")
    captions = _msvd_pickle(pickled) if pickled else _msvd_text(files.need("AllVideoDescriptions.txt"))
    names = _names(files)
    for split, path in files.splits("{}_list.txt"):
        for id in read_words(path):
            yield Row(videos.path(id, names.get(id, id)), id, captions.get(id, []), split)


def msvd_qa(files: Files, videos: Videos) -> Iterator[Row]:
    """Likewise; videos are called vid<number>, or as on YouTube (`youtube_mapping.txt`)."""
    names = _names(files)
    for split, path in question_files(files):
        yield from rows_by_video(
            split, read_questions(path, "vid"), lambda id: videos.path(id, names.get(id, id))
        )


class _Plain(pickle.Unpickler):
    """Reads pickles of lists, dicts and strings; whatever else they name is refused, so nothing is run."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it holds a {module}.{name}, not only text")


def _msvd_pickle(path: str) -> dict[str, list[str]]:
    """{id: [[word, …], …]}"""
    try:
        content = _Plain(io.BytesIO(storage.read_bytes(path)), encoding="utf-8").load()
        return {
            str(id): [text if isinstance(text, str) else " ".join(text) for text in texts]
            for id, texts in content.items()
        }
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{path}: not MSVD's captions ({error})") from None


def _msvd_text(path: str) -> dict[str, list[str]]:
    """Lines `<youtube id>_<start>_<end> <caption>`, after comments that begin with `#`."""
    captions: dict[str, list[str]] = {}
    for line in read_lines(path):
        id, _, caption = line.partition(" ")
        if caption and not line.startswith("#"):
            captions.setdefault(id, []).append(caption.strip())
    return captions


def _names(files: Files) -> dict[str, str]:
    """{youtube name: vid<number>} and back, from `youtube_mapping.txt`; empty without it."""
    path = files.find("youtube_mapping.txt")
    pairs = [line.split() for line in read_lines(path)] if path else []
    return {a: b for pair in pairs if len(pair) == 2 for a, b in (pair, pair[::-1])}
