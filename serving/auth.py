"""Who may ask, and how much: host names, the key, read-only, and bounds on bodies. Plain ASGI, around the application.

Guard     Host and Origin, Authorization, read-only
Bodies    how large a body may be (413), how long a client may pause (408), JSON that is none or too deep (422)
Heads     HEAD where there is GET
"""

import asyncio
import hashlib
import hmac
import json
import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from hbi.serving.refusal import Refused
from hbi.serving.settings import ServeSettings, is_loopback

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

COOKIE = "hbi_session"
OPEN = ("/", "/health", "/session")
"""What needs no key; `/session` checks it itself."""
JSON_BYTES = 64 * 1024
"""Largest body that is not a form with a file."""
FORM_OVERHEAD = 256 * 1024
"""What a form may hold beside its file."""


class Guard:
    """Lets in who may come in."""

    def __init__(self, app: App, settings: ServeSettings) -> None:
        self.app = app
        self.settings = settings
        self.hosts = {"localhost", "127.0.0.1", "::1", settings.host.strip("[]").lower()}
        self.hosts |= {host.lower() for host in settings.allowed_host}
        if not is_loopback(settings.host) and not settings.allowed_host:
            self.hosts.add("*")  # reached under names that nobody can foresee; the key guards it

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {
            name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]
        }
        try:
            self.check(scope["method"], scope["path"].removeprefix(scope.get("root_path", "")), headers)
        except Refused as refused:
            await answer(send, refused)
            return
        await self.app(scope, receive, send)

    def check(self, method: str, path: str, headers: dict[str, str]) -> None:
        """Refused: 400 for another host, 401 without the key, 403 for another site's page or if read-only."""
        host = headers.get("host", "")
        name = re.sub(r":\d*$", "", host).strip("[]").lower()
        if "*" not in self.hosts and name not in self.hosts:
            raise Refused(400, f"Host {host!r}: not a name of this server (--allowed-host NAME adds one)")
        reads = method in ("GET", "HEAD")
        origin = headers.get("origin")
        if not reads and origin is not None and origin.split("://")[-1].lower() != host.lower():
            raise Refused(403, f"Origin {origin!r}: pages of another site may not write here")
        if not (path in OPEN or path.startswith("/page/")) and not self.known(headers, reads):
            raise Refused(
                401, "send the server's key: `Authorization: Bearer KEY`", {"WWW-Authenticate": "Bearer"}
            )
        writes = (method == "POST" and path == "/videos") or method == "DELETE"
        if writes and self.settings.read_only:
            raise Refused(403, "this server is read-only: videos are neither added nor removed")

    def known(self, headers: dict[str, str], reads: bool) -> bool:
        """Whether a request carries the key, or, where it only reads, the cookie that `/session` gave for it."""
        if not self.settings.api_key:
            return True
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and same(given.strip(), self.settings.api_key):
            return True
        cookies = [part.strip() for part in headers.get("cookie", "").split(";")]
        session = f"{COOKIE}={session_of(self.settings.api_key)}"
        return reads and any(same(cookie, session) for cookie in cookies)


def session_of(key: str) -> str:
    """What the cookie holds: a browser's <video> can send no header. Not the key itself."""
    return hmac.new(key.encode(), b"hbi session", hashlib.sha256).hexdigest()


def same(given: str, expected: str) -> bool:
    """Compares in a time that says nothing about where they differ."""
    return hmac.compare_digest(given.encode("utf-8", "surrogatepass"), expected.encode())


class Bodies:
    """Bounds what clients send. JSON is read before the application sees the request; forms as they are read."""

    def __init__(self, app: App, settings: ServeSettings) -> None:
        self.app = app
        self.settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        form = headers.get(b"content-type", b"").lower().startswith(b"multipart/form-data")
        most = self.settings.max_upload_bytes + FORM_OVERHEAD if form else JSON_BYTES
        bounded = self.bounded(receive, most)
        try:
            declared = headers.get(b"content-length", b"0")
            if declared.isdigit() and int(declared) > most:
                raise Refused(413, f"the body has {int(declared)} bytes, at most {most} are taken")
            if not form and scope["method"] in ("POST", "PUT", "PATCH", "DELETE"):
                body = await whole(bounded)
                if headers.get(b"content-type", b"").lower().startswith(b"application/json"):
                    require_json(body)
                bounded = replayed(body, receive)
        except Refused as refused:
            # The rest of the body is not read: the connection cannot be used again.
            await answer(send, Refused(refused.status, refused.detail, {"Connection": "close"}))
            return
        await self.app(scope, bounded, send)

    def bounded(self, receive: Receive, most: int) -> Receive:
        """`receive` that raises Refused for a body that is too large or does not come."""
        seen, ended = 0, False

        async def bounded() -> Message:
            nonlocal seen, ended
            if ended:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), self.settings.body_seconds)
            except TimeoutError:
                raise Refused(408, f"the body did not come within {self.settings.body_seconds:g} s") from None
            seen += len(message.get("body", b""))
            ended = not message.get("more_body", False)
            if seen > most:
                raise Refused(413, f"the body has more than {most} bytes, which is all that is taken")
            return message

        return bounded


async def whole(receive: Receive) -> bytes:
    """The body; Refused with 400 where the client went away half-way."""
    parts = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Refused(400, "the client went away")
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


def replayed(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body once, and then what comes."""
    sent = False

    async def replay() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def require_json(body: bytes) -> None:
    """422 for what is no JSON, or nested deeper than anything that is asked for here."""
    if not body:
        return
    try:
        content = json.loads(body)
    except RecursionError:
        raise Refused(422, "the body: JSON that is nested too deeply") from None
    except ValueError as error:
        raise Refused(422, f"the body is not JSON: {str(error)[:200]}") from None
    if _depth(content) > 16:
        raise Refused(422, "the body: JSON that is nested too deeply")


def _depth(content: Any) -> int:
    deepest, level = 0, [content]
    while level:
        deepest += 1
        level = [
            child
            for item in level
            if isinstance(item, dict | list)
            for child in (item.values() if isinstance(item, dict) else item)
        ]
    return deepest


class Heads:
    """Answers HEAD as GET without its body."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self.app(scope, receive, send)
            return

        async def without_body(message: Message) -> None:
            if message["type"] == "http.response.body":
                message = dict(message) | {"body": b""}
            await send(message)

        await self.app(dict(scope) | {"method": "GET", "hbi.head": True}, receive, without_body)


async def answer(send: Send, refused: Refused) -> None:
    """The refusal as an HTTP answer."""
    body = json.dumps({"detail": refused.detail}).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body))} | refused.headers
    raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refused.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
