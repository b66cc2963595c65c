"""Who may ask, and how much of a body is taken."""

import json
from dataclasses import replace
from typing import Any

import pytest

from hbi.serving.auth import COOKIE, Bodies, Guard, Heads, session_of
from hbi.serving.refusal import Refused
from hbi.serving.settings import ServeSettings
from tests.support.asking import through

OPEN = ServeSettings(body_seconds=0.05, api_key="")
KEYED = replace(OPEN, api_key="k3y")


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Answers with the method, and how many bytes came."""
    count = 0
    try:
        while True:
            message = await receive()
            count += len(message.get("body", b""))
            if not message.get("more_body"):
                break
        status = 200
    except Refused as refused:
        status = refused.status
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": f"{scope['method']} {count}".encode()})


def test_a_key_is_asked_for_everywhere_but_at_the_page_and_health() -> None:
    app = Guard(echo, KEYED)
    for path in ("/", "/health", "/page/app.js", "/session"):
        assert through(app, "GET", path).status == 200, path
    for method, path in (("POST", "/search"), ("GET", "/media/a"), ("GET", "/docs"), ("DELETE", "/videos/a"),
                         ("GET", "/frames/a/0.jpg"), ("GET", "/openapi.json"), ("POST", "/videos"), ("POST", "/answer"),
                         ("POST", "/caption")):  # fmt: skip
        refused = through(app, method, path)
        assert (refused.status, refused.headers["www-authenticate"]) == (401, "Bearer"), path
        for wrong in ("Bearer k3", "Bearer ", "k3y", "Basic k3y", "Bearer k3y2", "Bearer \xff"):
            assert through(app, method, path, {"Authorization": wrong}).status == 401, wrong
        assert through(app, method, path, {"Authorization": "Bearer k3y"}).status == 200, path


def test_the_cookie_of_a_session_reads_and_does_not_write() -> None:
    app = Guard(echo, KEYED)
    cookie = {"Cookie": f"a=b; {COOKIE}={session_of('k3y')}"}
    assert through(app, "GET", "/media/a", cookie).status == 200
    assert through(app, "DELETE", "/videos/a", cookie).status == 401
    assert through(app, "GET", "/media/a", {"Cookie": f"{COOKIE}=k3y"}).status == 401


def test_names_of_other_hosts_and_pages_of_other_sites_are_refused() -> None:
    app = Guard(echo, OPEN)
    for host in ("localhost", "localhost:8000", "127.0.0.1:8000", "[::1]:8000"):
        assert through(app, "GET", "/health", {"Host": host}).status == 200, host
    for host in ("evil.example", "localhost.evil.example:8000", "127.0.0.1.evil.example", ""):
        assert through(app, "GET", "/health", {"Host": host}).status == 400, host
    allowed = Guard(echo, replace(OPEN, allowed_host=["search.example"]))
    assert through(allowed, "GET", "/health", {"Host": "search.example"}).status == 200
    for origin, status in (("http://localhost:8000", 200), ("http://evil.example", 403), ("null", 403)):
        sent = {"Host": "localhost:8000", "Origin": origin}
        assert through(app, "POST", "/videos", sent).status == status, origin


def test_read_only_refuses_to_write_and_answers_the_rest() -> None:
    app = Guard(echo, replace(OPEN, read_only=True))
    assert [through(app, *what).status for what in (("POST", "/videos"), ("DELETE", "/videos/a"))] == [
        403,
        403,
    ]
    assert [through(app, *what).status for what in (("POST", "/search"), ("GET", "/videos/a"))] == [200, 200]


def test_listening_for_others_needs_a_key() -> None:
    with pytest.raises(
        ValueError, match=r"--host 0.0.0.0: .*set a key in HBI_API_KEY, or listen on 127.0.0.1"
    ):
        ServeSettings(host="0.0.0.0", api_key="")
    assert "k3y" not in repr(ServeSettings(host="0.0.0.0", api_key="k3y"))
    assert ServeSettings(host="::1", api_key="").port == 8000


def test_large_bodies_are_413_whether_they_say_so_or_not() -> None:
    app = Bodies(echo, OPEN)
    json_kind, form_kind = (
        {"Content-Type": "application/json"},
        {"Content-Type": "multipart/form-data; boundary=x"},
    )
    assert through(app, "POST", "/search", json_kind | {"Content-Length": "99999999"}).status == 413
    assert through(app, "POST", "/search", json_kind, [b"x" * 40_000, b"x" * 40_000]).status == 413
    small = Bodies(echo, replace(OPEN, max_upload_mb=1))
    assert through(small, "POST", "/videos", form_kind, [b"x" * 700_000] * 2).status == 413
    assert through(small, "POST", "/videos", form_kind, [b"x" * 400_000] * 2).status == 200


def test_a_body_that_does_not_come_is_408() -> None:
    app = Bodies(echo, OPEN)
    answer = through(app, "POST", "/search", {"Content-Type": "application/json"}, [b'{"text"', None])
    assert answer.status == 408
    assert "did not come within 0.05 s" in answer.detail
    form = {"Content-Type": "multipart/form-data; boundary=x"}
    assert through(app, "POST", "/videos", form, [b"--x", None]).status == 408


@pytest.mark.parametrize("body", [b"{", b"\xff", b"[" * 30_000, b'{"a":' * 40 + b"1" + b"}" * 40, b"[1,]"])
def test_broken_and_deep_json_is_422(body: bytes) -> None:
    answer = through(Bodies(echo, OPEN), "POST", "/search", {"Content-Type": "application/json"}, [body])
    assert answer.status == 422
    assert "\n" not in json.loads(answer.body)["detail"]


def test_head_is_get_without_its_body() -> None:
    answer = through(Heads(echo), "HEAD", "/health")
    assert (answer.status, answer.body) == (200, b"")
    assert through(Heads(echo), "GET", "/health").body == b"GET 0"
