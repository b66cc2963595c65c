"""A request that is refused: the status and one line that says why."""

from collections.abc import Mapping


class Refused(Exception):
    """What a client is told; it travels from replicas to the front as it is."""

    def __init__(self, status: int, detail: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(status, detail, headers)
        self.status = status
        self.detail = detail
        self.headers = dict(headers or {})


def require_text(what: str, text: str, longest: int) -> str:
    """The text itself; 422 for half a character, for nothing but spaces, for more than `longest` characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Refused(422, f"{what}: holds half a character (a lone surrogate), which is no text") from None
    if not text.strip():
        raise Refused(422, f"{what}: is empty")
    if len(text) > longest:
        raise Refused(422, f"{what}: {len(text)} characters, at most {longest} are taken")
    if "\0" in text:
        raise Refused(422, f"{what}: holds a zero character")
    return text


def unknown(id: str) -> Refused:
    """404 for an id that is not in the index."""
    shown = id if len(id) <= 100 else id[:100] + "…"
    return Refused(404, f"no video {shown!r} in the index")
