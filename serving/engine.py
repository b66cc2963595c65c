"""What a replica does, without Ray: the model, the index and a decoder, and the questions that they answer together.

Answers are plain values for JSON; what cannot be answered is a `Refused`.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from hbi.infra.mlflow.resolve import resolve_model
from hbi.model.folder import model_digest
from hbi.model.frames import from_jpegs
from hbi.model.hbi import NO_RECONSTRUCTION
from hbi.model.moments import moment
from hbi.model.tokenizer import load_tokenizer
from hbi.model.tokens import Tokens
from hbi.model.weights import load_model
from hbi.pipelines.decoding.clip import Clip as DecodedClip
from hbi.pipelines.decoding.clip import DecodeError
from hbi.pipelines.decoding.decoder import Decoder
from hbi.serving.encode import Sentence, encode_sentences, encode_video, encoded_rows
from hbi.serving.explain import interactions
from hbi.serving.index.rows import Clip, IndexUnavailable, labelled, rows_of
from hbi.serving.index.snapshot import Snapshot
from hbi.serving.index.stages import padded, search
from hbi.serving.index.table import ClipTable
from hbi.serving.index.thumbnails import thumbnails
from hbi.serving.media import local_file, look_at
from hbi.serving.model import Model
from hbi.serving.questions import FRESH_SECONDS, NewClip, Page, Span
from hbi.serving.refusal import Refused, unknown

RERANKED = 50
"""Best clips of a search that are scored again where that is asked for."""
EXPLAINED = 256
"""Coalitions of words, and of frames, that an explanation scores at most: each is a short pass of the model."""
MOMENTS = 100
"""Results of an answer that say which moment they speak of; further ones give the whole clip."""


class Engine:
    """The model and the index in one process; several threads may ask at once."""

    def __init__(
        self, model: str, tracking: str, index: str, gpu: bool = False, thumbnail_pixels: int = 96
    ) -> None:
        """model: a folder or a pinned name, resolved on this machine. ValueError says what is missing."""
        folder = resolve_model(model, tracking)
        self.model = Model(load_model(folder), load_tokenizer(folder), "cuda" if gpu else "cpu")
        self._table = ClipTable.open(index)
        self._made_it = model_digest(folder) == self._table.metadata.digest
        self.thumbnail_pixels = thumbnail_pixels
        self._decoding = threading.Lock()

    @property
    def table(self) -> ClipTable:
        """The index. IndexUnavailable where it is another model's: made anew before this process was started anew."""
        if not self._made_it:
            raise IndexUnavailable(
                f"{self._table.folder}: another model made the index that lies there now: start `hbi serve` anew"
            )
        return self._table

    def encode(self, texts: Sequence[str]) -> list[Sentence]:
        """Sentences to tokens, all at once."""
        return encode_sentences(self.model.model, self.model.tokenizer, texts)

    def find(self, sentence: Sentence, page: Page) -> dict[str, Any]:
        """The clips that match a sentence best, best first; 409 for reranking by a model that reconstructs nothing."""
        answer = self._ranked(sentence.tokens, page)
        answer["note"] = self._note(sentence)
        return answer

    def like(self, id: str, page: Page) -> dict[str, Any]:
        """The clips that are most like one of the index, itself left out."""
        snapshot, row = self._held(id)
        return self._ranked(self._tokens(snapshot, [row]), page, without=row)

    def find_example(self, place: str, page: Page) -> dict[str, Any]:
        """The clips that are most like a video."""
        frames, _ = self._decode(Span(place))
        tokens, _ = encode_video(self.model.model, from_jpegs(frames)[None])
        return self._ranked(Tokens(tokens.tokens.float(), tokens.logits, tokens.mask), page)

    def explain(self, sentence: Sentence, id: str) -> dict[str, Any]:
        """Why one clip fits: what each word and each frame is good for in the game on what goes in, the interaction of
        each word with each frame, and the moment that the frames name."""
        snapshot, row = self._held(id)
        clip = snapshot.clips([row])[0]
        try:
            frames = torch.from_numpy(snapshot.frames(row).astype(np.float32)).to(self.model.device)
        except KeyError:
            raise unknown(id) from None
        ids = torch.tensor(sentence.ids, device=self.model.device)
        found = self.model.importance(ids, sentence.word_of_token, frames, EXPLAINED)
        first, last = moment(found.frames, clip.timestamps, clip.end)
        return {
            "id": id,
            "words": sentence.words,
            "times": clip.timestamps,
            "interaction": found.interaction.tolist(),
            "word_values": found.words.tolist(),
            "frame_values": found.frames.tolist(),
            "moment": [first, last],
            "note": self._note(sentence),
        }

    def rows(self, new: NewClip) -> Any:
        """A new clip as a row of the table, cut and encoded as the index's clips were: an Arrow table."""
        frames, decoded = self._decode(new.clip)
        encoded = encode_video(self.model.model, from_jpegs(frames)[None])
        clip = Clip(
            id=new.id,
            video=new.video,
            start=decoded.start,
            end=decoded.end,
            timestamps=decoded.timestamps,
            captions=list(new.captions),
            source=new.clip.place,
            part=new.part,
        )
        return rows_of([clip], encoded_rows(*encoded, [thumbnails(frames, self.thumbnail_pixels)]))

    def answer(self, clip: Span, question: str, answers: Sequence[str] | None) -> list[tuple[str, float]]:
        """The answers to a question about a clip with their probability, likeliest first: `Model.rank_answers`."""
        frames = from_jpegs(self._decode(clip)[0])
        with _refusing():
            return self.model.rank_answers(frames, question, answers)

    def caption(self, clip: Span) -> str:
        """A caption of a clip: `Model.caption`."""
        frames = from_jpegs(self._decode(clip)[0])
        with _refusing():
            return self.model.caption([frames])[0]

    def _snapshot(self) -> Snapshot:
        return self.table.snapshot(FRESH_SECONDS)

    def _held(self, id: str) -> tuple[Snapshot, int]:
        """A version that holds a clip, and the clip's row; the newest where it was added just now. 404 otherwise."""
        for seconds in (FRESH_SECONDS, 0.0):
            snapshot = self.table.snapshot(seconds)
            try:
                return snapshot, snapshot.row(id)
            except KeyError:
                continue
        raise unknown(id)

    def _ranked(self, query: Tokens, page: Page, without: int | None = None) -> dict[str, Any]:
        """without: a row that is left out."""
        snapshot = self._snapshot()
        last = page.offset + page.k
        # One more than is asked for tells whether there are more.
        count = last + 1 + (without is not None)
        where = labelled(dict(page.filters))
        ranking = search(snapshot, query, max(count, RERANKED) if page.rerank else count, where)
        ranking = [(score, row) for score, row in ranking if row != without]
        if page.rerank:
            ranking = self._reranked(snapshot, query, ranking)
        asked = ranking[page.offset : last]
        clips = {
            row: clip
            for (_, row), clip in zip(asked, snapshot.clips([row for _, row in asked]), strict=False)
        }
        results = [(score, row, clips[row]) for score, row in asked if row in clips]
        moments = self._moments(snapshot, query, results[:MOMENTS])
        return {
            "results": [
                {
                    "id": clip.id,
                    "score": score,
                    "video": clip.video,
                    "start": clip.start,
                    "end": clip.end,
                    "moment": moments.get(row, [clip.start, clip.end]),
                    "captions": clip.captions,
                    "split": clip.split,
                    "metadata": clip.metadata,
                    "frames": len(clip.timestamps),
                }
                for score, row, clip in results
            ],
            "more": len(ranking) > last,
            "note": None,
        }

    @torch.inference_mode()
    def _reranked(
        self, snapshot: Snapshot, query: Tokens, ranking: list[tuple[float, int]]
    ) -> list[tuple[float, int]]:
        """A ranking whose best have the order and the scores of `HBI.rerank`; the rest follows as it was."""
        model = self.model.model
        if model.reconstruction is None:
            raise Refused(409, NO_RECONSTRUCTION)
        rows, rest = [row for _, row in ranking[:RERANKED]], ranking[RERANKED:]
        if not rows:
            return []
        text = Tokens(*(part.expand(len(rows), *part.shape[1:]).to(self.model.device) for part in query))
        clips = Tokens(*(part.to(self.model.device) for part in self._tokens(snapshot, rows)))
        scores = model.rerank(text, clips).tolist()
        return sorted(zip(scores, rows, strict=True), key=lambda pair: -pair[0]) + rest

    def _moments(
        self, snapshot: Snapshot, query: Tokens, results: list[tuple[float, int, Clip]]
    ) -> dict[int, list[float]]:
        if not results:
            return {}
        all_of = interactions(query, self._tokens(snapshot, [row for _, row, _ in results]))
        return {
            row: list(moment(interaction.sum(0), clip.timestamps, clip.end))
            for interaction, (_, row, clip) in zip(all_of, results, strict=True)
        }

    def _tokens(self, snapshot: Snapshot, rows: list[int]) -> Tokens:
        """The tokens of rows, in their order."""
        found, tokens, logits = snapshot.tokens(np.asarray(rows))
        place = {int(row): i for i, row in enumerate(found)}
        if any(row not in place for row in rows):
            raise Refused(503, "the index changed meanwhile: ask again", {"Retry-After": "1"})
        order = [place[row] for row in rows]
        return padded([tokens[i] for i in order], [logits[i] for i in order])

    def _decode(self, part: Span) -> tuple[list[bytes], DecodedClip]:
        """The frames of a clip as JPEGs, cut as the shards were: its tokens equal those of a sharded clip."""
        # One at a time, in a process of its own that ends at a limit of time and memory.
        with self._decoding, _source(part.place) as path:
            look_at(path)
            with Decoder.of_settings(self.table.metadata.shards) as decoder:
                try:
                    clip = decoder.decode(path, part.start, part.end)
                except (DecodeError, ValueError) as error:
                    raise Refused(422, f"gives no frames: {error}") from None
        return clip.jpegs, clip

    def _note(self, sentence: Sentence) -> str | None:
        if not sentence.cut:
            return None
        words = self.model.model.config.words
        return f"the sentence is longer than the model's {words} words and word pieces: its end was left out"


@contextmanager
def _source(place: str) -> Iterator[str]:
    """`local_file`; 404 where the video is gone."""
    try:
        with local_file(place) as path:
            yield path
    except (FileNotFoundError, PermissionError, NotADirectoryError):
        raise Refused(404, "the source video is not there any more") from None


@contextmanager
def _refusing() -> Iterator[None]:
    """What the model says of a wrong question, as a refusal."""
    try:
        yield
    except ValueError as error:
        raise Refused(422, str(error)) from None
