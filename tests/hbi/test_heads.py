"""`hbi answer`, `hbi caption`, `hbi classify`: what they print is what the model says, and bad input is one line."""

from pathlib import Path

import pytest
import torch

import hbi
from hbi.model.config import AnswerConfig, CaptionConfig, ModelConfig, TowerConfig
from hbi.model.hbi import HBI
from hbi.model.tokenizer import train_tokenizer
from hbi.model.weights import save_model
from tests.support.commands import run
from tests.support.videos import make

TOWERS = TowerConfig(
    image_size=32, patch_size=16, vision_width=32, vision_layers=1, vision_heads=2, text_width=32, text_layers=1,
    text_heads=2, vocab_size=300, context=32, dim=32,
)  # fmt: skip
QUESTION = "what moves left?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with both heads, one without, and a video."""
    folder = tmp_path_factory.mktemp("heads")
    tokenizer = train_tokenizer(["the red square moves left"] * 4, 300)
    torch.manual_seed(0)
    config = ModelConfig(towers=TOWERS, words=20, frames=4, temporal_layers=1)
    save_model(HBI(config), folder / "bare", tokenizer)
    heads = {"answers": AnswerConfig("open", 3), "captions": CaptionConfig(layers=1, words=8)}
    model = HBI(ModelConfig(towers=TOWERS, words=20, frames=4, temporal_layers=1, **heads))
    model.vocabulary = ("red", "blue", "a square")
    save_model(model, folder / "model", tokenizer)
    (folder / "one.mp4").write_bytes(make(12))
    (folder / "text.mp4").write_text("hello")
    (folder / "empty.mp4").write_bytes(b"")
    return folder


def test_an_answer_a_caption_and_labels(folder: Path, capsys, monkeypatch) -> None:
    name, video = str(folder / "model"), str(folder / "one.mp4")
    model = hbi.load(name)
    best, *_ = model.rank_answers(video, QUESTION)
    assert run(capsys, monkeypatch, "answer", name, video, QUESTION) == (0, f"{best[0]}\n", "")
    _, out, _ = run(
        capsys, monkeypatch, "answer", name, video, QUESTION, "-k", "3", "--answers", "a ball", "none"
    )
    ranked = model.rank_answers(video, QUESTION, ["a ball", "none"])
    assert out == "".join(f"{share:6.3f}  {answer}\n" for answer, share in ranked)
    [caption] = model.caption([video])
    assert run(capsys, monkeypatch, "caption", name, video)[1] == f"{caption}\n"
    assert run(capsys, monkeypatch, "caption", name, video, video)[1] == f"{video}: {caption}\n" * 2
    _, out, _ = run(capsys, monkeypatch, "classify", name, video, "--labels", "red", "blue")
    assert out == "".join(
        f"{share:6.3f}  {label}\n" for label, share in model.classify(video, ["red", "blue"])
    )


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (["answer", "bare", "one.mp4", QUESTION], "answers no questions: train one with --set.task qa"),
        (["caption", "bare", "one.mp4"], "writes no captions: train one with --set.task caption"),
        (["answer", "model", "one.mp4", " "], "question"),
        (["answer", "model", "one.mp4", "what " * 40], "question"),
        (["answer", "model", "one.mp4", QUESTION, "--answers", "red"], "answers"),
        (["answer", "model", "one.mp4", QUESTION, "--answers", "red", "red"], "red"),
        (["answer", "model", "one.mp4", QUESTION, "-k", "0"], "-k 0: must be at least 1"),
        (["answer", "model", "none.mp4", QUESTION], "none.mp4"),
        (["answer", "model", "one.mp4", QUESTION, "--answers", "red", " "], "answers: one is empty"),
        (["answer", "model", "text.mp4", QUESTION], "text.mp4: gives no frames (not a video but"),
        (["caption", "model", "empty.mp4"], "empty.mp4: gives no frames ("),
        (["classify", "model", "one.mp4", "--labels"], "labels: [] has 0"),
        (["classify", "model", "one.mp4", "--labels", "red", "red"], "labels: 'red' is there more than once"),
        (["caption", "model"], "VIDEO"),
    ],
)
def test_bad_input_is_one_line(line: list[str], expected: str, folder: Path, capsys, monkeypatch) -> None:
    names = {"bare", "model", "one.mp4", "none.mp4", "text.mp4", "empty.mp4"}
    args = [str(folder / word) if word in names else word for word in line]
    status, out, err = run(capsys, monkeypatch, *args)
    assert status != 0 and not out and expected in err and "Traceback" not in err
    assert len(err.strip().splitlines()) == 1, err
