"""Tokenizers: ours, CLIP's format, and the rows that the text tower takes."""

from pathlib import Path

import pytest
import torch

from hbi.model.tokenizer import clean_caption, load_tokenizer, tokenize, train_tokenizer
from hbi.model.tokens import require_tokens

CAPTIONS = ["a red ball bounces", "a blue square moves to the left", "the red square spins"] * 4


def test_rows() -> None:
    tokenizer = train_tokenizer(CAPTIONS, 300)
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    ids, mask = tokenize(
        tokenizer, ["A red  BALL", "", "a blue square moves to the left and the red square spins"], 8
    )
    assert ids.dtype == torch.int64 and mask.dtype == torch.bool and ids.shape == mask.shape == (3, 8)
    for row, present in zip(ids, mask, strict=True):
        length = int(present.sum())
        assert present[:length].all() and (row[length:] == 0).all()
        assert row[0] == start and row[length - 1] == end  # a text that is cut keeps its end
    assert mask.sum(1).tolist() == [5, 2, 8]
    assert torch.equal(ids[0], tokenize(tokenizer, ["a red ball"], 8)[0][0])  # case and spaces are no matter
    assert tokenize(tokenizer, [], 8)[0].shape == (0, 8)


def test_no_text_is_unknown() -> None:
    tokenizer = train_tokenizer(CAPTIONS, 300)
    text = "zebra 漢字 🎬 naïve"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text
    assert max(ids) < len(tokenizer) <= 300


def test_special_marks_in_a_caption_are_text() -> None:
    """A caption that spells the end mark must not end early, nor be cut to nothing."""
    tokenizer = train_tokenizer(CAPTIONS, 300)
    ids, mask = tokenize(tokenizer, ["a <|endoftext|> ball"], 24)
    row = ids[0][mask[0]]
    assert (row == tokenizer.eos_token_id).sum() == 1


def test_training_is_deterministic() -> None:
    first, second = (train_tokenizer(CAPTIONS, 280).get_vocab() for _ in range(2))
    assert first == second


def test_saved_and_loaded(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(CAPTIONS, 300)
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    for words in (5, 24):
        ours, theirs = tokenize(tokenizer, CAPTIONS, words), tokenize(again, CAPTIONS, words)
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


def test_clip_s_own_format(tmp_path: Path) -> None:
    """A tokenizer of CLIP's class, from files of its kind: start, words with </w>, end; lower case."""
    from transformers import CLIPTokenizer

    vocab = {
        token: i
        for i, token in enumerate(
            ["!", "a</w>", "b</w>", "a", "b", "ab</w>", "<|startoftext|>", "<|endoftext|>"]
        )
    }
    tokenizer = CLIPTokenizer(vocab=vocab, merges=[("a", "b</w>")])
    tokenizer.save_pretrained(tmp_path)
    ids, mask = tokenize(load_tokenizer(tmp_path), ["AB a", "a a a a a a"], 4)
    assert ids.tolist() == [[6, 5, 1, 7], [6, 1, 1, 7]] and mask.all()
    ids, mask = tokenize(load_tokenizer(tmp_path), ["b"], 5)
    assert ids.tolist() == [[6, 2, 7, 0, 0]] and mask.tolist() == [[True, True, True, False, False]]


@pytest.mark.parametrize(
    ("odd", "clean"),
    [
        ("a dog &amp;amp; a cat", "a dog & a cat"),
        ("\u201ca\u201d it\u2019s", '"a" it\'s'),
        ("cafÃ©", "café"),
        ("\ufeffa b", "a b"),
        ("ﬁve ﬂags", "five flags"),
        ("ＡＢ　ａ", "AB a"),
        ("a\x00\x1b[31mb\n\t b", "ab b"),
    ],
)
def test_clip_gets_its_captions_cleaned_and_ours_keep_theirs(odd: str, clean: str, tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    assert clean_caption(odd) == clean
    vocab = {token: i for i, token in enumerate(["!", '"', "&", "'", *"abcdefghijklmnopqrstuvwxyz"])}
    vocab |= {f"{token}</w>": len(vocab) + i for i, token in enumerate(list(vocab))}
    vocab |= {"<|startoftext|>": len(vocab), "<|endoftext|>": len(vocab) + 1}
    CLIPTokenizer(vocab=vocab, merges=[]).save_pretrained(tmp_path)
    clip = load_tokenizer(tmp_path)
    assert torch.equal(tokenize(clip, [odd], 40)[0], tokenize(clip, [clean], 40)[0])
    ours = train_tokenizer([odd], 280)
    assert tokenize(ours, [odd], 40)[0][0].tolist()[: len(ours(odd)["input_ids"])] == ours(odd)["input_ids"]


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="vocab_size is 100, must be at least 259"):
        train_tokenizer(CAPTIONS, 100)
    with pytest.raises(ValueError, match="words is 1, must be at least 2"):
        tokenize(train_tokenizer(CAPTIONS, 260), ["a"], 1)
    with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_require_tokens() -> None:
    assert require_tokens(torch.tensor([[1, 0], [0, 1]]), "text").dtype == torch.bool
    assert require_tokens(torch.zeros(0, 5), "text").shape == (0, 5)
    with pytest.raises(ValueError, match="text_mask: row 1 has no valid text"):
        require_tokens(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), "text")
