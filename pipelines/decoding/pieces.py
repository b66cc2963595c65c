"""A video elsewhere, read a piece at a time: what a clip does not need is not fetched.

The decode worker has no network. It asks its parent for pieces, and the parent fetches them from storage.
"""

import io
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

BLOCK_BYTES = 1 << 18
"""What is asked for at least; pieces begin and end at multiples of it."""
MOST_BYTES = 1 << 20
"""What is asked for at most: whoever reads on and on gets twice as much each time, up to this."""
KEPT_BYTES = 32 << 20
"""So much of what was read last is kept: an index is read twice."""


class WholeWanted(Exception):
    """Pieces are not enough: the message says why the whole file is wanted."""


@dataclass(frozen=True)
class RemoteVideo:
    """A video that storage gives in pieces."""

    uri: str
    """Where it lies."""
    size: int
    """Its bytes."""
    read: Callable[[int, int], bytes]
    """A piece of it, by its first byte and its length."""


class Pieces:
    """A video of which pieces are fetched; several streams may read it.

    key: what changes when the video does. fetch: (first byte, length) to bytes.
    """

    def __init__(self, key: tuple[object, ...], size: int, fetch: Callable[[int, int], bytes]) -> None:
        self.key, self.size, self._fetch = key, size, fetch
        self._blocks: OrderedDict[int, bytes] = OrderedDict()
        self._next, self._length = -1, BLOCK_BYTES

    def block(self, number: int) -> bytes:
        """A block, fetched with those that follow it where reading goes on and on."""
        if number not in self._blocks:
            self._length = min(2 * self._length, MOST_BYTES) if number == self._next else BLOCK_BYTES
            begin = number * BLOCK_BYTES
            content = self._fetch(begin, min(self._length, self.size - begin))
            for place in range(0, len(content), BLOCK_BYTES):
                self._blocks[(begin + place) // BLOCK_BYTES] = content[place : place + BLOCK_BYTES]
            self._next = (begin + self._length) // BLOCK_BYTES
            while len(self._blocks) * BLOCK_BYTES > KEPT_BYTES:
                self._blocks.popitem(last=False)
        self._blocks.move_to_end(number)
        return self._blocks[number]

    def stream(self) -> io.BufferedIOBase:
        """The video as a file to read."""
        return _Stream(self)


class Seekable(io.BufferedIOBase):
    """A file of a known size that is read from a place: what such files have beside `read`."""

    def __init__(self, size: int) -> None:
        self.size, self.place = size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.place

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.place, io.SEEK_END: self.size}[whence]
        self.place = max(0, base + offset)
        return self.place


class _Stream(Seekable):
    def __init__(self, pieces: Pieces) -> None:
        super().__init__(pieces.size)
        self.pieces = pieces

    def read(self, length: int | None = -1, /) -> bytes:
        """So many bytes, fewer only at the end of the file."""
        left = self.size - self.place
        left = max(0, left if length is None or length < 0 else min(length, left))
        parts = []
        while left:
            number, offset = divmod(self.place, BLOCK_BYTES)
            part = self.pieces.block(number)[offset : offset + left]
            parts.append(part)
            self.place += len(part)
            left -= len(part)
        return b"".join(parts)
