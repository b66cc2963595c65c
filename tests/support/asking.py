"""HTTP as a client sees it, and an ASGI application without a network."""

import asyncio
import http.client
import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Answer:
    """What came back."""

    status: int
    headers: dict[str, str]
    """Names in small letters."""
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def detail(self) -> str:
        return self.json["detail"]


def ask(
    address: str, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None
) -> Answer:
    """One request on a connection of its own. body: bytes, a `(content type, bytes)` pair, or a value for JSON."""
    kind, data = "application/json", body
    if isinstance(body, tuple):
        kind, data = body
    elif body is not None and not isinstance(body, bytes):
        data = json.dumps(body).encode()
    sent = ({"Content-Type": kind} if data is not None else {}) | dict(headers or {})
    place = urlsplit(address)
    connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=120)
    try:
        connection.request(method, path, data, sent)
        answer = connection.getresponse()
        known = {name.lower(): value for name, value in answer.getheaders()}
        return Answer(answer.status, known, answer.read())
    finally:
        connection.close()


def form(file: tuple[str, bytes] | None, **fields: str | Sequence[str]) -> tuple[str, bytes]:
    """A multipart form: content type and body."""
    mark = uuid.uuid4().hex
    parts = []
    for name, values in fields.items():
        head = f'--{mark}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n'
        parts += [
            f"{head}{value}\r\n".encode() for value in ([values] if isinstance(values, str) else values)
        ]
    if file is not None:
        head = f'--{mark}\r\nContent-Disposition: form-data; name="file"; filename="{file[0]}"\r\n\r\n'
        parts.append(head.encode("utf-8", "surrogateescape") + file[1] + b"\r\n")
    return f"multipart/form-data; boundary={mark}", b"".join(parts) + f"--{mark}--\r\n".encode()


def through(
    app: Any,
    method: str,
    path: str,
    headers: Mapping[str, str] | None = None,
    chunks: Sequence[bytes | None] = (b"",),
) -> Answer:
    """One request straight into an ASGI application. chunks: the body; None: the client sends no more, and waits."""
    waiting = list(chunks)
    started: dict[str, Any] = {}
    content = bytearray()

    async def receive() -> dict[str, Any]:
        if not waiting or waiting[0] is None:
            await asyncio.Event().wait()
        part = waiting.pop(0)
        return {"type": "http.request", "body": part, "more_body": bool(waiting)}

    async def send(message: Mapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            started.update(message)
        else:
            content.extend(message.get("body", b""))

    known = {"host": "localhost"} | {name.lower(): value for name, value in (headers or {}).items()}
    scope = {
        "type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": b"",
        "root_path": "", "scheme": "http", "http_version": "1.1", "client": ("localhost", 1),
        "server": ("localhost", 1),
        "headers": [(name.encode(), value.encode("latin-1")) for name, value in known.items()],
    }  # fmt: skip
    asyncio.run(app(scope, receive, send))
    given = {name.decode().lower(): value.decode("latin-1") for name, value in started["headers"]}
    return Answer(started["status"], given, bytes(content))
