"""Texts to tokens, tokens to words in the joint space."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint
from transformers import AutoTokenizer, CLIPModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

PAD_ID = 0
"""What stands at padding (the published convention); the mask, not the id, says that it is padding."""


def require_tokens(mask: Shaped[Tensor, "batch n"], what: str) -> Bool[Tensor, "batch n"]:
    """The mask as bool, or an error naming the first row of it in which nothing is present.

    On a GPU the error is the device's own (no row is named), so that no step waits for the answer.
    """
    mask = mask.bool()
    filled = mask.any(-1)
    if mask.device.type == "cpu":
        if not filled.all():
            row = int((~filled).nonzero()[0, 0])
            raise ValueError(
                f"{what}_mask: row {row} has no valid {what}; leave that sample out of the batch"
            )
    elif filled.numel():
        torch._assert_async(filled.all(), f"{what}_mask: a row has no valid {what}")
    return mask


def run_layers(
    layers: nn.ModuleList, hidden: Tensor, mask: Tensor | None, checkpointing: bool
) -> Float[Tensor, "batch n width"]:
    """A stack of CLIP blocks; with checkpointing each block's activations are computed again in the backward pass."""
    if not len(hidden):  # CLIP's attention cannot reshape a batch of none: let it have one, and drop it
        one = (0, 0, 0, 0, 0, 1)
        mask = mask if mask is None else pad(mask, (0, 0, *one), value=True)
        return run_layers(layers, pad(hidden, one), mask, checkpointing)[:0]
    for layer in layers:
        if checkpointing and torch.is_grad_enabled():
            hidden = checkpoint(layer, hidden, mask, use_reentrant=False, preserve_rng_state=False)
        else:
            hidden = layer(hidden, mask)
    return hidden


class TextTower(nn.Module):
    """CLIP's text transformer with every word projected to the joint space."""

    def __init__(self, clip: CLIPModel) -> None:
        super().__init__()
        self.embeddings = clip.text_model.embeddings
        self.layers = clip.text_model.encoder.layers
        self.norm = clip.text_model.final_layer_norm
        self.projection = clip.text_projection
        self.checkpointing = False

    def forward(
        self, input_ids: Int[Tensor, "batch words"], mask: Bool[Tensor, "batch words"]
    ) -> Float[Tensor, "batch words dim"]:
        """A word sees the present words up to itself; a word that sees none (padding in front) sees itself."""
        n = input_ids.shape[1]
        if n > (most := len(self.embeddings.position_embedding.weight)):
            raise ValueError(f"text: {n} tokens, the model has positions for {most}")
        causal = torch.ones(n, n, dtype=torch.bool, device=mask.device).tril()
        seen = causal & mask[:, None, :]
        seen |= ~seen.any(-1, keepdim=True) & torch.eye(n, dtype=torch.bool, device=mask.device)
        hidden = run_layers(self.layers, self.embeddings(input_ids), seen[:, None], self.checkpointing)
        return self.projection(self.norm(hidden))


def last_present(
    words: Float[Tensor, "batch words dim"], mask: Bool[Tensor, "batch words"]
) -> Float[Tensor, "batch dim"]:
    """The last present word of each row: the end token, where CLIP reads the sentence."""
    position = torch.arange(mask.shape[1], device=mask.device)
    last = (position * mask).amax(1)
    return words.gather(1, last[:, None, None].expand(-1, 1, words.shape[2]))[:, 0]


def load_tokenizer(name_or_folder: str | Path) -> PreTrainedTokenizerBase:
    """CLIP's tokenizer by name or folder, or one of ours from the folder it was saved to (no network for a folder)."""
    source = str(name_or_folder)
    if Path(source).is_dir():
        if not any((Path(source) / name).exists() for name in ("tokenizer.json", "vocab.json")):
            raise ValueError(f"{source} has no tokenizer.json: save the model together with its tokenizer")
        return AutoTokenizer.from_pretrained(source, local_files_only=True)
    return AutoTokenizer.from_pretrained(source)


def train_tokenizer(captions: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A small lower-casing byte-pair tokenizer with start and end tokens, its vocabulary learned from the captions.

    It starts from all 256 bytes, so no text is unknown to it. vocab_size: at least 259 (bytes, padding, start, end).
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


def tokenize(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], words: int
) -> tuple[Int[Tensor, "batch {words}"], Bool[Tensor, "batch {words}"]]:
    """Token ids and mask: start, the text, end; a long text is cut and keeps its end; padding has id 0."""
    if words < 2:
        raise ValueError(f"words is {words}, must be at least 2: the start and the end token")
    input_ids = torch.full((len(texts), words), PAD_ID, dtype=torch.int64)
    mask = torch.zeros(len(texts), words, dtype=torch.bool)
    if not len(texts):
        return input_ids, mask
    # A mark that a caption spells out is text like any other.
    encoded: Any = tokenizer(list(texts), truncation=True, max_length=words, split_special_tokens=True)
    for row, ids in enumerate(encoded["input_ids"]):
        input_ids[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
        mask[row, : len(ids)] = True
    return input_ids, mask
