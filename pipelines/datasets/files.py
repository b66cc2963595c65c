"""The files that a dataset is published as, and the videos that they speak of."""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hbi.infra import storage
from hbi.pipelines.manifest import VIDEO_NAME

SPLITS = ("train", "val", "test")


class Files:
    """A folder of annotation files, found by name at any depth. One of the files stands for its folder."""

    def __init__(self, folder: str) -> None:
        self.folder = storage.absolute(folder)
        one = storage.exists(self.folder) if storage.is_remote(folder) else Path(self.folder).is_file()
        self.folder = storage.parent(self.folder) if one else self.folder
        paths = storage.list_files(self.folder, recursive=not one)
        self.paths = {path.rsplit("/", 1)[-1]: path for path in paths}

    def find(self, *names: str) -> str | None:
        """The path of the first of the names that is there."""
        return next((self.paths[name] for name in names if name in self.paths), None)

    def need(self, *names: str) -> str:
        """Likewise; ValueError if none is there."""
        found = self.find(*names)
        if found is None:
            raise ValueError(
                f"{self.folder}: no {' or '.join(names)} in it, which this dataset is published with"
            )
        return found

    def splits(self, pattern: str) -> list[tuple[str, str]]:
        """(split, path) of the files named by a pattern with `{}` for train, val and test; at least one."""
        found = [(split, path) for split in SPLITS if (path := self.find(pattern.format(split)))]
        if not found:
            self.need(pattern.format("train"))
        return found


class Videos:
    """The videos below a folder, found by what they are called, whatever their extension or folder."""

    def __init__(self, folder: str) -> None:
        self.folder = storage.absolute(folder)
        self.by_name: dict[str, str] = {}
        self.missing: set[str] = set()
        for path in storage.list_files(self.folder, recursive=True):
            name = path.rsplit("/", 1)[-1]
            self.by_name.setdefault(VIDEO_NAME.sub("", name), path)

    def known(self, *names: str) -> str | None:
        """The path of the first of the names for which there is a video."""
        # "a.avi" may be there as a.avi.mp4, or as a.mp4.
        for name in (*names, *(VIDEO_NAME.sub("", name) for name in names)):
            if name in self.by_name:
                return self.by_name[name]
        return None

    def path(self, *names: str) -> str:
        """Likewise. A video that is not there gets the path where it should be: its clips will be failures."""
        found = self.known(*names)
        if found is None:
            self.missing.add(names[0])
            return storage.join(self.folder, names[0] if VIDEO_NAME.search(names[0]) else f"{names[0]}.mp4")
        return found


# --- Reading them ----------------------------------------------------------------------------------------------------


def _bytes_text(content: bytes) -> str:
    """UTF-8, or what some of the older files are written in."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("cp1252", "replace")


def read_lines(path: str) -> Iterator[str]:
    """Lines that are not empty."""
    with storage.open_file(path) as stream:
        for line in stream:
            if text := _bytes_text(line).strip("\r\n"):
                yield text


def read_words(path: str) -> list[str]:
    return [line.strip() for line in read_lines(path) if line.strip()]


def read_json(path: str) -> Any:
    try:
        return json.loads(_bytes_text(storage.read_bytes(path)))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None


def read_csv(path: str) -> Iterator[dict[str, str]]:
    with io.TextIOWrapper(storage.open_file(path), "utf-8-sig", errors="replace", newline="") as stream:
        yield from csv.DictReader(stream)
