"""A file of JSON lines that are still to be sent, in order: it outlives the process that wrote them."""

import json
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

BATCH_LINES = 200
"""Lines handed out at once."""

Event = dict[str, Any]


class Outbox:
    """One file, `<run>.jsonl`, and a folder beside it for pictures. What an earlier process left comes first.

    Not sent is whatever lies behind `sent`, a place in the file that only this process knows: a new process starts at
    0, so an event may be sent twice and never not at all. When all is sent the file is emptied.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.files = path, path.with_suffix(".files")
        self.sent = 0
        path.parent.mkdir(parents=True, exist_ok=True)
        content = path.read_bytes() if path.exists() else b""
        self.waiting = content.count(b"\n")
        if content and not content.endswith(b"\n"):  # its writer was killed in the middle of a line
            with path.open("ab") as stream:
                stream.write(b"\n")
            self.waiting += 1

    def write(self, events: Iterable[Event]) -> None:
        """Adds events. They are in the file (not merely in this process) when this returns; OSError on a full disk."""
        lines = [json.dumps(event).encode() + b"\n" for event in events]
        if lines:
            with self.path.open("ab") as stream:
                stream.write(b"".join(lines))
            self.waiting += len(lines)

    def batches(self) -> Iterator[list[Event]]:
        """The events in order, some at a time; asking for the next batch says that the last one is sent."""
        while self.waiting:
            with self.path.open("rb") as stream:
                stream.seek(self.sent)
                lines = [line for line, _ in zip(stream, range(BATCH_LINES), strict=False)]
            if not lines:
                raise OSError(f"{self.path}: {self.waiting} records are gone: someone else wrote to it")
            yield [event for line in lines if (event := _parse(line)) is not None]
            self.sent += sum(map(len, lines))
            self.waiting -= len(lines)
            if not self.waiting:
                self.path.write_bytes(b"")
                self.sent = 0

    def keep_file(self, name: str, content: bytes) -> Path:
        """Keeps a file of that name for an event to point at; `forget_file` removes it."""
        folder = self.files / str(time.time_ns())
        folder.mkdir(parents=True)
        file = folder / name
        file.write_bytes(content)
        return file

    def forget_file(self, file: Path) -> None:
        """Removes a kept file; one that is gone is fine."""
        if self.files in file.parents:
            shutil.rmtree(file.parent, ignore_errors=True)

    def close(self) -> None:
        """Leaves nothing behind when nothing waits."""
        if not self.waiting:
            self.path.unlink(missing_ok=True)
            shutil.rmtree(self.files, ignore_errors=True)


def _parse(line: bytes) -> Event | None:
    """An event, or None for half a line."""
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) else None
