"""What a file is, by its bytes: no decoder sees a playlist, and a broken file gets a reason for people."""

from collections.abc import Iterator
from typing import BinaryIO

PLAYLISTS = {
    b"#EXTM3U": "an HLS playlist",
    b"ffconcat": "an ffconcat script",
    b"<MPD": "a DASH manifest",
    b"v=0\n": "an SDP session",
    b"v=0\r\n": "an SDP session",
    b"[playlist]": "a PLS playlist",
    b"<ASX": "an ASX playlist",
    b"[Reference]": "an ASF redirector",
}
KNOWN = (
    b"\x1aE\xdf\xa3",
    b"RIFF",
    b"FLV",
    b"OggS",
    b"GIF8",
    b"\0\0\1",
    b"\0\0\0\1",
    b"0&\xb2u",
    b"\xff\xd8\xff",
)
"""How video files begin: Matroska, AVI, FLV, Ogg, GIF, MPEG, H.264 and HEVC, ASF, MJPEG."""
NOT_VIDEOS = {
    b"%PDF": "a PDF document",
    b"PK\x03\x04": "a ZIP archive",
    b"\x1f\x8b": "a gzip archive",
    b"7z\xbc\xaf": "a 7z archive",
    b"Rar!": "a RAR archive",
    b"\x7fELF": "a program",
    b"MZ": "a program",
    b"#!": "a script",
    b"\x80\x02": "a Python pickle",
}


def refusal(head: bytes, size: int) -> str | None:
    """Why a file of `size` bytes that begins with `head` is no video; None if it may be one."""
    if size == 0:
        return "the file is empty"
    lowered = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    xml = lowered.startswith((b"<?xml", b"<svg"))
    for start, what in PLAYLISTS.items():
        if lowered.startswith(start.lower()) or (start == b"<MPD" and xml and b"<mpd" in lowered):
            return f"not a video but {what}: playlists are never followed"
    if lowered.startswith((b"<!doctype html", b"<html")) or (b"<html" in lowered and b"\0" not in head):
        return "not a video but an HTML page (an error page saved by a downloader?)"
    if xml:
        return "not a video but an XML document"
    for start, what in NOT_VIDEOS.items():
        if head.startswith(start):
            return f"not a video but {what}"
    if not head.strip(b"\0") and size <= len(head):
        return f"not a video: the file is {size} zero byte{'s' * (size > 1)}"
    if b"\0" not in head and _is_text(head) and not head.startswith((b"YUV4MPEG2", b"GIF8")):
        return "not a video but a text file"
    return None


def begins_as_video(head: bytes) -> bool:
    """Whether a file's first bytes are those of a video format."""
    boxes = head[4:8] in (b"ftyp", b"moov", b"mdat", b"free", b"wide", b"skip")
    transport = head[:1] == b"G" and head[188:189] in (b"G", b"")
    return boxes or transport or head.startswith(KNOWN)


def _is_text(head: bytes) -> bool:
    control = sum(byte < 32 and byte not in b"\t\n\r\f\x1b" for byte in head)
    try:
        head.decode()
    except UnicodeDecodeError as error:
        if error.start < len(head) - 4:  # else: only the last character is cut
            return False
    return control == 0


def why_unreadable(source: BinaryIO, head: bytes, size: int, said: str) -> str:
    """Why FFmpeg could not open a file, in more words than what it `said`."""
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"free", b"wide", b"skip"):
        # The index (moov) says where the frames are.
        for kind, place, length in boxes(source, size):
            if place + length > size:
                return f"an incomplete mp4 file: it breaks off after {size} bytes"
            if kind == b"moov":
                return f"a damaged mp4 file: its index (moov) cannot be read ({said})"
        return "an incomplete mp4 file: its index (moov) is missing"
    if any(head.startswith(magic) for magic in KNOWN) or head[188:189] == b"G":
        return f"a damaged or incomplete video file: nothing in it can be read ({said})"
    return f"not a video: its first bytes are of no known video format ({said})"


def is_truncated(source: BinaryIO, head: bytes, size: int) -> bool:
    """Whether a file of `size` bytes says itself that it was longer.

    By an mp4 box, a RIFF list, a Matroska segment, a tag of FLV, a part of an MPEG-TS packet, a GIF without its end.
    """
    if head[:4] == b"RIFF":
        # Sizes are even; some writers leave 0, and files beyond 2 GiB go on in further lists.
        stated = int.from_bytes(head[4:8], "little")
        return stated > 0 and size < stated + 8
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"free", b"wide", b"skip"):
        found = list(boxes(source, size))  # of a fragment's two, the second may be all that is missing
        beyond = any(place + length > size for _, place, length in found)
        return beyond or bool(found and found[-1][0] == b"moof")
    if head.startswith(b"FLV"):
        return _flv_breaks_off(source, size)
    if head.startswith(b"GIF8"):
        source.seek(max(0, size - 64))
        return not source.read().rstrip(b"\0\r\n").endswith(b";")
    for packet, sync in ((188, 0), (192, 4), (204, 0)):
        if head[sync::packet][:16] == b"G" * 16:
            return size % packet > 0
    if head.startswith(b"\x1aE\xdf\xa3"):
        place = _after_element(head, 0)
        if place is not None and head[place : place + 4] == b"\x18S\x80g":
            end = _after_element(head, place)
            return end is not None and end > size
    return False


def boxes(source: BinaryIO, size: int) -> Iterator[tuple[bytes, int, int]]:
    """Top-level boxes of an mp4 file: kind, first byte, length (0 stands for the rest of the file)."""
    place = 0
    while place + 8 <= size:
        source.seek(place)
        box = source.read(16)
        length = int.from_bytes(box[:4])
        length = int.from_bytes(box[8:16]) if length == 1 else length or size - place
        if length < 8:
            return
        yield box[4:8], place, length
        place += length


def _flv_breaks_off(source: BinaryIO, size: int) -> bool:
    """Whether a tag of an FLV file ends beyond it."""
    source.seek(5)
    place = int.from_bytes(source.read(4)) + 4
    while place < size:
        source.seek(place)
        tag = source.read(4)
        if len(tag) == 4 and tag[0] & 31 not in (8, 9, 18):  # sound, pictures, what is said of them
            return False
        place += 15 + int.from_bytes(tag[1:])
    return place > size


def _after_element(head: bytes, place: int) -> int | None:
    """Where the EBML element at `place` ends; None where its length is not known, as in a live stream."""
    if place + 12 > len(head) or not head[place]:
        return None
    begin = place + 9 - head[place].bit_length()  # after its id
    if begin >= len(head) or not head[begin]:
        return None
    width = 9 - head[begin].bit_length()
    stated = int.from_bytes(head[begin : begin + width]) & (1 << 7 * width) - 1
    return None if stated == (1 << 7 * width) - 1 else begin + width + stated
