"""Searching and explaining over HTTP: the contract, as a client tries it."""

import json
from pathlib import Path

import pytest

import hbi
from hbi.commands.search import Search
from hbi.serving.engine import Engine
from hbi.serving.questions import Page
from hbi.serving.refusal import Refused
from tests.serving.conftest import CLIPS
from tests.support.asking import ask, form
from tests.support.page import TEXT

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


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
    assert why["frame_values"] == pytest.approx(shown.frame_values.tolist(), abs=5e-3)
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
