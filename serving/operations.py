"""What the endpoints do: what they are asked for, and how front, replicas, writer and files work together on it."""

import asyncio
import json
import sys
import tempfile
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, TypeVar

import anyio
from fastapi import Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException

from hbi.infra import storage
from hbi.model.config import NO_HEAD
from hbi.serving.deploy import Backend
from hbi.serving.index.rows import Clip
from hbi.serving.index.snapshot import Snapshot
from hbi.serving.index.table import ClipTable
from hbi.serving.media import STORAGE_SECONDS, MediaRoots, in_time, keep_upload
from hbi.serving.questions import FRESH_SECONDS, NewClip, Page, Span
from hbi.serving.refusal import Refused, require_text, unknown
from hbi.serving.settings import ServeSettings

LONGEST_TEXT = 100_000
"""Characters of a sentence; what the model does not read of it is said in the answer."""
LONGEST_ID = 512
"""Characters of an id."""
EXAMPLES = 4
"""Sentences that the page begins with,"""
CAPTIONS_LOOKED_AT = 200
"""of so many captions of the index,"""
SHORT_CAPTION = 60
"""of at most so many characters where there are such."""
PATIENCE = 3.0
"""Adding a video may take so many times as long as a search."""
Found = TypeVar("Found")
STRICT = ConfigDict(extra="forbid")


class Asked(BaseModel):
    """Which part of a ranking, among which clips."""

    model_config = STRICT
    k: Annotated[int, Field(ge=1)] = 10
    offset: Annotated[int, Field(ge=0)] = 0
    filter: dict[str, str] = {}


class SearchRequest(Asked):
    """A sentence, or the id of a video to find the like of. `rerank`: score the best for a sentence again, with tokens
    that are rebuilt with each other's help."""

    text: str | None = None
    like: str | None = None
    rerank: bool = False


class ExplainRequest(BaseModel):
    """A sentence, and the video whose match with it is to be explained."""

    model_config = STRICT
    text: str
    id: str


class CaptionRequest(BaseModel):
    """A video of the index to write a caption for."""

    model_config = STRICT
    id: str


class AnswerRequest(CaptionRequest):
    """A question about a video of the index; `answers` are what may be answered, else what the model was trained on."""

    question: str
    answers: list[str] | None = None


class NewVideo(BaseModel):
    """A video inside the media roots, to be added."""

    model_config = STRICT
    video: str
    id: str | None = None
    start: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    end: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    captions: list[str] = []
    replace: bool = False


class Plain(Response):
    """JSON in ASCII: whatever text it holds, it can be sent."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False).encode()


class Front:
    """What the endpoints share."""

    def __init__(
        self, backend: Backend, table: ClipTable, settings: ServeSettings, heads: tuple[str, ...] = ()
    ) -> None:
        """heads: what the model does beside retrieval, `ModelConfig.heads`."""
        self.backend = backend
        self.table = table
        self.settings = settings
        self.heads = heads
        self.roots = MediaRoots.of(settings.media_root, table.uploads, settings.max_upload_bytes)
        self.labels: tuple[int, dict[str, int]] = (-1, {})

    def page(self, asked: Asked) -> Page:
        """422 for more than may be asked for."""
        most = self.settings.max_results
        if asked.k + asked.offset > most:
            raise Refused(422, f"k + offset is {asked.k + asked.offset}, at most {most} results are given")
        filters = tuple(
            (require_text("filter", k, 200), require_text("filter", v, 500)) for k, v in asked.filter.items()
        )
        return Page(asked.k, asked.offset, filters, getattr(asked, "rerank", False))

    async def reading(self, question: Callable[[Snapshot], Found], seconds: float = FRESH_SECONDS) -> Found:
        """What a version of the index that is at most so old answers; IndexUnavailable, or StorageError where it takes
        too long."""
        return await in_time(
            STORAGE_SECONDS, self.table.folder, lambda: question(self.table.snapshot(seconds))
        )

    async def clip(self, id: str) -> Clip:
        """A clip of the index; 404 for an id that it does not hold."""
        try:
            require_text("id", id, LONGEST_ID)
            return await self.reading(lambda snapshot: snapshot.clip(id))
        except (KeyError, Refused):
            raise unknown(id) from None

    async def span(self, id: str) -> Span:
        """Where a clip of the index lies; 403 where that is in no media root."""
        clip = await self.clip(id)
        place = await anyio.to_thread.run_sync(self.roots.inside, clip.source)
        return Span(place, clip.start, clip.end)

    def require_head(self, task: str) -> None:
        """409 where the model has no head for a task."""
        if task not in self.heads:
            raise Refused(409, NO_HEAD[task])

    async def answer(self, span: Span, asked: AnswerRequest) -> Response:
        """The answers to a question, likeliest first."""
        require_text("question", asked.question, LONGEST_TEXT)
        for answer in asked.answers or ():
            require_text("answers", answer, LONGEST_TEXT)
        question = (span, asked.question, asked.answers)
        ranked = await self.backend.ask("replica", "answer", *question, patience=PATIENCE)
        return Plain(
            {
                "id": asked.id,
                "question": asked.question,
                "answers": [{"answer": answer, "score": score} for answer, score in ranked],
            }
        )

    async def caption(self, span: Span, asked: CaptionRequest) -> Response:
        """A caption."""
        written = await self.backend.ask("replica", "caption", span, patience=PATIENCE)
        return Plain({"id": asked.id, "caption": written})

    async def add(self, new: NewVideo, place: str, name: str, upload: bool = False) -> Response:
        """Adds a clip of the video at `place`, named `name` in answers. upload: the file came with the request; it is
        kept beside the table, goes where the clip is not added, and stays where that is not known."""
        id, replaced = await self._claim(new, name)
        if upload:
            patience = PATIENCE * self.settings.request_seconds
            place = await in_time(patience, "the uploads", keep_upload, place, name, self.table.uploads)
        asked = False
        try:
            part = f"request:{uuid.uuid4().hex}"
            clip = NewClip(Span(place, new.start, new.end), name, id, part, tuple(new.captions[:1000]))
            rows = await self.backend.ask("replica", "rows", clip, patience=PATIENCE)
            asked = True
            answer = await self.backend.ask("writer", "add", rows, new.replace)
        except BaseException as error:
            refused = isinstance(error, Refused) and error.status < 500
            if upload and (refused or not asked):
                await asyncio.shield(self._forget(place))
            raise
        # It is added: whatever fails now is no reason to say otherwise.
        if replaced is not None:
            await self._forget(replaced.source)
        await self._look_again()
        return Plain({"id": id, "videos": answer["videos"]}, 201)

    async def _claim(self, new: NewVideo, name: str) -> tuple[str, Clip | None]:
        """The id of a new clip, and the clip that has it now; 409 where that is not to be replaced."""
        id = require_text("id", Path(name).stem if new.id is None else new.id, LONGEST_ID)
        for caption in new.captions[:1000]:
            require_text("captions", caption, 10_000)
        if new.start is not None and new.end is not None and new.end <= new.start:
            raise Refused(422, f"end is {new.end}, must be after start ({new.start})")
        replaced = await self._held(id)
        if replaced is not None and not new.replace:
            raise Refused(409, f"id {id!r} is in use: choose another, or ask to replace it")
        return id, replaced

    async def _held(self, id: str) -> Clip | None:
        try:
            return await self.clip(id)
        except Refused:
            return None

    async def remove(self, id: str) -> Response:
        """Removes a clip, and the file that came with it."""
        held = await self.clip(id)
        answer = await self.backend.ask("writer", "remove", id)
        # A writer that died behind its commit was asked again, and found nothing.
        await self._forget(answer.pop("source") or held.source)
        await self._look_again()
        return Plain({"id": id} | answer)

    async def _forget(self, source: str) -> None:
        """Deletes the file of a clip that is gone, if it came with a request."""
        if not self.roots.is_upload(source):
            return
        try:
            await in_time(STORAGE_SECONDS, source, storage.delete, source)
        except OSError as error:  # the clip is gone all the same
            print(f"{source}: not deleted ({error})", file=sys.stderr, flush=True)

    async def _look_again(self) -> None:
        """What was written is seen here at once; other fronts look within a second."""
        with suppress(OSError):
            await self.reading(lambda snapshot: snapshot.rows, 0.0)

    async def upload(self, request: Request) -> tuple[str, str, dict[str, list[str]]]:
        """The file of a form, on disk; its name, and the form's other fields. 415 and 422 for what is no such form."""
        try:
            form = await request.form(max_files=1, max_fields=64, max_part_size=64 * 1024)
        except (MultiPartException, HTTPException) as error:
            detail = getattr(error, "message", None) or getattr(error, "detail", None) or "cannot be read"
            raise Refused(422, f"the form: {detail}") from None
        try:
            path = await self._spooled(form)
        finally:
            await form.close()
        fields: dict[str, list[str]] = {}
        for field, value in form.multi_items():
            if isinstance(value, str):
                fields.setdefault(field, []).append(value)
        upload: Any = form["file"]
        name = upload.filename or "upload"
        try:
            return path, require_text("the file's name", Path(name).name, LONGEST_ID), fields
        except Refused:
            Path(path).unlink(missing_ok=True)
            raise

    async def _spooled(self, form: Any) -> str:
        """The form's file on disk."""
        file = form.get("file")
        if file is None or isinstance(file, str) or not file.size:
            raise Refused(422, "the form: needs a `file` that is not empty")
        handle, path = await anyio.to_thread.run_sync(tempfile.mkstemp, ".video", "hbi-")
        with open(handle, "wb") as target:  # noqa: PTH123 (a descriptor)
            while piece := await file.read(1 << 20):
                await anyio.to_thread.run_sync(target.write, piece)
        return path

    async def examples(self) -> list[str]:
        """A few captions of the index, short ones first; none where it holds none."""
        captions = await self.reading(lambda snapshot: snapshot.captions(CAPTIONS_LOOKED_AT))
        short = [caption for caption in captions if len(caption) <= SHORT_CAPTION] or captions
        return short[:: -(-len(short) // EXAMPLES) or 1]

    async def health(self) -> dict[str, Any]:
        """What answers, with how many videos; 503 where the index cannot be reached."""
        snapshot = await self.reading(lambda snapshot: snapshot)
        if self.labels[0] != snapshot.version:
            splits = await self.reading(lambda _: snapshot.counts("split"))
            self.labels = (snapshot.version, {name: count for name, count in splits.items() if name})
        about = self.table.metadata
        return {
            "status": "ok",
            "model": about.model,
            "digest": about.digest,
            "videos": snapshot.rows,
            "splits": self.labels[1],
            "heads": list(self.heads),
            "read_only": self.settings.read_only,
            "key": bool(self.settings.api_key),
        }
