"""A model as people use it: sentences and videos in, numpy arrays and plain text out.

    model = hbi.load("models:/hbi@champion")
    model.similarity(["a red square moves left"], ["one.mp4", "two.mp4"])      # [texts, videos]

`hbi.load`, the MLflow package, the commands, the replicas and the MTEB wrapper are all this one class.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from hbi.model.coalitions import COALITIONS, Importance, importance
from hbi.model.config import NO_HEAD, DecodeSettings, FrameSettings
from hbi.model.frames import resize_crop, sample_indices
from hbi.model.hbi import HBI
from hbi.model.tokenizer import caption_marks, detokenize, tokenize
from hbi.model.tokens import Tokens
from hbi.pipelines.decoding.clip import DecodeError
from hbi.pipelines.decoding.decoder import Decoder

BATCH = 32
"""Sentences or videos encoded at once."""
LEVEL = "entity"
"""The level whose tokens score retrieval."""
START, END = "[start]", "[end]"
"""What the marks around a sentence are called where words are shown."""

Video = str | Path | bytes | UInt8[np.ndarray, "frames height width 3"]
"""A path, what a file holds, or frames as they were shot."""


@dataclass(frozen=True)
class Explanation:
    """Which word met which frame."""

    words: list[str]
    """The sentence's words as written, with its marks; pieces of one word are together."""
    times: list[float]
    """When each frame is shown, in seconds (its number, where the video was given as frames)."""
    interaction: Float[np.ndarray, "words frames"]
    """What a word and a frame add together beyond what each adds alone, in the game on what goes in
    (`hbi.model.coalitions`); marks have 0."""
    word_values: Float[np.ndarray, " words"]
    """What each word adds to the score of a random set of the others with all frames; marks are no players and have 0.
    Leaving words out in this order makes the score fall nearly as fast as any order can."""
    frame_values: Float[np.ndarray, " frames"]
    """What each frame adds to the score of a few of the others with all words: by it frames are ranked."""
    frames: UInt8[np.ndarray, "frames size size 3"]
    """The frames, as the model saw them."""


class Model:
    """One model with its tokenizer, on one device. Videos are decoded in a process of its own, a call at a time."""

    def __init__(
        self,
        model: HBI,
        tokenizer: Any,
        device: str | torch.device | None = None,
        fetch: Callable[[str], bytes | Path] = Path,
    ) -> None:
        """device: by default a GPU where there is one. fetch: how a path becomes a file or its bytes."""
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model = model.eval().to(self.device)
        self.tokenizer = tokenizer
        self.fetch = fetch

    # ------------------------------------------------------------------------------------------- retrieval

    def encode_text(self, texts: Sequence[str]) -> Float[np.ndarray, "texts dim"]:
        """One vector a sentence: the sum of its words' unit vectors under their weights.

        The inner product of two such vectors is the weighted mean of what `similarity` takes maxima of: good for a
        first rough search. ValueError for a sentence that is empty.
        """
        return _pooled(self.text_tokens(texts))

    def encode_video(self, videos: Sequence[Video]) -> Float[np.ndarray, "videos dim"]:
        """One vector a video, likewise of its frames. ValueError for a video that gives no frames."""
        return _pooled(self.video_tokens(videos))

    def similarity(self, texts: Sequence[str], videos: Sequence[Video]) -> Float[np.ndarray, "texts videos"]:
        """How well each sentence fits each video, in [-1, 1]: what retrieval is scored by."""
        with torch.inference_mode():
            text, video = self.text_tokens(texts), self.video_tokens(videos)
            return self.model.similarity(text, video, chunk=256).cpu().numpy()

    def classify(self, video: Video, labels: Sequence[str], template: str = "{}") -> list[tuple[str, float]]:
        """The labels, likeliest first, with their probability; zero-shot: a label is a sentence like any other.

        template: the sentence around a label, as "a video of {}". With CLIP's towers the probabilities sum to 1; with
        SigLIP's each label has its own, by its sigmoid and bias. ValueError for no labels, or one that is there twice.
        """
        _require_list(labels, "labels", 1)
        if "{}" not in template:
            raise ValueError(f"template {template!r}: write {{}} where the label stands")
        scores = torch.from_numpy(
            self.similarity([template.replace("{}", each) for each in labels], [video])[:, 0]
        )
        scores = scores * self.model.logit_scale.exp().item()
        bias = self.model.logit_bias
        shares = scores.softmax(0) if bias is None else (scores + bias.item()).sigmoid()
        return _ranked(labels, shares)

    # --------------------------------------------------------------------------------- captions and answers

    @torch.inference_mode()
    def caption(self, videos: Sequence[Video], beam: int = 4, no_repeat: int = 0) -> list[str]:
        """A caption for each video, by beam search (1: the likeliest word, again and again).

        no_repeat: no run of so many tokens is written twice; 0 forbids none.
        ValueError where the model writes no captions.
        """
        self._require("caption")
        marks, settings = caption_marks(self.tokenizer), DecodeSettings(beam=beam, no_repeat=no_repeat)
        captions: list[str] = []
        for frames, mask in self._encoded(videos):
            captions += detokenize(self.tokenizer, self.model.write_captions(frames, mask, marks, settings))
        return captions

    def answer(self, video: Video, question: str, answers: Sequence[str] | None = None) -> str:
        """The answer to a question about a video, of those that the model knows or of `answers`; see `rank_answers`."""
        return self.rank_answers(video, question, answers)[0][0]

    @torch.inference_mode()
    def rank_answers(
        self, video: Video, question: str, answers: Sequence[str] | None = None
    ) -> list[tuple[str, float]]:
        """All answers with their probability, likeliest first.

        answers: what may be answered, two or more; none: the model's own list. ValueError where the model answers no
        questions, or only those of its own list, and for a question or an answer that is empty or longer than the
        model's words.
        """
        self._require("qa")
        known = self.model.vocabulary
        if answers is not None:
            _require_list(answers, "answers", 2)
        ids, mask = self._question(question)
        wanted = list(known if answers is None else answers)
        closed = self.model.config.answers.head == "published"
        candidates = None
        if not closed or not set(wanted) <= set(known):  # a closed head says itself what it cannot do
            for answer in answers or ():
                self._require_short(answer, "answers")
            candidates = self._tokens(wanted, "answers")
        [(frames, frame_mask)] = list(self._encoded([video]))
        logits = self.model.answer_logits(ids, mask, frames, frame_mask, candidates)[0]
        if candidates is None:
            logits = logits[[known.index(answer) for answer in wanted]]
        return _ranked(wanted, logits.float().softmax(0))

    @torch.inference_mode()
    def explain(self, video: Video, text: str) -> Explanation:
        """Which word of a sentence met which frame of a video, and what each is good for."""
        ids, _ = self._tokens([text], "text")
        with self._decoder() as decoder:
            images, times = self._frames(decoder, video)
        written, of_token = words_of(self.tokenizer, ids[0].tolist())
        alone = self.model.encode_frames(torch.from_numpy(images)[None].to(self.device))[0]
        found = self.importance(ids[0], of_token, alone)
        parts = (found.interaction.numpy(), found.words.numpy(), found.frames.numpy())
        return Explanation(written, times, *parts, images)

    @torch.inference_mode()
    def importance(
        self,
        ids: Int[Tensor, " tokens"],
        of_token: list[int],
        frames: Float[Tensor, "frames dim"],
        most: int = COALITIONS,
    ) -> Importance:
        """`hbi.model.coalitions.importance` with the marks among the words: they are no players, and have 0.

        of_token: of `words_of`; frames: of `HBI.encode_frames`; most: coalitions of a side.
        """
        marks = set(self.tokenizer.all_special_ids)
        players = sorted(
            {word for word, token in zip(of_token, ids.tolist(), strict=True) if token not in marks}
        )
        number = {word: place for place, word in enumerate(players)}
        numbers = torch.tensor([number.get(word, -1) for word in of_token], device=self.device)
        found = importance(self.model, ids, numbers, frames, most)
        words = torch.zeros(max(of_token) + 1)
        pairs = torch.zeros(len(words), len(frames))
        words[players], pairs[players] = found.words, found.interaction
        return Importance(words, found.frames, pairs, found.score)

    # ------------------------------------------------------------------------------------------------ tokens

    @torch.inference_mode()
    def text_tokens(self, texts: Sequence[str]) -> Tokens:
        """The entity-level word tokens of sentences, padded to the model's words, on the model's device."""
        _require_many(texts, "texts")
        for number, text in enumerate(texts):
            if not text.strip():
                raise ValueError(f"texts[{number}] is empty: write what the video shows")
        parts = []
        for first in range(0, len(texts), BATCH):
            ids, mask = self._tokens(texts[first : first + BATCH], "texts", padded=True)
            words, _ = self.model.encode_text(ids, mask)
            parts.append(self.model.text_levels(words, mask)[LEVEL])
        return Tokens(*map(torch.cat, zip(*parts, strict=True)))

    @torch.inference_mode()
    def video_tokens(self, videos: Sequence[Video]) -> Tokens:
        """The entity-level frame tokens of videos, padded to the model's frames, on the model's device."""
        parts = [self.model.video_levels(frames, mask)[LEVEL] for frames, mask in self._encoded(videos)]
        return Tokens(*map(torch.cat, zip(*parts, strict=True)))

    def _tokens(
        self, texts: Sequence[str], what: str, padded: bool = False
    ) -> tuple[Tensor, Bool[Tensor, "texts words"]]:
        if any(not text.strip() for text in texts):
            raise ValueError(f"{what}: empty: write something")
        ids, mask = tokenize(self.tokenizer, texts, self.model.config.words)
        longest = ids.shape[1] if padded else int(mask.sum(1).max())
        return ids[:, :longest].to(self.device), mask[:, :longest].to(self.device)

    def _question(self, question: str) -> tuple[Tensor, Tensor]:
        if not question.strip():
            raise ValueError("question: empty: ask something about the video")
        self._require_short(question, "question")
        return self._tokens([question], "question", padded=True)  # as in training: merges count padding

    def _require_short(self, text: str, what: str) -> None:
        length, most = len(self.tokenizer(text)["input_ids"]), self.model.config.words
        if length > most:
            raise ValueError(f"{what}: {length} tokens, the model reads {most}: give a shorter one")

    def _require(self, task: str) -> None:
        if task not in self.model.config.heads:
            raise ValueError(NO_HEAD[task])

    # ---------------------------------------------------------------------------------------------- decoding

    def _decoder(self) -> Decoder:
        """For frames as the model takes them, in a process of its own: a video can hang a decoder, or kill it."""
        config = self.model.config
        return Decoder(FrameSettings(num_frames=config.frames, size=config.towers.image_size))

    def _encoded(
        self, videos: Sequence[Video]
    ) -> Iterator[tuple[Float[Tensor, "videos frames dim"], Bool[Tensor, "videos frames"]]]:
        """Frames of `HBI.encode_video` for a batch of videos after the other."""
        _require_many(videos, "videos")
        with self._decoder() as decoder:
            for first in range(0, len(videos), BATCH):
                clips = [self._frames(decoder, video) for video in videos[first : first + BATCH]]
                size = decoder.settings.size
                shape = (len(clips), self.model.config.frames, size, size, 3)
                images, mask = np.zeros(shape, np.uint8), torch.zeros(shape[:2], dtype=torch.bool)
                for row, (frames, _) in enumerate(clips):
                    images[row, : len(frames)] = frames
                    mask[row, : len(frames)] = True
                mask = mask.to(self.device)
                with torch.inference_mode():
                    yield self.model.encode_video(torch.from_numpy(images).to(self.device), mask), mask

    def _frames(
        self, decoder: Decoder, video: Video
    ) -> tuple[UInt8[np.ndarray, "frames size size 3"], list[float]]:
        """The chosen frames of one video, and when they are shown."""
        if isinstance(video, np.ndarray):
            if not len(video):
                raise ValueError("videos: an array without frames: leave that video out")
            numbers = np.arange(len(video), dtype=float)
            chosen = sample_indices(numbers, decoder.settings)
            return np.stack([resize_crop(video[i], decoder.settings.size) for i in chosen]), numbers[
                chosen
            ].tolist()
        try:
            clip = decoder.decode(video if isinstance(video, bytes) else self.fetch(str(video)))
        except (DecodeError, OSError) as error:
            name = f"a video of {len(video)} bytes" if isinstance(video, bytes) else video
            raise ValueError(f"{name}: gives no frames ({error})") from None
        return np.stack(clip.frames), list(clip.timestamps)


def words_of(tokenizer: Any, ids: Sequence[int]) -> tuple[list[str], list[int]]:
    """The words of token ids as written, and which word each token belongs to; pieces of one word are together."""
    pieces = tokenizer.convert_ids_to_tokens(list(ids))
    marks = set(tokenizer.all_special_ids)
    words: list[list[str]] = []
    of_token: list[int] = []
    begins = True
    for piece, token in zip(pieces, ids, strict=True):
        # Byte-level tokenizers mark a word's beginning (Ġ), sentencepiece too (▁), CLIP's its end (</w>).
        if begins or token in marks or piece.startswith(("Ġ", "▁")):
            words.append([])
        words[-1].append(piece)
        of_token.append(len(words) - 1)
        begins = token in marks or piece.endswith("</w>")
    texts = [tokenizer.convert_tokens_to_string(word).strip() for word in words]
    if ids[0] in marks:
        texts[0] = START
    if ids[-1] in marks:
        texts[-1] = END
    return texts, of_token


def _pooled(tokens: Tokens) -> Float[np.ndarray, "batch dim"]:
    unit = torch.nn.functional.normalize(tokens.tokens.float(), dim=-1)
    return torch.einsum("bn,bnd->bd", tokens.weights().float(), unit).cpu().numpy()


def _ranked(names: Sequence[str], shares: Float[Tensor, " names"]) -> list[tuple[str, float]]:
    order: list[int] = shares.argsort(descending=True, stable=True).tolist()
    return [(names[i], float(shares[i])) for i in order]


def _require_many(values: Any, what: str) -> None:
    if isinstance(values, str | Path):
        raise ValueError(f"{what} is one ({str(values)!r}): give a list")
    if not len(values):
        raise ValueError(f"{what}: none given; give at least one")


def _require_list(names: Sequence[str], what: str, least: int) -> None:
    if isinstance(names, str):
        raise ValueError(f"{what} is one ({names!r}): give a list")
    if len(names) < least:
        raise ValueError(f"{what}: {list(names)} has {len(names)}, give at least {least} to choose from")
    if twice := sorted({name for name in names if list(names).count(name) > 1}):
        raise ValueError(f"{what}: {twice[0]!r} is there more than once; give each once")
    if any(not name.strip() for name in names):
        raise ValueError(f"{what}: one is empty; leave it out")
