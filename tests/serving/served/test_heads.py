"""Questions and captions over HTTP: what the model says, and what is said of wrong requests."""

import shutil
import tempfile
from pathlib import Path

import pytest

import hbi
from hbi.model.frames import from_jpegs
from hbi.pipelines.decoding.decoder import Decoder
from hbi.serving.app import build_api
from hbi.serving.deploy import Backend
from hbi.serving.index.table import ClipTable
from hbi.serving.model import Video
from hbi.serving.operations import Front
from hbi.serving.settings import ServeSettings
from tests.serving.conftest import KNOWN
from tests.support.asking import ask, form, through

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
CLIP = "clip-000003"
QUESTION = "what moves left?"


@pytest.fixture
def video(chain: Path) -> Path:
    return chain / "corpus" / "videos" / f"{CLIP}.mp4"


@pytest.fixture
def frames(chain: Path, video: Path) -> Video:
    """As the model saw the clip when the index was made."""
    with Decoder.of_settings(ClipTable.open(str(chain / "index")).metadata.shards) as decoder:
        return from_jpegs(decoder.decode(video).jpegs)


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The front's temporary folder, which no other process of tests writes to."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("answers", [None, ["a star", "a ball", "nothing"]])
def test_a_question_is_answered_as_the_model_does(
    chain: Path, address: str, video: Path, frames: Video, temporary: Path, answers: list[str] | None
) -> None:
    ranked = hbi.load(str(chain / "model"), device="cpu").rank_answers(frames, QUESTION, answers)
    body = {"id": CLIP, "question": QUESTION} | ({"answers": answers} if answers else {})
    fields = {"question": QUESTION} | ({"answers": answers} if answers else {})
    for name, sent in ((CLIP, body), ("mine.mp4", form(("mine.mp4", video.read_bytes()), **fields))):
        answer = ask(address, "POST", "/answer", sent)
        assert answer.status == 200, answer.body
        assert set(answer.json) == {"id", "question", "answers"}
        assert (answer.json["id"], answer.json["question"]) == (name, QUESTION)
        assert [each["answer"] for each in answer.json["answers"]] == [name for name, _ in ranked]
        scores = [each["score"] for each in answer.json["answers"]]
        assert scores == pytest.approx([score for _, score in ranked], abs=1e-5)
    assert {name for name, _ in ranked} == set(answers or KNOWN)
    assert not list(temporary.glob("hbi-*.video"))  # uploads


def test_a_caption_is_the_models(chain: Path, address: str, video: Path, frames: Video) -> None:
    [written] = hbi.load(str(chain / "model"), device="cpu").caption([frames])
    assert ask(address, "POST", "/caption", {"id": CLIP}).json == {"id": CLIP, "caption": written}
    sent = form(("mine.mp4", video.read_bytes()))
    assert ask(address, "POST", "/caption", sent).json == {"id": "mine.mp4", "caption": written}


def test_health_says_what_the_model_does(address: str) -> None:
    assert ask(address, "GET", "/health").json["heads"] == ["qa", "caption"]


@pytest.mark.parametrize(
    ("path", "body", "status", "says"),
    [
        ("/answer", {"id": CLIP, "question": " "}, 422, "question: is empty"),
        ("/answer", {"id": CLIP}, 422, "question: Field required"),
        ("/answer", {"question": "what?"}, 422, "id: Field required"),
        ("/answer", {"id": CLIP, "question": "red " * 40}, 422, "tokens, the model reads 20: give a shorter one"),
        ("/answer", {"id": CLIP, "question": "what?", "answers": ["a"]}, 422, "has 1, give at least 2"),
        ("/answer", {"id": CLIP, "question": "what?", "answers": []}, 422, "has 0, give at least 2"),
        ("/answer", {"id": CLIP, "question": "what?", "answers": ["a", "a"]}, 422, "'a' is there more than once"),
        ("/answer", {"id": CLIP, "question": "what?", "answers": ["a", " "]}, 422, "answers: is empty"),
        ("/answer", {"id": CLIP, "question": "what?", "answers": "a"}, 422, "answers: "),
        ("/answer", {"id": CLIP, "question": "what?", "k": 1}, 422, "k: "),
        ("/answer", {"id": "nobody", "question": "what?"}, 404, "no video 'nobody'"),
        ("/answer", form(("a.mp4", b"hello"), question="what?"), 422, "not a video but"),
        ("/answer", form(None, question="what?"), 422, "needs a `file`"),
        ("/answer", ("text/plain", b"what?"), 415, "send application/json"),
        ("/caption", {"id": "nobody"}, 404, "no video 'nobody'"),
        ("/caption", {}, 422, "id: Field required"),
        ("/caption", form(("a.mp4", b"hello")), 422, "not a video but"),
        ("/caption", ("text/plain", b"what?"), 415, "send application/json"),
    ],
)  # fmt: skip
def test_bad_requests_are_told_why_in_one_line(
    address: str, path: str, body: object, status: int, says: str
) -> None:
    answer = ask(address, "POST", path, body)
    assert (answer.status, "\n" in answer.detail) == (status, False), answer.body
    assert says in answer.detail


def test_a_video_that_is_gone_or_outside_the_roots_is_said_to_be(
    address: str, video: Path, tmp_path: Path
) -> None:
    kept = shutil.move(video, tmp_path / "kept.mp4")
    try:
        gone = ask(address, "POST", "/caption", {"id": CLIP})
        video.symlink_to(kept)
        outside = ask(address, "POST", "/caption", {"id": CLIP})
    finally:
        video.unlink(missing_ok=True)
        shutil.move(kept, video)
    assert (gone.status, gone.detail) == (404, "the source video is not there any more")
    assert (outside.status, "it lies in no --media-root" in outside.detail) == (403, True)


def test_a_model_without_heads_says_so_before_it_looks_at_anything(chain: Path) -> None:
    settings = ServeSettings(api_key="")
    front = Front(Backend(None, None, 1.0), ClipTable.open(str(chain / "index")), settings)
    api = build_api(front)
    asked = {"content-type": "application/json"}
    for path, says in (("/answer", "answers no questions: train one with --set.task qa"),
                       ("/caption", "writes no captions: train one with --set.task caption")):  # fmt: skip
        refused = through(api, "POST", path, asked, (b'{"id": "nobody"}',))
        assert (refused.status, refused.detail) == (409, f"this model {says}")
    assert through(api, "GET", "/health").json["heads"] == []
