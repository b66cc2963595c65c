"""From shards to answers over HTTP: the contract, as a client tries it."""

import json
import os
import shutil
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psutil
import pytest
import torch

import hbi
from hbi.commands.search import BuildIndex, Search
from hbi.model.frames import from_jpegs
from hbi.model.weights import load_model
from hbi.pipelines.decoding.decoder import Decoder
from hbi.pipelines.sharding.settings import ShardSettings
from hbi.serving.encode import encode_video
from hbi.serving.engine import Engine
from hbi.serving.front import model_of, store_of
from hbi.serving.index.build import show
from hbi.serving.index.table import ClipTable
from hbi.serving.questions import Page
from hbi.serving.refusal import Refused
from hbi.serving.settings import IndexSettings
from tests.serving.conftest import CLIPS, make_model
from tests.support.asking import ask, form
from tests.support.clips import video
from tests.support.waiting import wait_for

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
TEXT = "the red square moves left"


# --- The index ------------------------------------------------------------------------------------------------------


def test_the_index_holds_every_clip_with_its_times_and_captions(chain: Path) -> None:
    snapshot = ClipTable.open(str(chain / "index")).snapshot()
    clips = snapshot.clips(list(snapshot.all_rows()))
    rows = [json.loads(line) for line in (chain / "corpus" / "manifest.jsonl").read_text().splitlines()]
    assert {clip.id: clip.captions for clip in clips} == {row["id"]: row["captions"] for row in rows}
    assert all(len(clip.timestamps) == 4 and clip.start == 0.0 < clip.end for clip in clips)
    assert all(len(snapshot.thumbnails(clip.id)) == 4 for clip in clips[:3])
    assert f"clips     {CLIPS} (" in show(str(chain / "index"))


def test_an_index_that_broke_off_does_only_what_is_missing(chain: Path, tmp_path: Path) -> None:
    index = str(shutil.copytree(chain / "index", tmp_path / "index"))
    table = ClipTable.open(index)
    gone = next(iter(sorted(table.parts())))
    lost = [c.id for c in table.snapshot().clips(list(table.snapshot().all_rows())) if c.part == gone]
    table.remove(lost)
    about = json.loads((tmp_path / "index" / "index.json").read_text())
    (tmp_path / "index" / "index.json").write_text(json.dumps(about | {"complete": False}))
    kept = {id: row for id, *_ in table.snapshot().ids() for row in [table.snapshot().row(id)]}
    BuildIndex(str(chain / "model"), str(chain / "shards"), index).run()
    again = ClipTable.open(index).snapshot()
    assert again.rows == CLIPS
    assert all(again.row(id) == row for id, row in kept.items()), "what was there was made again"
    version = again.version
    BuildIndex(str(chain / "model"), str(chain / "shards"), index).run()
    assert ClipTable.open(index).snapshot().version == version


def test_other_shards_need_add_and_their_ids_stay_apart(chain: Path, tmp_path: Path) -> None:
    from hbi.commands.corpora import Shard

    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "clip-000000.mp4").write_bytes(video(3))
    (tmp_path / "manifest.jsonl").write_text(json.dumps({"video": "more/clip-000000.mp4"}))  # its id is taken
    Shard(str(tmp_path / "manifest.jsonl"), str(tmp_path / "shards"), ShardSettings(frames=4, size=32)).run()
    index = str(shutil.copytree(chain / "index", tmp_path / "index"))
    with pytest.raises(ValueError, match="already the index of other shards: --add merges these into it"):
        BuildIndex(str(chain / "model"), str(tmp_path / "shards"), index).run()
    BuildIndex(str(chain / "model"), str(tmp_path / "shards"), index, IndexSettings(add=True)).run()
    snapshot = ClipTable.open(index).snapshot()
    assert snapshot.rows == CLIPS + 1
    assert snapshot.clip("clip-000000#2").video.endswith("more/clip-000000.mp4")
    assert snapshot.clip("clip-000000").video.endswith("corpus/videos/clip-000000.mp4")


def test_another_model_is_refused_to_index_and_to_answer(chain: Path, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", 1)
    with pytest.raises(ValueError, match="made by another model"):
        BuildIndex(other, str(chain / "shards"), str(chain / "index")).run()
    with pytest.raises(ValueError, match=r"not the model that made .*leave MODEL out to use the index's own"):
        model_of(str(chain / "index"), other)
    same = str(shutil.copytree(chain / "model", tmp_path / "same"))
    assert model_of(str(chain / "index"), same).folder == same


def test_a_store_that_is_gone_is_said_and_not_made(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    gone = f"sqlite:///{tmp_path}/gone/mlflow.db"
    with pytest.raises(ValueError, match="no such MLflow store: say where it is with --tracking"):
        store_of(None, gone)
    assert not (tmp_path / "gone").exists()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert store_of(None, gone) == "http://127.0.0.1:5000"
    assert store_of("http://127.0.0.1:5001", gone) == "http://127.0.0.1:5001"


def test_shards_of_another_size_are_refused(chain: Path, tmp_path: Path) -> None:
    from hbi.commands.corpora import Shard

    Shard(
        str(chain / "corpus" / "manifest.jsonl"), str(tmp_path / "shards"), ShardSettings(frames=4, size=48)
    ).run()
    with pytest.raises(ValueError, match=r"size 48, but the model takes 32"):
        BuildIndex(str(chain / "model"), str(tmp_path / "shards"), str(tmp_path / "index")).run()
    assert not (tmp_path / "index").exists()


def test_a_served_video_has_the_tokens_of_a_sharded_one(chain: Path) -> None:
    table = ClipTable.open(str(chain / "index"))
    snapshot = table.snapshot()
    model = load_model(str(chain / "model")).eval()
    with Decoder.of_settings(table.metadata.shards) as decoder:
        for clip in snapshot.clips(list(snapshot.all_rows())[:4]):
            decoded = decoder.decode(Path(clip.video).read_bytes())
            tokens, _ = encode_video(model, from_jpegs(decoded.jpegs)[None])
            _, kept, _ = snapshot.tokens([snapshot.row(clip.id)])
            assert decoded.timestamps == clip.timestamps
            # Batches of another size round differently in the last bit of float16.
            torch.testing.assert_close(tokens.tokens[0], torch.from_numpy(kept[0].copy()), atol=1e-3, rtol=0)


def test_the_command_line_finds_what_the_engine_finds(
    chain: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Search(str(chain / "index"), TEXT, 3).run()
    engine = Engine(str(chain / "model"), "", str(chain / "index"))
    expected = [found["id"] for found in engine.find(engine.encode([TEXT])[0], Page(3))["results"]]
    assert [line.split()[2] for line in capsys.readouterr().out.splitlines()] == expected
    with pytest.raises(ValueError, match="the sentence: is empty"):
        Search(str(chain / "index"), "  \n").run()


# --- Searching over HTTP --------------------------------------------------------------------------------------------


def test_search_over_http_is_the_search_of_the_engine(chain: Path, address: str) -> None:
    answer = ask(address, "POST", "/search", {"text": TEXT, "k": 5})
    engine = Engine(str(chain / "model"), "", str(chain / "index"))
    assert answer.status == 200
    expected = json.loads(json.dumps(engine.find(engine.encode([TEXT])[0], Page(5))))
    got = answer.json
    for found, wanted in zip(got["results"], expected["results"], strict=True):
        # A replica may have fewer threads, and its sums another last digit.
        assert found.pop("score") == pytest.approx(wanted.pop("score"), abs=1e-5)
    assert got == expected
    first = answer.json["results"][0]
    assert {"id", "score", "video", "start", "end", "moment", "captions"} <= set(first)
    assert first["start"] <= first["moment"][0] < first["moment"][1] <= first["end"]
    pages = [
        ask(address, "POST", "/search", {"text": TEXT, "k": 2, "offset": o}).json["results"] for o in (0, 2)
    ]
    assert [r["id"] for page in pages for r in page] == [r["id"] for r in answer.json["results"][:4]]


def test_reranking_scores_the_best_again_with_rebuilt_tokens(
    chain: Path, address: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = hbi.load(str(chain / "model"), device="cpu")
    text = model.text_tokens([TEXT])
    expected = {
        path.stem: model.model.rerank(text, model.video_tokens([str(path)])).item()
        for path in (chain / "corpus" / "videos").iterdir()
    }
    answer = ask(address, "POST", "/search", {"text": TEXT, "k": CLIPS, "rerank": True}).json["results"]
    assert {found["id"]: found["score"] for found in answer} == pytest.approx(expected, abs=2e-2)
    assert [found["score"] for found in answer] == sorted((f["score"] for f in answer), reverse=True)
    plain = ask(address, "POST", "/search", {"text": TEXT, "k": CLIPS}).json["results"]
    assert {f["id"]: f["score"] for f in plain} != pytest.approx(expected, abs=2e-2)
    page = ask(address, "POST", "/search", {"text": TEXT, "k": 3, "offset": 2, "rerank": True}).json
    assert [found["id"] for found in page["results"]] == [found["id"] for found in answer[2:5]]
    assert page["more"]
    refused = ask(address, "POST", "/search", {"like": "clip-000001", "rerank": True})
    assert (refused.status, "rerank: scores a sentence" in refused.detail) == (422, True)
    Search(str(chain / "index"), TEXT, 3, rerank=True).run()
    assert [line.split()[2] for line in capsys.readouterr().out.splitlines()] == [f["id"] for f in answer[:3]]
    # What lies behind the best that are scored again follows as it was.
    engine = Engine(str(chain / "model"), "", str(chain / "index"))
    monkeypatch.setattr("hbi.serving.engine.RERANKED", 4)
    sentence = engine.encode([TEXT])[0]
    found = [each["id"] for each in engine.find(sentence, Page(CLIPS, rerank=True))["results"]]
    first = [each["id"] for each in engine.find(sentence, Page(CLIPS))["results"]]
    assert set(found[:4]) == set(first[:4]) and found[4:] == first[4:]
    engine.model.model.reconstruction = None
    with pytest.raises(Refused, match="reconstructs nothing to rerank by: train one with"):
        engine.find(sentence, Page(3, rerank=True))


def test_filters_and_examples(address: str) -> None:
    answer = ask(address, "POST", "/search", {"text": TEXT, "k": 100, "filter": {"split": "test"}})
    splits = ask(address, "GET", "/health").json["splits"]
    assert len(answer.json["results"]) == splits["test"]
    assert {r["split"] for r in answer.json["results"]} == {"test"}
    alike = ask(address, "POST", "/search", {"like": "clip-000003", "k": 4}).json["results"]
    assert len(alike) == 4 and "clip-000003" not in {r["id"] for r in alike}


def test_a_video_as_the_question_finds_itself(chain: Path, address: str) -> None:
    content = (chain / "corpus" / "videos" / "clip-000005.mp4").read_bytes()
    answer = ask(address, "POST", "/search/video", form(("mine.mp4", content), k="2"))
    assert answer.json["results"][0]["id"] == "clip-000005"
    assert answer.json["results"][0]["score"] == pytest.approx(1.0, abs=2e-3)


def test_explain_tells_words_and_what_was_cut(chain: Path, address: str) -> None:
    why = ask(address, "POST", "/explain", {"text": "red unknownword", "id": "clip-000003"}).json
    assert why["words"] == ["[start]", "red", "unknownword", "[end]"]  # pieces of a word are one row
    assert [len(row) for row in why["interaction"]] == [4] * 4
    assert len(why["times"]) == 4 and why["note"] is None
    # The values are those of the command that explains a file, but for the frames' last bits in the index.
    shown = hbi.load(str(chain / "model")).explain(
        chain / "corpus" / "videos" / "clip-000003.mp4", "red unknownword"
    )
    assert why["word_values"] == pytest.approx(shown.word_values.tolist(), abs=2e-3)
    assert why["frame_values"] == pytest.approx(shown.frame_values.tolist(), abs=2e-3)
    assert why["word_values"][0] == why["word_values"][-1] == 0
    long = ask(address, "POST", "/search", {"text": "red square " * 5000, "k": 1})
    assert (long.status, long.json["note"]) == (
        200,
        "the sentence is longer than the model's 20 words and word pieces: its end was left out",
    )


@pytest.mark.parametrize(
    ("path", "body", "says"),
    [
        ("/search", {"text": ""}, "text: is empty"),
        ("/search", {"text": " \n\t "}, "text: is empty"),
        ("/search", {"text": "x", "k": 0}, "k: "),
        ("/search", {"text": "x", "k": 5000}, "at most 1000"),
        ("/search", {"text": "x", "offset": -1}, "offset: "),
        ("/search", {"text": 5}, "text: "),
        ("/search", {}, "either `text` or `like`"),
        ("/search", b'{"text": "half \\ud83d"}', "text"),
        ("/search", b"{", "not JSON"),
        ("/search", b"[" * 50_000, "nested too deeply"),
        ("/search", {"text": "x", "filter": {"a": {"b": 1}}}, "filter"),
        ("/videos", {"video": "x", "start": -1}, "start: "),
        ("/videos", {"id": "x"}, "video: "),
        ("/videos", b"null", ""),
    ],
)
def test_bad_requests_are_told_why_in_one_line(address: str, path: str, body: object, says: str) -> None:
    answer = ask(address, "POST", path, body)
    assert answer.status == 422
    assert says in answer.detail and "\n" not in answer.detail


def test_what_is_not_there_is_404(address: str) -> None:
    for method, path, body in (
        ("POST", "/explain", {"text": "x", "id": "nobody"}), ("POST", "/search", {"like": "nobody"}),
        ("GET", "/media/nobody", None), ("DELETE", "/videos/nobody", None), ("GET", "/frames/nobody/0.jpg", None),
        ("GET", "/frames/clip-000001/99.jpg", None), ("DELETE", "/videos/%ED%A0%80", None),
        ("GET", "/media/%ff", None), ("GET", "/nowhere", None), ("GET", "/page/..%2fapp.py", None),
    ):  # fmt: skip
        assert ask(address, method, path, body).status == 404, path


# --- Adding and removing --------------------------------------------------------------------------------------------


def test_a_path_inside_a_root_is_added_found_and_removed(chain: Path, address: str, index: str) -> None:
    source = str(chain / "corpus" / "videos" / "clip-000000.mp4")
    odd = "a new/one 🎬 'q' <b>"
    added = ask(address, "POST", "/videos", {"video": source, "id": odd, "captions": ["mine"]})
    assert (added.status, added.json["id"]) == (201, odd)

    def found() -> dict[str, Any]:
        results = ask(address, "POST", "/search", {"text": "red", "k": 100}).json["results"]
        return {result["id"]: result for result in results}

    # Another replica sees it a moment later.
    wait_for(lambda: odd in found(), 30, "the added clip is never found")
    results = found()
    assert results[odd]["score"] == pytest.approx(results["clip-000000"]["score"], abs=1e-3)
    assert results[odd]["captions"] == ["mine"]
    assert ClipTable.open(index).snapshot().clip(odd).source == os.path.realpath(
        source
    )  # for who comes later
    again = ask(address, "POST", "/videos", {"video": source, "id": odd})
    assert (again.status, "is in use" in again.detail) == (409, True)
    assert ask(address, "POST", "/videos", {"video": source, "id": odd, "replace": True}).status == 201
    wait_for(
        lambda: ask(address, "GET", f"/videos/{quote(odd)}").json["captions"] == [], 30, "the old one stays"
    )
    assert ask(address, "DELETE", f"/videos/{quote(odd)}").status == 200
    assert ask(address, "DELETE", f"/videos/{quote(odd)}").status == 404
    wait_for(lambda: ask(address, "GET", "/health").json["videos"] == CLIPS, 30, "the removed clip stays")


def test_two_clients_cannot_take_the_same_id(chain: Path, address: str) -> None:
    body = {"video": str(chain / "corpus" / "videos" / "clip-000001.mp4"), "id": "once"}
    with ThreadPoolExecutor(4) as pool:
        statuses = sorted(pool.map(lambda _: ask(address, "POST", "/videos", body).status, range(4)))
    assert statuses == [201, 409, 409, 409]
    assert ask(address, "DELETE", "/videos/once").status == 200


def test_what_lies_outside_the_roots_is_403(address: str, tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(video(1))
    for place in (
        str(tmp_path / "a.mp4"),
        "/etc/passwd",
        "http://127.0.0.1/a.mp4",
        "s3://bucket/a.mp4",
        "../a.mp4",
    ):
        assert ask(address, "POST", "/videos", {"video": place}).status == 403, place


def test_an_upload_is_kept_beside_the_table_and_goes_with_its_clip(address: str, index: str) -> None:
    content = video(2)
    sent = form(("my clip.mp4", content), captions=["one", "two"])
    assert ask(address, "POST", "/videos", sent).json["id"] == "my clip"
    clip = ClipTable.open(index).snapshot().clip("my clip")
    assert clip.captions == ["one", "two"] and clip.video == "my clip.mp4"
    assert Path(clip.source).parent == Path(index) / "uploads" and Path(clip.source).read_bytes() == content
    assert ask(address, "GET", "/media/my%20clip").body == content
    assert ask(address, "POST", "/videos", sent).status == 409
    assert len(list((Path(index) / "uploads").iterdir())) == 1
    assert ask(address, "DELETE", "/videos/my%20clip").status == 200
    assert not list((Path(index) / "uploads").iterdir())


def test_what_is_no_video_is_refused_and_not_kept(
    chain: Path, address: str, index: str, tmp_path: Path
) -> None:
    for name, content in (("a.mp4", b"hello"), ("b.mp4", b"\x89PNG\r\n\x1a\n" + b"\0" * 500), ("c.mp4", b""),
                          ("d.mp4", b"#EXTM3U\n/etc/passwd\n"), ("e.mp4", video(1)[:900])):  # fmt: skip
        assert ask(address, "POST", "/videos", form((name, content))).status == 422, name
    assert ask(address, "POST", "/videos", form(None, id="x")).status == 422
    assert ask(address, "POST", "/videos", ("text/plain", b"x")).status == 415
    assert ask(address, "POST", "/videos", ("multipart/form-data", b"x")).status == 422
    os.mkfifo(chain / "corpus" / "pipe.mp4")
    for name in ("pipe.mp4", "videos", "manifest.jsonl", "absent.mp4"):
        assert ask(address, "POST", "/videos", {"video": str(chain / "corpus" / name)}).status == 422, name
    assert not list((Path(index) / "uploads").glob("*"))
    wait_for(lambda: ask(address, "GET", "/health").json["videos"] == CLIPS, 30, "something was added")


# --- Playing --------------------------------------------------------------------------------------------------------


def test_media_by_ranges_and_tags(chain: Path, address: str) -> None:
    content = (chain / "corpus" / "videos" / "clip-000002.mp4").read_bytes()
    whole = ask(address, "GET", "/media/clip-000002")
    assert (whole.status, whole.body, whole.headers["content-type"]) == (200, content, "video/mp4")
    assert float(whole.headers["clip-start"]) == 0.0 < float(whole.headers["clip-end"])
    tag = whole.headers["etag"]
    part = ask(address, "GET", "/media/clip-000002", headers={"Range": "bytes=10-19"})
    assert (part.status, part.body) == (206, content[10:20])
    assert part.headers["content-range"] == f"bytes 10-19/{len(content)}"
    assert ask(address, "GET", "/media/clip-000002", headers={"Range": "bytes=-5"}).body == content[-5:]
    beyond = ask(address, "GET", "/media/clip-000002", headers={"Range": f"bytes={len(content)}-"})
    assert (beyond.status, beyond.headers["content-range"]) == (416, f"bytes */{len(content)}")
    assert ask(address, "GET", "/media/clip-000002", headers={"If-None-Match": tag}).status == 304
    stale = ask(address, "GET", "/media/clip-000002", headers={"Range": "bytes=0-1", "If-Range": '"other"'})
    assert (stale.status, stale.body) == (200, content)
    head = ask(address, "HEAD", "/media/clip-000002")
    assert (head.status, head.body, head.headers["content-length"]) == (200, b"", str(len(content)))


def test_a_source_that_became_a_link_out_of_the_roots_is_not_played(
    chain: Path, address: str, tmp_path: Path
) -> None:
    (tmp_path / "secret.mp4").write_bytes(b"secret")
    source = chain / "corpus" / "videos" / "clip-000007.mp4"
    kept = source.read_bytes()
    source.unlink()
    assert ask(address, "GET", "/media/clip-000007").status == 404
    source.symlink_to(tmp_path / "secret.mp4")
    assert ask(address, "GET", "/media/clip-000007").status == 403
    source.unlink()
    source.write_bytes(kept)


def test_clients_that_do_not_read_cost_no_memory(chain: Path, address: str, index: str) -> None:
    large = chain / "corpus" / "videos" / "clip-000006.mp4"
    kept = large.read_bytes()
    with large.open("ab") as stream:
        stream.truncate(300_000_000)
    before, lines = psutil.Process().memory_info().rss, []
    try:
        for _ in range(8):
            line = socket.create_connection(("127.0.0.1", int(address.rsplit(":", 1)[1])))
            line.sendall(b"GET /media/clip-000006 HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert line.recv(12) == b"HTTP/1.1 200"
            lines.append(line)
        assert ask(address, "GET", "/health").status == 200
        assert psutil.Process().memory_info().rss - before < 100_000_000
    finally:
        for line in lines:
            line.close()
        large.write_bytes(kept)


# --- Staying up -----------------------------------------------------------------------------------------------------


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
