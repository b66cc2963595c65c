"""Texts to token ids: CLIP's tokenizer, or a small one of our own, and the padded batch that the model takes."""

import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import ftfy
import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import AutoTokenizer, CLIPTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hbi.model.heads.beam import Marks

PAD_ID = 0
"""What stands at padding (the published convention); the mask, not the id, says that it is padding."""


def load_tokenizer(name_or_folder: str | Path) -> PreTrainedTokenizerBase:
    """CLIP's tokenizer by name or folder, or one of ours from the folder it was saved to (no network for a folder).

    ValueError for a folder without a tokenizer; OSError for a name that is neither here nor to be had.
    """
    source = str(name_or_folder)
    if Path(source).is_dir():
        if not any((Path(source) / name).exists() for name in ("tokenizer.json", "vocab.json")):
            raise ValueError(f"{source} has no tokenizer.json: save the model together with its tokenizer")
        return AutoTokenizer.from_pretrained(source, local_files_only=True)
    return AutoTokenizer.from_pretrained(source)


def train_tokenizer(captions: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A small lower-casing byte-pair tokenizer with start and end tokens, its vocabulary learned from the captions.

    It starts from all 256 bytes, so no text is unknown to it. vocab_size: at least 259
    (bytes, padding, start, end), or ValueError.
    """
    from tokenizers import (
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )

    special = ["<|pad|>", "<|startoftext|>", "<|endoftext|>"]
    if vocab_size < 256 + len(special):
        raise ValueError(
            f"vocab_size is {vocab_size}, must be at least {256 + len(special)}: 256 bytes and 3 marks"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFC(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Strip(),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    marks = [(token, tokenizer.token_to_id(token)) for token in special[1:]]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{special[1]} $A {special[2]}", special_tokens=marks
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=special[0], bos_token=special[1], eos_token=special[2]
    )


def clean_caption(text: str) -> str:
    """A text as CLIP's reference cleans it: mojibake, ligatures and curly quotes mended (ftfy), HTML entities read
    (twice, for those escaped twice), white space made one space."""
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())


def tokenize(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], words: int
) -> tuple[Int[Tensor, "batch {words}"], Bool[Tensor, "batch {words}"]]:
    """Token ids and mask: start, the text, end; a long text is cut and keeps its end; padding has id 0.

    CLIP's tokenizer gets its texts cleaned as CLIP's reference cleans them; others keep their own rules.

    ValueError where `words` has no room for start and end.
    """
    if words < 2:
        raise ValueError(f"words is {words}, must be at least 2: the start and the end token")
    input_ids = torch.full((len(texts), words), PAD_ID, dtype=torch.int64)
    mask = torch.zeros(len(texts), words, dtype=torch.bool)
    if not len(texts):
        return input_ids, mask
    if isinstance(tokenizer, CLIPTokenizer):
        texts = [clean_caption(text) for text in texts]
    # A mark that a caption spells out is text like any other.
    encoded: Any = tokenizer(list(texts), truncation=True, max_length=words, split_special_tokens=True)
    for row, ids in enumerate(encoded["input_ids"]):
        input_ids[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
        mask[row, : len(ids)] = True
    return input_ids, mask


def caption_marks(tokenizer: PreTrainedTokenizerBase) -> Marks:
    """What begins and ends a caption that a model writes with this tokenizer, and what it never writes.

    A tokenizer without a start token (SigLIP's) lends its padding token, else its end token. ValueError without an
    end token.
    """
    marks: Any = tokenizer
    end = marks.eos_token_id
    if end is None:
        raise ValueError(
            "the tokenizer has no end token (eos_token): captions written with it would never end"
        )
    start = next(mark for mark in (marks.bos_token_id, marks.pad_token_id, end) if mark is not None)
    never = sorted(set(tokenizer.all_special_ids) - {start, end})
    return Marks(int(start), int(end), tuple(never))


def tokenize_captions(
    tokenizer: PreTrainedTokenizerBase, captions: Sequence[str], words: int
) -> tuple[Int[Tensor, "batch {words}"], Bool[Tensor, "batch {words}"]]:
    """Ids and mask of captions to learn to write: start, the text, end, whatever the tokenizer itself adds."""
    if tokenizer.bos_token_id is not None:
        return tokenize(tokenizer, captions, words)
    ids, mask = tokenize(tokenizer, captions, words - 1)
    start = ids.new_full((len(ids), 1), caption_marks(tokenizer).start)
    return torch.cat([start, ids], 1), torch.cat([torch.ones_like(mask[:, :1]), mask], 1)


def detokenize(tokenizer: PreTrainedTokenizerBase, ids: Sequence[Sequence[int]]) -> list[str]:
    """The texts of some rows of ids, without marks."""
    return [str(tokenizer.decode(list(row), skip_special_tokens=True)).strip() for row in ids]
