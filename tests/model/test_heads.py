"""Answers and captions: what they depend on, and what must not leak; loss by loops; the same after a save."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hbi.model.config import (
    AnswerConfig,
    CaptionConfig,
    DecodeSettings,
    ModelConfig,
    ReconstructionConfig,
    TowerConfig,
)
from hbi.model.hbi import HBI, HeadInputs
from hbi.model.heads.beam import Marks
from hbi.model.heads.caption import CachedDecoder, caption_loss
from hbi.model.heads.qa import LEVEL_SHARES, PublishedAnswerHead, answer_loss, combined
from hbi.model.levels import LEVELS
from hbi.model.tokenizer import caption_marks, detokenize, tokenize, tokenize_captions, train_tokenizer
from hbi.model.tokens import Tokens
from hbi.model.weights import load_model, save_model

TOWERS = TowerConfig(
    image_size=16, patch_size=8, vision_width=16, vision_layers=1, vision_heads=2, text_width=24, text_layers=1,
    text_heads=2, vocab_size=50, context=16, dim=16,
)  # fmt: skip
CONFIG = ModelConfig(
    towers=TOWERS,
    words=8,
    frames=4,
    temporal_layers=1,
    predictor_width=4,
    frame_ratios=(0.5, 0.5),
    reconstruction=ReconstructionConfig("attention"),
    answers=AnswerConfig("open", 7, dropout=0.0),
    captions=CaptionConfig(layers=2, heads=2, words=8, dropout=0.0),
)
MARKS = Marks(48, 49)


def made(config: ModelConfig = CONFIG) -> HBI:
    torch.manual_seed(0)
    model = HBI(config).eval()
    with torch.no_grad():  # weights that are not almost nothing, so that every part has a say
        for name, parameter in model.named_parameters():
            if name.startswith(("reconstruction.", "answerer.", "captioner.")) and parameter.ndim > 1:
                parameter.normal_(std=0.3)
    return model


@pytest.fixture(scope="module")
def model() -> HBI:
    return made()


def batch(size: int = 3, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 48, (size, 8), generator=generator)
    mask = torch.arange(8) < torch.randint(3, 9, (size, 1), generator=generator)
    video = torch.randn(size, 4, 3, 16, 16, generator=generator)
    return ids * mask, mask, video, torch.arange(4) < torch.randint(1, 5, (size, 1), generator=generator)


def candidates(count: int = 5) -> tuple[Tensor, Tensor]:
    ids = torch.arange(3 * count).reshape(count, 3) % 47 + 1
    return ids, torch.arange(3) < torch.tensor([[2]] * (count - 1) + [[3]])


# --- answers --------------------------------------------------------------------------------------------------------


def test_the_question_the_video_and_the_answers_all_count(model: HBI) -> None:
    ids, mask, video, video_mask = batch()
    frames = model.encode_video(video, video_mask)
    logits = model.answer_logits(ids, mask, frames, video_mask, candidates())
    assert logits.shape == (3, 5) and logits.isfinite().all()
    asked = model.answer_logits(batch(seed=1)[0] * mask, mask, frames, video_mask, candidates())
    seen = model.answer_logits(ids, mask, frames.roll(1, 0), video_mask.roll(1, 0), candidates())
    fewer = model.answer_logits(ids, mask, frames, video_mask, tuple(part[2:4] for part in candidates()))
    assert not torch.allclose(logits, asked, atol=1e-3) and not torch.allclose(logits, seen, atol=1e-3)
    assert torch.allclose(fewer, logits[:, 2:4], atol=1e-5)


@pytest.mark.parametrize("head", ["open", "published"])
def test_an_answer_depends_on_neither_neighbours_nor_padding(head: str) -> None:
    model = made(replace(CONFIG, answers=AnswerConfig(head, 7)))  # type: ignore[arg-type]
    listed = candidates() if head == "open" else None
    ids, mask, video, video_mask = batch()
    frames = model.encode_video(video, video_mask)
    together = model.answer_logits(ids, mask, frames, video_mask, listed)
    noisy = torch.where(video_mask[:, :, None], frames, 9.0)
    again = model.answer_logits(torch.where(mask, ids, 33), mask, noisy, video_mask, listed)
    assert torch.allclose(together, again, atol=1e-4)
    for row in range(3):
        one = (part[row : row + 1] for part in (ids, mask, frames, video_mask))
        assert torch.allclose(model.answer_logits(*one, listed)[0], together[row], atol=1e-4)


def test_the_published_head_by_loops() -> None:
    torch.manual_seed(0)
    head = PublishedAnswerHead(6, 4, 0.1).eval()
    generator = torch.Generator().manual_seed(0)

    def side(n: int) -> dict[str, Tokens]:
        mask = torch.arange(n) < torch.tensor([[n], [2]])
        return {
            level: Tokens(torch.randn(2, n, 6, generator=generator), torch.zeros(2, n), mask)
            for level in LEVELS
        }

    text, video = side(4), side(3)
    for published in (False, True):
        found = head(text, video, published)
        for level in LEVELS:
            for row in range(2):
                pooled = []
                for tokens, weigh in ((video, head.video_weights), (text, head.text_weights)):
                    x, present = tokens[level].tokens[row], tokens[level].mask[row]
                    logits = weigh[level](x)[:, 0]
                    if published:
                        pooled.append(
                            sum(
                                w * v * float(p)
                                for w, v, p in zip(logits.softmax(0), x, present, strict=True)
                            )
                        )
                    else:
                        pooled.append(logits[present].softmax(0) @ x[present])
                joined = torch.cat([head.video_maps[level](pooled[0]), head.text_maps[level](pooled[1])])
                assert torch.allclose(found[level][row], head.classifiers[level](joined), atol=1e-5)
    shares = [LEVEL_SHARES[level] * found[level] for level in LEVELS]
    assert torch.allclose(combined(found), shares[0] + shares[1] + shares[2])
    assert sum(LEVEL_SHARES.values()) == pytest.approx(1.0)
    labels = torch.tensor([3, 1])
    by_hand = sum(-found[level].log_softmax(-1)[row, labels[row]] for level in LEVELS for row in range(2)) / 3
    assert torch.allclose(answer_loss(found, labels), by_hand)


def test_the_published_sizes() -> None:
    head = PublishedAnswerHead(32, 50, 0.1)
    assert {tuple(c[0].weight.shape) for c in head.classifiers.values()} == {(512, 256)}
    assert {tuple(c[2].weight.shape) for c in head.classifiers.values()} == {(50, 512)}
    assert {tuple(m.weight.shape) for m in (*head.text_maps.values(), *head.video_maps.values())} == {
        (128, 32)
    }


# --- captions -------------------------------------------------------------------------------------------------------


def test_a_word_sees_only_those_before_it(model: HBI) -> None:
    ids, _, video, video_mask = batch()
    levels = model.video_levels(model.encode_video(video, video_mask), video_mask)
    logits = model.caption_logits(ids, levels)
    changed = ids.clone()
    changed[:, 5:] = 7
    again = model.caption_logits(changed, levels)
    assert torch.allclose(logits[:, :5], again[:, :5], atol=1e-5)
    assert not torch.allclose(logits[:, 5:], again[:, 5:], atol=1e-3)
    short = model.caption_logits(ids[:, :5], levels)
    assert torch.allclose(logits[:, :5], short, atol=1e-5)


def test_no_caption_leaks_into_what_the_decoder_sees(model: HBI) -> None:
    """In training as when writing: the memory is made of the video alone, whatever texts the batch holds."""
    ids, mask, video, video_mask = batch()
    head = HeadInputs("caption", torch.arange(3))
    model.train()
    trained = model(ids, mask, video, video_mask, head)["caption"]
    other = model(batch(seed=5)[0], mask, video, video_mask, head)["caption"]
    model(batch(seed=6)[0], mask, video, video_mask)  # the encoders' own pairs, with other captions
    model.eval()
    levels = model.video_levels(model.encode_video(video, video_mask), video_mask)
    assert torch.allclose(trained, model.caption_logits(ids, levels), atol=1e-5)
    assert not torch.allclose(trained, other)  # the decoder's own words do count ...
    start = torch.full((3, 1), 48)
    assert model.captioner is not None
    memory = model.captioner.memory(levels)
    writer = CachedDecoder(model.captioner, memory, model.text.embeddings.token_embedding.weight)
    first = model.caption_logits(start, levels).log_softmax(-1)[:, 0]
    assert torch.allclose(writer.next(start[:, 0]), first, atol=1e-5)  # ... and nothing else does


def test_the_cache_changes_nothing(model: HBI) -> None:
    ids, _, video, video_mask = batch()
    levels = model.video_levels(model.encode_video(video, video_mask), video_mask)
    whole = model.caption_logits(ids, levels).log_softmax(-1)
    assert model.captioner is not None
    writer = CachedDecoder(
        model.captioner, model.captioner.memory(levels), model.text.embeddings.token_embedding.weight
    )
    for word in range(8):
        assert torch.allclose(writer.next(ids[:, word]), whole[:, word], atol=1e-5)


def test_the_cache_follows_the_beams(model: HBI) -> None:
    """Two rows a video, exchanged and doubled in the middle."""
    _, _, video, video_mask = batch(2)
    levels = model.video_levels(model.encode_video(video, video_mask), video_mask)
    assert model.captioner is not None
    writer = CachedDecoder(
        model.captioner, model.captioner.memory(levels), model.text.embeddings.token_embedding.weight
    )
    rows = torch.tensor([[48, 3], [48, 4], [48, 5], [48, 6]])
    writer.next(rows[:, 0])
    writer.next(rows[:, 1])
    writer.keep(torch.tensor([1, 0, 3, 3]))
    found = writer.next(torch.tensor([9, 9, 9, 9]))
    longer = torch.tensor([[48, 4, 9], [48, 3, 9], [48, 6, 9], [48, 6, 9]])
    for row, video_row in ((0, 0), (1, 0), (2, 1), (3, 1)):
        own = {level: Tokens(*(part[video_row : video_row + 1] for part in t)) for level, t in levels.items()}
        expected = model.caption_logits(longer[row : row + 1], own).log_softmax(-1)[0, -1]
        assert torch.allclose(found[row], expected, atol=1e-5)


@pytest.mark.parametrize("beam", [1, 3])
def test_a_caption_depends_on_neither_neighbours_nor_padding(beam: int, model: HBI) -> None:
    _, _, video, video_mask = batch(5)
    settings = DecodeSettings(beam=beam, words=7)
    with torch.no_grad():
        frames = model.encode_video(video, video_mask)
        together = model.write_captions(frames, video_mask, MARKS, settings)
        noisy = torch.where(video_mask[:, :, None], frames, 9.0)
        assert model.write_captions(noisy, video_mask, MARKS, settings) == together
        for row in range(5):
            alone = model.write_captions(frames[row : row + 1], video_mask[row : row + 1], MARKS, settings)
            assert alone == together[row : row + 1]
    assert len(set(map(tuple, together))) > 1 and all(1 <= len(ids) <= 7 for ids in together)


def test_the_caption_loss_by_loops_and_the_mask_alone_says_what_is_absent() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 6, generator=generator)
    targets, mask = (
        torch.tensor([[0, 5, 2], [5, 0, 0]]),
        torch.tensor([[True, True, True], [True, True, False]]),
    )
    total = 0.0
    for row in range(2):
        for word in range(int(mask[row].sum())):
            shares = logits[row, word].log_softmax(0)
            for other in range(6):
                weight = 0.9 if other == targets[row, word] else 0.1 / 5
                total -= weight * float(shares[other])
    assert caption_loss(logits, targets, mask).item() == pytest.approx(total, rel=1e-5)
    # A present word 0 (CLIP's "!", and what stands at padding) is learned; an absent one is not.
    logits.requires_grad_()
    caption_loss(logits, targets, mask).backward()
    assert logits.grad is not None
    assert logits.grad[1, 1].abs().sum() > 0 and logits.grad[1, 2].abs().sum() == 0


def test_a_longer_caption_than_the_decoder_writes_is_an_error(model: HBI) -> None:
    _, _, video, video_mask = batch()
    levels = model.video_levels(model.encode_video(video, video_mask), video_mask)
    with pytest.raises(ValueError, match=r"9 tokens, the model writes at most 8 \(CaptionConfig.words\)"):
        model.caption_logits(torch.ones(3, 9, dtype=torch.int64), levels)


# --- both -----------------------------------------------------------------------------------------------------------


def test_several_texts_share_a_video() -> None:
    model = made().train()
    ids, mask, video, video_mask = batch(5)
    owner = torch.tensor([0, 0, 2, 1, 2])
    alike = [part[owner] for part in (video[:3], video_mask[:3])]
    for head in (HeadInputs("qa", owner, candidates()), HeadInputs("caption", owner)):
        shared = model(ids, mask, video[:3], video_mask[:3], head)
        apart = model(ids, mask, *alike, head._replace(video_of_text=torch.arange(5)))
        assert all(torch.allclose(shared[name], apart[name], atol=1e-5) for name in shared)


@pytest.mark.parametrize("task", ["qa", "caption"])
def test_every_parameter_of_a_head_learns_and_a_batch_of_none_gives_zeros(task: str) -> None:
    model = made().train()

    def gradients(size: int) -> dict[str, Tensor]:
        model.zero_grad()
        ids, mask, video, video_mask = (part[:size] for part in batch())
        head = HeadInputs(task, torch.arange(size), candidates())  # type: ignore[arg-type]
        logits = model(ids, mask, video, video_mask, head)
        if task == "qa":
            loss = answer_loss(logits, torch.arange(size))
        else:
            loss = caption_loss(logits["caption"][:, :-1], ids[:, 1:], mask[:, 1:])
        loss.backward()
        assert size or loss.item() == 0
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    some, none = gradients(3), gradients(0)
    own = "answerer." if task == "qa" else "captioner."
    for name, _ in model.named_parameters():
        if name.startswith(own):
            # Softmaxes forget a constant.
            forgets = name.endswith(("weight.bias", "query_key_value.bias", "cross_key_value.bias"))
            assert name in some and (forgets or some[name].abs().sum() > 0), name
    assert some.keys() == none.keys() and all(g.isfinite().all() and not g.any() for g in none.values())


def test_a_model_without_the_head_says_so() -> None:
    model = HBI(replace(CONFIG, answers=AnswerConfig(), captions=CaptionConfig())).eval()
    ids, mask, video, video_mask = batch()
    frames = model.encode_video(video, video_mask)
    with pytest.raises(ValueError, match="this model answers no questions: train one"):
        model.answer_logits(ids, mask, frames, video_mask)
    with pytest.raises(ValueError, match="this model writes no captions: train one"):
        model.write_captions(frames, video_mask, MARKS, DecodeSettings())
    fixed = HBI(replace(CONFIG, answers=AnswerConfig("published", 7))).eval()
    with pytest.raises(ValueError, match="classifies into its own 7 answers"):
        fixed.answer_logits(ids, mask, frames, video_mask, candidates())
    with pytest.raises(ValueError, match="give candidates"):
        made().answer_logits(ids, mask, frames, video_mask)


def test_heads_change_nothing_of_the_model_they_stand_on() -> None:
    torch.manual_seed(0)
    bare = HBI(ModelConfig(towers=TOWERS, words=8, frames=4, temporal_layers=1, predictor_width=4))
    full = made().state_dict()
    assert all(torch.equal(value, full[name]) for name, value in bare.state_dict().items())


def test_heads_and_answers_come_back_from_a_folder(tmp_path: Path) -> None:
    model = made(replace(CONFIG, answers=AnswerConfig("published", 3)))
    model.vocabulary = ("man", "two dogs", "zürich")
    save_model(model, tmp_path)
    again = load_model(tmp_path)
    assert again.config == model.config and again.vocabulary == model.vocabulary
    ids, mask, video, video_mask = batch()
    frames = model.encode_video(video, video_mask)
    assert torch.equal(
        model.answer_logits(ids, mask, frames, video_mask), again.answer_logits(ids, mask, frames, video_mask)
    )
    (tmp_path / "answers.json").write_text('["man"]')
    with pytest.raises(ValueError, match=r"answers\.json was cut short or changed"):
        load_model(tmp_path)


def test_captions_to_ids_and_back() -> None:
    tokenizer = train_tokenizer(["a red ball"] * 3, 260)
    captions = ["a red ball", "a very long caption about balls"]
    ids, mask = tokenize_captions(tokenizer, captions, 14)
    assert torch.equal(ids, tokenize(tokenizer, captions, 14)[0])
    marks = caption_marks(tokenizer)
    assert (ids[:, 0] == marks.start).all() and ids[1, -1] == marks.end and mask[1].all()
    assert marks.never == (0,)
    assert detokenize(tokenizer, ids.tolist()) == ["a red ball", "a very long"]


def test_a_tokenizer_without_a_start_lends_its_padding() -> None:
    tokenizer = train_tokenizer(["a red ball"] * 3, 260)
    tokenizer.bos_token = None
    tokenizer.backend_tokenizer.post_processor = None  # type: ignore[attr-defined]
    assert caption_marks(tokenizer).start == tokenizer.pad_token_id
    ids, mask = tokenize_captions(tokenizer, ["a red ball"], 12)
    assert ids[0, 0] == tokenizer.pad_token_id and mask[0, 0] and ids.shape == (1, 12)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end token"):
        caption_marks(tokenizer)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AnswerConfig(vocabulary=0), "AnswerConfig.vocabulary is 0"),
        (lambda: AnswerConfig(dropout=1.0), "AnswerConfig.dropout is 1.0"),
        (lambda: CaptionConfig(layers=-1), "CaptionConfig.layers is -1"),
        (lambda: CaptionConfig(words=2), "start, a word, end"),
        (lambda: CaptionConfig(width=10, heads=3), "must divide width"),
    ],
)
def test_settings_that_make_no_sense(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
