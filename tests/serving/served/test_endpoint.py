"""The endpoint stays up, whoever comes and whatever is killed; what it says of itself."""

import os
import signal
import socket
import threading
import time
from pathlib import Path

import psutil
import pytest

from hbi.serving.index.table import ClipTable
from tests.support.asking import ask
from tests.support.page import TEXT

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


def test_half_sent_requests_do_not_keep_others_out(address: str) -> None:
    lines = []
    for _ in range(40):
        line = socket.create_connection(("127.0.0.1", int(address.rsplit(":", 1)[1])))
        line.sendall(b"POST /search HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
        line.sendall(b"Content-Length: 50\r\n\r\n{")
        lines.append(line)
    assert ask(address, "GET", "/health").status == 200
    assert ask(address, "POST", "/search", {"text": TEXT}).status == 200
    assert lines[0].recv(12) == b"HTTP/1.1 408"
    for line in lines:
        line.close()


def test_a_killed_replica_loses_no_request_and_no_add(chain: Path, address: str, index: str) -> None:
    source = str(chain / "corpus" / "videos" / "clip-000004.mp4")
    stop, statuses, added = threading.Event(), [], []

    def search() -> None:
        while not stop.is_set():
            statuses.append(ask(address, "POST", "/search", {"text": TEXT, "k": 3}).status)

    def add() -> None:
        for i in range(4):
            body = {"video": source, "id": f"kept-{i}"}
            if ask(address, "POST", "/videos", body).status == 201:
                added.append(f"kept-{i}")

    threads = [threading.Thread(target=search) for _ in range(4)] + [threading.Thread(target=add)]
    for thread in threads:
        thread.start()
    while len(statuses) < 8:
        time.sleep(0.02)
    replicas = [
        p for p in psutil.Process().children(recursive=True) if "Replica:hbi" in " ".join(p.cmdline())
    ]
    killed = [
        p for p in replicas if ":Replica" in " ".join(p.cmdline()) or "#Replica" in " ".join(p.cmdline())
    ]
    assert killed, [p.cmdline() for p in replicas]
    for process in killed:
        os.kill(process.pid, signal.SIGKILL)
    threads[-1].join(120)
    stop.set()
    for thread in threads:
        thread.join(60)
    assert set(statuses) == {200}
    held = {id for id, *_ in ClipTable.open(index).snapshot().ids()}
    assert len(added) == 4 and set(added) <= held
    for id in added:
        assert ask(address, "DELETE", f"/videos/{id}").status == 200


def test_the_page_the_schema_and_health(address: str) -> None:
    page = ask(address, "GET", "/")
    assert page.status == 200 and b'src="page/app.js"' in page.body
    assert b"//" not in page.body.replace(b"<!doctype html>", b"")  # nothing from elsewhere
    docs = ask(address, "GET", "/docs").body.decode()
    assert "https://" not in docs and ask(address, "GET", "/docs/swagger-ui-bundle.js").status == 200
    assert "/videos" in ask(address, "GET", "/openapi.json").json["paths"]
    health = ask(address, "GET", "/health").json
    assert health["status"] == "ok" and len(health["digest"]) == 64
    assert ask(address, "HEAD", "/health").body == b""
    picture = ask(address, "GET", "/frames/clip-000001/0.jpg")
    assert picture.body[:3] == b"\xff\xd8\xff"
