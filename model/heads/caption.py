"""Captions: a causal transformer over words that looks at the video's tokens of all three levels."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import dropout, gelu, linear, scaled_dot_product_attention

from hbi.model.config import ModelConfig
from hbi.model.levels import LEVELS
from hbi.model.tokens import Tokens

KeysValues = tuple[Tensor, Tensor]
"""Of one block: [rows, heads, n, head_width] each."""


class Memory(NamedTuple):
    """What the decoder looks at: a video's tokens of all levels, none of which has seen a text."""

    tokens: Float[Tensor, "videos n width"]
    mask: Bool[Tensor, "videos n"]


class DecoderBlock(nn.Module):
    """Words look at earlier words, then at the video, then think: pre-norm attention, cross-attention, MLP."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm, self.cross_norm, self.mlp_norm = (nn.LayerNorm(width) for _ in range(3))
        self.query_key_value, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.cross_query, self.cross_out = nn.Linear(width, width), nn.Linear(width, width)
        self.cross_key_value = nn.Linear(width, 2 * width)
        self.rise, self.fall = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        for layer in (m for m in self.modules() if isinstance(m, nn.Linear)):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def _split(self, x: Float[Tensor, "rows n width"]) -> Float[Tensor, "rows heads n head"]:
        return x.unflatten(-1, (self.heads, x.shape[-1] // self.heads)).transpose(1, 2)

    def _drop(self, x: Tensor) -> Tensor:
        return dropout(x, self.dropout, self.training)

    def video(self, memory: Memory) -> KeysValues:
        """Keys and values of the memory, once for all words."""
        key, value = self.cross_key_value(memory.tokens).chunk(2, dim=-1)
        return self._split(key), self._split(value)

    def forward(
        self,
        x: Float[Tensor, "rows n width"],
        video: KeysValues,
        mask: Tensor,
        past: KeysValues | None = None,
    ) -> tuple[Float[Tensor, "rows n width"], KeysValues]:
        """The words after those of `past` (none: from the first word on), and the keys and values of all so far.

        mask: of the memory. There may be several rows for each video, one after another: the beams.
        """
        query, key, value = (self._split(part) for part in self.query_key_value(self.norm(x)).chunk(3, -1))
        if past is not None:
            key, value = torch.cat([past[0], key], 2), torch.cat([past[1], value], 2)
        seen = scaled_dot_product_attention(query, key, value, is_causal=past is None)
        x = x + self._drop(self.out(seen.transpose(1, 2).flatten(2)))

        rows, n, width = x.shape
        videos = len(mask)
        beams = rows // videos if videos else 1
        query = self._split(self.cross_query(self.cross_norm(x)).reshape(videos, beams * n, width))
        seen = scaled_dot_product_attention(query, *video, attn_mask=mask[:, None, None, :])
        x = x + self._drop(self.cross_out(seen.transpose(1, 2).reshape(rows, n, width)))
        x = x + self._drop(self.fall(gelu(self.rise(self.mlp_norm(x)))))
        return x, (key, value)


class CaptionDecoder(nn.Module):
    """Memory and the words so far to the next word.

        memory = n( Linear(tokens of all levels) + which level )
        x      = Linear(table[word]) + position            blocks, norm
        logits = n( Linear(x) ) table^T + bias

    The table is the text tower's word embedding, shared: what a word means there, it means here.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        settings, towers = config.captions, config.towers
        width = settings.width or towers.text_width
        heads = settings.heads or max(1, width // 64)
        if width % heads:
            raise ValueError(f"CaptionConfig.heads is {heads}, must divide the decoder's width ({width})")
        self.words = settings.words
        self.memory_map, self.memory_norm = nn.Linear(towers.dim, width), nn.LayerNorm(width)
        self.level = nn.Embedding(len(LEVELS), width)
        self.position = nn.Embedding(settings.words, width)
        self.word_map, self.out_map = nn.Linear(towers.text_width, width), nn.Linear(width, towers.text_width)
        self.blocks = nn.ModuleList(
            DecoderBlock(width, heads, settings.dropout) for _ in range(settings.layers)
        )
        self.norm, self.out_norm = nn.LayerNorm(width), nn.LayerNorm(towers.text_width)
        self.bias = nn.Parameter(torch.zeros(towers.vocab_size))
        for embedding in (self.level, self.position):
            nn.init.normal_(embedding.weight, std=0.02)

    def memory(self, levels: dict[str, Tokens]) -> Memory:
        """The video's single-modal tokens: no caption has a part in them, or the loss would read its own answer."""
        tokens = [
            self.memory_map(levels[level].tokens) + self.level.weight[number]
            for number, level in enumerate(LEVELS)
        ]
        mask = torch.cat([levels[level].mask for level in LEVELS], dim=1)
        return Memory(self.memory_norm(torch.cat(tokens, dim=1)), mask)

    def forward(
        self,
        input_ids: Int[Tensor, "captions words"],
        memory: Memory,
        table: Float[Tensor, "vocabulary text_width"],
    ) -> Float[Tensor, "captions words vocabulary"]:
        """Logits of the word that follows each word. Padding at the end changes nothing before it.

        ValueError for more words than the decoder has positions for.
        """
        if input_ids.shape[1] > self.words:
            raise ValueError(
                f"captions: {input_ids.shape[1]} tokens, the model writes at most {self.words} (CaptionConfig.words)"
            )
        x = self._embedded(input_ids, 0, table)
        for block in self.blocks:
            x, _ = block(x, block.video(memory), memory.mask)  # type: ignore[operator]
        return self._logits(x, table)

    def _embedded(self, ids: Tensor, first: int, table: Tensor) -> Tensor:
        position = self.position.weight[first : first + ids.shape[1]]
        return self.word_map(torch.nn.functional.embedding(ids, table)) + position

    def _logits(self, x: Tensor, table: Tensor) -> Tensor:
        return linear(self.out_norm(self.out_map(self.norm(x))), table, self.bias).float()


class CachedDecoder:
    """A decoder in the middle of some captions: each word is worked through once, its keys and values are kept."""

    def __init__(self, decoder: CaptionDecoder, memory: Memory, table: Tensor) -> None:
        self.decoder, self.mask, self.table = decoder, memory.mask, table
        self.video: list[KeysValues] = [block.video(memory) for block in decoder.blocks]  # type: ignore[operator]
        self.past: list[KeysValues | None] = [None] * len(self.video)
        self.written = 0

    def next(self, tokens: Int[Tensor, " rows"]) -> Float[Tensor, "rows vocabulary"]:
        """Log probabilities of the word after these, the latest words of each row; as many rows for each video."""
        x = self.decoder._embedded(tokens[:, None], self.written, self.table)
        for number, block in enumerate(self.decoder.blocks):
            x, self.past[number] = block(x, self.video[number], self.mask, self.past[number])
        self.written += 1
        return self.decoder._logits(x, self.table)[:, 0].log_softmax(-1)

    def keep(self, rows: Int[Tensor, " kept"]) -> None:
        """Goes on with these rows of the past, each as often as it is named."""
        self.past = [None if past is None else (past[0][rows], past[1][rows]) for past in self.past]


def caption_loss(
    logits: Float[Tensor, "captions words vocabulary"],
    targets: Int[Tensor, "captions words"],
    mask: Bool[Tensor, "captions words"],
    smoothing: float = 0.1,
) -> Float[Tensor, ""]:
    """Sum over the present words of the cross entropy with (1 - smoothing) on the word, the rest even on all others.

    What is absent says the mask alone: the ids of padding and of the end are words like others elsewhere.
    """
    log_shares = logits.log_softmax(-1)
    of_word = log_shares.gather(-1, targets[:, :, None])[:, :, 0]
    of_others = (log_shares.sum(-1) - of_word) / max(logits.shape[-1] - 1, 1)
    each = (1 - smoothing) * of_word + smoothing * of_others
    return -(each.masked_fill(~mask, 0.0)).sum()
