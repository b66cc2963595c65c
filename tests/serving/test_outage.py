"""An index in object storage whose server fails for a while: said, waited for by nobody, and nothing is lost."""

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError

from hbi.model.folder import model_digest
from hbi.serving.app import build_api
from hbi.serving.deploy import Backend, Writer, to_stream
from hbi.serving.engine import Engine
from hbi.serving.front import model_of
from hbi.serving.index import table as table_module
from hbi.serving.index.rows import IndexUnavailable
from hbi.serving.index.table import ClipTable, IndexMetadata
from hbi.serving.operations import Front
from hbi.serving.settings import ServeSettings
from tests.serving.conftest import TOWERS, make_model
from tests.support.asking import Answer, form, through
from tests.support.clips import video
from tests.support.s3 import Fault, ObjectStorage, object_storage
from tests.support.waiting import wait_for

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


CUT = {"frames": 4, "size": 32, "choice": "uniform", "fps": 1.0, "jpeg_quality": 95, "decoder": "pyav"}
SEARCH = b'{"text": "red", "k": 100}'


class Here(Backend):
    """A replica and the writer in this process: the application as it is, without Ray between its parts."""

    def __init__(self, model: str, index: str) -> None:
        super().__init__(None, self, 60.0)
        self.engine = Engine(model, "", index)
        self.writer = Writer(index)
        self.after_writing: Any = lambda: None

    def __getattr__(self, method: str) -> Any:
        """A method of the writer, as its handle has it."""

        async def remote(*args: Any) -> Any:
            answer = await getattr(self.writer, method)(*args)
            if answer[0] == 200:
                self.after_writing()
            return answer

        return SimpleNamespace(remote=remote)

    async def ask(self, whom: str, method: str, *args: Any, patience: float = 1.0) -> Any:
        if whom == "writer":
            return await super().ask(whom, method, *args, patience=patience)
        if method == "find":
            args = (self.engine.encode([args[0]])[0], *args[1:])
        found = await asyncio.to_thread(getattr(self.engine, method), *args)
        return to_stream(found) if method == "rows" else found


class Site:
    """The application on an index in object storage."""

    def __init__(self, remote: ObjectStorage, model: str) -> None:
        self.remote = remote
        self.index = remote.uri("index")
        self.backend = Here(model, self.index)
        heads = model_of(self.index, model).heads
        self.app = build_api(Front(self.backend, ClipTable.open(self.index), ServeSettings(), heads))

    def ask(self, method: str, path: str, body: bytes = b"", kind: str = "application/json") -> Answer:
        return through(self.app, method, path, {"Content-Type": kind}, (body,))

    def upload(self, id: str, **fields: str) -> Answer:
        kind, body = form(("a.mp4", video(3)), id=id, **fields)
        return self.ask("POST", "/videos", body, kind)

    def fail(self, kind: str = "503") -> None:
        self.remote.faults[:] = [
            Fault(kind, method=m, times=10**9) for m in ("GET", "HEAD", "PUT", "POST", "DELETE")
        ]

    def recover(self) -> None:
        """Ends the outage; what was found out a moment ago is still said for a second."""
        self.remote.faults.clear()
        for each in (("POST", "/search", SEARCH), ("GET", "/health", b"")):
            wait_for(lambda each=each: self.ask(*each).status == 200, 5, f"{each[1]} does not come back")

    @property
    def uploads(self) -> list[Path]:
        return list(self.remote.path("index/uploads").glob("*"))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    with object_storage(tmp_path / "s3") as remote:
        remote.use(monkeypatch)
        monkeypatch.setitem(table_module.PATIENCE, "client_max_retries", "0")
        model = make_model(tmp_path / "model", 0)
        ClipTable.create(remote.uri("index"), IndexMetadata(model, model_digest(model), "", CUT, TOWERS.dim))
        yield Site(remote, model)


def test_an_outage_is_503_and_over_when_it_is_over(site: Site) -> None:
    assert site.upload("kept").status == 201
    search = ("POST", "/search", SEARCH)
    for kind in ("503", "drop"):
        site.fail(kind)
        table = site.backend.engine.table
        said: list[str] = []

        def look(table: ClipTable = table, said: list[str] = said) -> None:
            with pytest.raises(IndexUnavailable) as error:
                table.snapshot()
            said.append(str(error.value))

        waiting = [threading.Thread(target=look) for _ in range(8)]
        for thread in waiting:
            thread.start()
        for thread in waiting:
            thread.join()
        # Whoever waits beside another has that one's answer: at most one more look than one.
        assert len(said) == 8 and len(set(said)) <= 2
        asked = (("GET", "/health"), ("GET", "/media/kept"), ("DELETE", "/videos/kept"))
        for answer in (site.ask(*search), *(site.ask(*each) for each in asked), site.upload("other")):
            assert (answer.status, "\n" in answer.detail) == (503, False)
            assert int(answer.headers["retry-after"]) > 0
        site.recover()
        found = site.ask(*search).json["results"]
        assert "kept" in {each["id"] for each in found} and "other" not in {each["id"] for each in found}
        assert site.ask("GET", "/media/kept").body == video(3) and len(site.uploads) == 1


def test_what_was_added_stays_added_when_the_outage_begins_behind_it(site: Site) -> None:
    site.backend.after_writing = site.fail
    assert site.upload("added").status == 201
    site.recover()
    assert site.ask("GET", "/media/added").body == video(3)
    assert site.upload("added", replace="true").status == 201  # the file of the one before is left
    site.recover()
    assert site.ask("GET", "/media/added").status == 200
    assert site.ask("DELETE", "/videos/added").status == 200
    site.recover()
    assert site.ask("GET", "/media/added").status == 404


def test_a_writer_that_dies_behind_its_commit_is_asked_again_and_has_done_it(site: Site) -> None:
    def die() -> None:
        site.backend.after_writing = lambda: None
        raise RayActorError

    site.backend.after_writing = die
    assert site.upload("kept").status == 201
    site.backend.after_writing = die
    answer = site.ask("DELETE", "/videos/kept")
    assert (answer.status, answer.json) == (200, {"id": "kept", "videos": 0})
    assert site.uploads == []
    assert site.ask("DELETE", "/videos/kept").status == 404


def test_a_replica_started_anew_on_the_index_of_another_model_says_so(site: Site, tmp_path: Path) -> None:
    site.backend.engine = Engine(make_model(tmp_path / "other", 1), "", site.index)
    for answer in (site.ask("POST", "/search", SEARCH), site.upload("new")):
        assert answer.status == 503
        assert (
            answer.detail
            == f"{site.index}: another model made the index that lies there now: start `hbi serve` anew"
        )
    assert site.uploads == []


def test_a_server_that_accepts_and_says_nothing_is_an_outage_too(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert site.upload("kept").status == 201
    site.fail("hang")
    time.sleep(1.0)  # until what was seen is old
    with monkeypatch.context() as patch:
        patch.setattr(table_module, "LOOK_SECONDS", 0.2)
        for answer in (site.ask("POST", "/search", SEARCH), site.ask("GET", "/health"), site.upload("other")):
            assert (answer.status, "does not answer within 0.2 s" in answer.detail) == (503, True)
    site.recover()
    assert site.ask("GET", "/media/kept").status == 200 and len(site.uploads) == 1
