"""A model as people use it: what its numbers are, on paths and sentences, and what it says of wrong ones."""

import warnings
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import hbi
from hbi.model.coalitions import FRAME_PRESENCE, importance
from hbi.model.config import (
    AnswerConfig,
    CaptionConfig,
    FrameSettings,
    ModelConfig,
    ReconstructionConfig,
    TowerConfig,
)
from hbi.model.hbi import HBI
from hbi.model.tokenizer import caption_marks, tokenize, train_tokenizer
from hbi.model.weights import save_model
from hbi.pipelines.decoding.decoder import Decoder
from hbi.serving.model import Model, words_of
from tests.support.videos import make

WORDS, FRAMES, SIZE = 20, 4, 32
TEXTS = ["the red square moves left", "blue"]
TOWERS = TowerConfig(
    image_size=SIZE, patch_size=16, vision_width=32, vision_layers=1, vision_heads=2, text_width=32, text_layers=1,
    text_heads=2, vocab_size=300, context=32, dim=32,
)  # fmt: skip
KNOWN = ("red", "blue", "green square")


def built(**heads: Any) -> HBI:
    torch.manual_seed(0)
    config = ModelConfig(towers=TOWERS, words=WORDS, frames=FRAMES, temporal_layers=1, **heads)
    model = HBI(config).eval()
    if config.answers.head != "none":
        model.vocabulary = KNOWN
    return model


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(["the red square moves left then the blue star grows"] * 4, 300)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """One with more frames than the model takes, one with fewer."""
    folder = tmp_path_factory.mktemp("videos")
    for name, frames in (("long.mp4", 30), ("short.mp4", 3)):
        (folder / name).write_bytes(make(frames))
    return [str(folder / "long.mp4"), str(folder / "short.mp4")]


@pytest.fixture(scope="module")
def plain(tokenizer: Any) -> Model:
    """Without heads."""
    return Model(built(), tokenizer, "cpu")


@pytest.fixture(scope="module")
def full(tokenizer: Any) -> Model:
    """With heads for captions and for answers of any list, and with reconstruction."""
    heads = {"answers": AnswerConfig(head="open"), "captions": CaptionConfig(layers=1, words=8)}
    return Model(built(**heads, reconstruction=ReconstructionConfig(form="similarity")), tokenizer, "cpu")


@pytest.fixture(scope="module")
def closed(tokenizer: Any) -> Model:
    """With the published head: a fixed list of answers."""
    return Model(built(answers=AnswerConfig(head="published", vocabulary=len(KNOWN))), tokenizer, "cpu")


def frames_of(path: str) -> torch.Tensor:
    with Decoder(FrameSettings(FRAMES, SIZE)) as decoder:
        return torch.from_numpy(np.stack(decoder.decode(Path(path)).frames))[None]


@torch.no_grad()
def test_similarity_is_the_models_own_of_each_pair(plain: Model, videos: list[str]) -> None:
    found = plain.similarity(TEXTS, videos)
    assert found.shape == (2, 2) and found.dtype == np.float32
    for row, text in enumerate(TEXTS):
        for column, video in enumerate(videos):
            ids, mask = tokenize(plain.tokenizer, [text], WORDS)
            frames = frames_of(video)
            one = plain.model.similarities(ids, mask, frames, torch.ones(frames.shape[:2]))["entity"]
            assert found[row, column] == pytest.approx(one.item(), abs=1e-5)


def test_vectors_are_weighted_sums_of_unit_tokens(plain: Model, videos: list[str]) -> None:
    for vectors, tokens in (
        (plain.encode_text(TEXTS), plain.text_tokens(TEXTS)),
        (plain.encode_video(videos), plain.video_tokens(videos)),
    ):
        assert vectors.shape == (2, TOWERS.dim)
        for vector, row, weights, mask in zip(
            vectors, tokens.tokens, tokens.weights(), tokens.mask, strict=True
        ):
            unit = [token / token.norm() for token in row[mask]]
            by_hand = sum(w * t for w, t in zip(weights[mask], unit, strict=True))
            np.testing.assert_allclose(vector, by_hand, atol=1e-5)
    assert plain.video_tokens(videos).mask.sum(1).tolist() == [4, 3]


def test_batches_have_no_say(plain: Model, videos: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    texts, clips = [*TEXTS, "a star"], [*videos, videos[0]]
    whole = plain.encode_text(texts), plain.encode_video(clips)
    monkeypatch.setattr("hbi.serving.model.BATCH", 2)
    for one, other in zip(whole, (plain.encode_text(texts), plain.encode_video(clips)), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_frames_serve_as_a_video(plain: Model, videos: list[str]) -> None:
    frames = frames_of(videos[0])[0].numpy()
    np.testing.assert_allclose(plain.encode_video([frames]), plain.encode_video(videos[:1]), atol=1e-6)
    many = np.zeros((11, SIZE, SIZE, 3), np.uint8)
    many[[0, 3, 6, 10]] = frames  # the four of eleven that are chosen
    np.testing.assert_allclose(plain.encode_video([many]), plain.encode_video(videos[:1]), atol=1e-6)


def value_of_frame(model: Model, text: str, frames: np.ndarray, own: int) -> float:
    """What a frame adds to the others, each there with `FRAME_PRESENCE`; a clip of no frames scores 0."""
    ids, mask = tokenize(model.tokenizer, [text], WORDS)
    ids, mask = ids[:, : mask.sum()], mask[:, : mask.sum()]
    words = model.model.text_levels(model.model.encode_text(ids, mask)[0], mask)["entity"]

    def score(there: list[int]) -> float:
        if not there:
            return 0.0
        seen = torch.tensor([[frame in there for frame in range(len(frames))]])
        tokens = model.model.encode_video(torch.from_numpy(frames)[None], seen)
        return float(model.model.similarity(words, model.model.video_levels(tokens, seen)["entity"]))

    value, others = 0.0, [frame for frame in range(len(frames)) if frame != own]
    for size in range(len(others) + 1):
        for chosen in combinations(others, size):
            chance = FRAME_PRESENCE**size * (1 - FRAME_PRESENCE) ** (len(others) - size)
            value += chance * (score([*chosen, own]) - score(list(chosen)))
    return value


@torch.no_grad()
def test_an_explanation_is_of_the_game_on_what_goes_in(full: Model, videos: list[str]) -> None:
    found = full.explain(videos[1], "red ball")
    assert found.words[0] == "[start]" and found.words[-1] == "[end]"
    assert found.words[1:-1] == ["red", "ball"]  # one of several pieces
    assert found.times == [0.0, 0.1, 0.2] and found.frames.shape == (3, SIZE, SIZE, 3)
    assert found.word_values.shape == (4,) and not found.word_values[[0, -1]].any()
    # The last frame's value, by its definition: all coalitions of the other two, with both words there.
    assert found.frame_values[2] == pytest.approx(value_of_frame(full, "red ball", found.frames, 2), abs=1e-5)
    ids, mask = tokenize(full.tokenizer, ["red ball"], WORDS)
    ids = ids[0, : int(mask.sum())]
    _, of_token = words_of(full.tokenizer, ids.tolist())
    numbers = torch.tensor([word - 1 if 0 < word < 3 else -1 for word in of_token])
    alone = full.model.encode_frames(torch.from_numpy(found.frames)[None])[0]
    expected = importance(full.model, ids, numbers, alone)
    np.testing.assert_allclose(found.interaction[1:-1], expected.interaction, atol=1e-6)
    assert not found.interaction[[0, -1]].any()


def test_labels_are_ranked_by_their_sentences(plain: Model, videos: list[str]) -> None:
    ranked = plain.classify(videos[0], ["red", "blue", "star"], "a {} thing")
    scores = plain.similarity(["a red thing", "a blue thing", "a star thing"], videos[:1])[:, 0]
    logits = torch.from_numpy(scores) * plain.model.logit_scale.exp().item()
    expected = dict(zip(["red", "blue", "star"], logits.softmax(0).tolist(), strict=True))
    assert dict(ranked) == pytest.approx(expected, abs=1e-5)
    assert [share for _, share in ranked] == sorted(expected.values(), reverse=True)


def test_siglips_labels_are_judged_one_by_one(tokenizer: Any, videos: list[str]) -> None:
    torch.manual_seed(0)
    towers = TowerConfig(**{**vars(TOWERS), "family": "siglip"})
    siglip = Model(HBI(ModelConfig(towers=towers, words=WORDS, frames=FRAMES)), tokenizer, "cpu")
    bias = siglip.model.logit_bias
    assert bias is not None
    with torch.no_grad():
        bias.fill_(-0.7)
        siglip.model.logit_scale.fill_(1.0)
    [(_, alone)] = siglip.classify(videos[0], ["red"])
    logit = siglip.similarity(["red"], videos[:1])[0, 0] * np.e - 0.7
    assert alone == pytest.approx(1 / (1 + np.exp(-logit)), abs=1e-5)
    assert dict(siglip.classify(videos[0], ["blue", "red"]))["red"] == pytest.approx(alone, abs=1e-6)


def test_captions_are_the_decoders(full: Model, videos: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def words(frames: Any, mask: torch.Tensor, marks: Any, settings: Any) -> list[list[int]]:
        asked.append((marks, settings.beam, mask.sum(1).tolist()))
        return [full.tokenizer("a red star", add_special_tokens=False)["input_ids"]] * len(mask)

    assert len(full.caption(videos)) == 2  # for what it is: random weights
    monkeypatch.setattr(full.model, "write_captions", words)
    assert full.caption(videos, beam=2) == ["a red star"] * 2
    assert asked == [(caption_marks(full.tokenizer), 2, [4, 3])]


@torch.no_grad()
def test_answers_of_any_list_are_ranked(full: Model, videos: list[str]) -> None:
    ids, mask = tokenize(full.tokenizer, ["what moves left?"], WORDS)
    frames, there = frames_of(videos[0]), torch.ones(1, FRAMES)
    encoded = full.model.encode_video(frames, there)
    for names in (list(KNOWN), ["a star", "a ball"]):
        ranked = full.rank_answers(videos[0], "what moves left?", None if names == list(KNOWN) else names)
        candidates = tokenize(full.tokenizer, names, WORDS)
        shares = full.model.answer_logits(ids, mask, encoded, there, candidates)[0].softmax(0)
        assert dict(ranked) == pytest.approx(dict(zip(names, shares.tolist(), strict=True)), abs=1e-5)
        assert ranked[0][1] == max(share for _, share in ranked)
    assert full.answer(videos[0], "what moves left?", ["a star", "a ball"]) == ranked[0][0]


def test_a_closed_list_can_be_narrowed_and_not_left(closed: Model, videos: list[str]) -> None:
    everything = closed.rank_answers(videos[0], "what?")
    assert {name for name, _ in everything} == set(KNOWN)
    two = closed.rank_answers(videos[0], "what?", ["blue", "red"])
    total = sum(share for name, share in everything if name in ("blue", "red"))
    assert dict(two) == pytest.approx(
        {name: p / total for name, p in everything if name != KNOWN[2]}, abs=1e-5
    )
    with pytest.raises(ValueError, match="classifies into its own 3 answers"):
        closed.answer(videos[0], "what?", ["red", "purple"])


WRONG: list[tuple[str, Callable[[Model, str], Any]]] = [
    (r"texts is one \('red'\): give a list", lambda m, v: m.encode_text("red")),
    ("texts: none given", lambda m, v: m.encode_text([])),
    (r"texts\[1\] is empty", lambda m, v: m.encode_text(["red", " "])),
    ("videos is one", lambda m, v: m.encode_video(v)),
    ("videos: none given", lambda m, v: m.caption([])),
    (r"none\.mp4: gives no frames", lambda m, v: m.similarity(["red"], ["none.mp4"])),
    ("an array without frames", lambda m, v: m.encode_video([np.zeros((0, 8, 8, 3), np.uint8)])),
    ("text: empty", lambda m, v: m.explain(v, "")),
    ("question: empty", lambda m, v: m.answer(v, " ")),
    (r"question: \d+ tokens, the model reads 20: give a shorter one", lambda m, v: m.answer(v, "red " * 40)),
    (r"answers: \d+ tokens, the model reads 20", lambda m, v: m.answer(v, "what?", ["a", "red " * 40])),
    (r"none\.mp4: gives no frames", lambda m, v: m.answer("none.mp4", "what?")),
    (r"answers: \['a'\] has 1, give at least 2", lambda m, v: m.answer(v, "what?", ["a"])),
    ("answers: 'a' is there more than once", lambda m, v: m.answer(v, "what?", ["a", "b", "a"])),
    ("answers: one is empty", lambda m, v: m.answer(v, "what?", ["a", " "])),
    (r"labels: \[\] has 0, give at least 1", lambda m, v: m.classify(v, [])),
    ("labels: 'a' is there more than once", lambda m, v: m.classify(v, ["a", "a"])),
    ("template 'video': write {} where the label stands", lambda m, v: m.classify(v, ["a"], "video")),
    ("beam is 0, must be at least 1", lambda m, v: m.caption([v], beam=0)),
    ("no_repeat is -1, must be at least 0", lambda m, v: m.caption([v], no_repeat=-1)),
]


@pytest.mark.parametrize(("says", "ask"), WRONG, ids=range(len(WRONG)))
def test_what_is_wrong_is_named(full: Model, videos: list[str], says: str, ask: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=says) as error:
        ask(full, videos[0])
    assert "\n" not in str(error.value)


def test_a_model_says_what_it_has_no_head_for(plain: Model) -> None:
    with pytest.raises(ValueError, match=r"this model writes no captions: train one with --set.task caption"):
        plain.caption(["never looked at.mp4"])
    with pytest.raises(ValueError, match=r"this model answers no questions: train one with --set.task qa"):
        plain.answer("never looked at.mp4", "what?")


def test_a_model_is_loaded_by_its_folder(full: Model, videos: list[str], tmp_path: Path) -> None:
    save_model(full.model, tmp_path, full.tokenizer)
    loaded = hbi.load(str(tmp_path), device="cpu")
    np.testing.assert_array_equal(loaded.similarity(TEXTS, videos), full.similarity(TEXTS, videos))
    assert loaded.rank_answers(videos[0], "what?") == full.rank_answers(videos[0], "what?")
    with pytest.raises(ValueError, match="not a model folder"):
        hbi.load(str(tmp_path / "none"))


# ---------------------------------------------------------------------------------------- the MLflow package


@pytest.fixture(scope="module")
def package(full: Model) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # MLflow's, of its own type hints
        from hbi.serving.pyfunc import HBIPackage

    package = HBIPackage()
    package.model = full
    return package


def test_the_package_answers_each_row(package: Any, full: Model, videos: list[str]) -> None:
    rows = [
        {"text": "red"},
        {"video": videos[0]},
        {"video": videos[0], "question": "what?"},
        {"video": videos[0], "question": "what?", "answers": ["a star", "a ball"]},
        {"video": videos[1], "text": None, "question": float("nan")},
    ]
    for given in (rows, pd.DataFrame(rows)):
        found = package.predict(None, given)
        assert len(found) == 5
        np.testing.assert_allclose(found["embedding"][0], full.encode_text(["red"])[0], atol=1e-6)
        np.testing.assert_allclose(found["embedding"][4], full.encode_video(videos)[1], atol=1e-6)
        assert [found["caption"][1], found["caption"][4]] == full.caption(videos)
        assert found["answer"][2] == full.answer(videos[0], "what?")
        assert found["answer"][3] == full.answer(videos[0], "what?", ["a star", "a ball"])
    listed = package.predict(None, ["red", "blue"])
    np.testing.assert_allclose(list(listed["embedding"]), full.encode_text(["red", "blue"]), atol=1e-6)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([], "no row with a column of text, video, question, answers"),
        (pd.DataFrame(index=[0, 1]), "row 0: fill either `text` or `video`"),
        (pd.DataFrame({"sentence": ["red"]}), "row 0: no column sentence; there are text, video"),
        ([{"text": "red"}, {"text": ""}], "row 1: fill either `text` or `video`"),
        ([{"text": "red", "video": "a.mp4"}], "row 0: fill either `text` or `video`"),
        (
            [{"text": ["red", "blue"]}],
            r"row 0: `text` is \['red', 'blue'\], must be one string: give several as rows",
        ),
        ([1], "row 0: fill either `text` or `video`"),
        ([{"question": "what?"}], "row 0: fill either `text` or `video`"),
        ([{"text": "red", "question": "what?"}], "row 0: a `question` is about a video"),
        ([{"video": "a.mp4", "answers": ["x", "y"]}], "row 0: `answers` belong to a `question`"),
        ([{"video": "a.mp4", "question": "?", "answers": "x"}], "row 0: `answers` is 'x', must be a list"),
    ],
    ids=range(11),
)
def test_the_package_passes_over_nothing(package: Any, given: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        package.predict(None, given)
