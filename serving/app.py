"""Search over HTTP: the endpoints, in front of the replicas on Ray Serve.

`hbi.serving.front` listens with it (uvicorn), or Serve's own proxies do. A client that does not read, or does not
finish what it sends, costs a socket and no replica. Every refusal is one line, `{"detail": …}`.
"""

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import anyio
import fastapi_offline
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import FileResponse, HTMLResponse, Response
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException

from hbi.infra import storage
from hbi.serving.auth import COOKIE, Bodies, Guard, Heads, same, session_of
from hbi.serving.deploy import logs
from hbi.serving.index.rows import IndexUnavailable
from hbi.serving.media import STORAGE_SECONDS, in_time, kind_of_static, look_at, play
from hbi.serving.operations import (
    LONGEST_TEXT,
    PATIENCE,
    AnswerRequest,
    Asked,
    CaptionRequest,
    ExplainRequest,
    Front,
    NewVideo,
    Plain,
    SearchRequest,
)
from hbi.serving.questions import Span
from hbi.serving.refusal import Refused, require_text

PAGE = Path(__file__).parent / "page"
DOCS = Path(fastapi_offline.__file__).parent / "static"
Kind = TypeVar("Kind", bound=CaptionRequest)


def build_api(front: Front) -> Any:
    """The whole application, ASGI: endpoints, and around them who may ask and how much."""
    api = FastAPI(
        title="hbi",
        description="Text-to-video search by Hierarchical Banzhaf Interaction.",
        docs_url=None,
        redoc_url=None,
        default_response_class=Plain,
    )
    _refusals(api)
    _searching(api, front)
    _telling(api, front)
    _videos(api, front)
    _pages(api, front)
    return Heads(Guard(Bodies(api, front.settings), front.settings))


def _searching(api: FastAPI, front: Front) -> None:
    ask = front.backend.ask

    @api.post("/search")
    async def search(request: SearchRequest) -> Any:
        """The `k` videos that match the sentence best, best first, or that are most like the video `like`."""
        page = front.page(request)
        if (request.text is None) == (request.like is None):
            raise Refused(422, "give either `text` or `like`")
        if request.like is not None and request.rerank:
            raise Refused(422, "rerank: scores a sentence again: give `text`, or leave it out")
        if request.like is not None:
            return Plain(await ask("replica", "like", (await front.clip(request.like)).id, page))
        return Plain(
            await ask("replica", "find", require_text("text", request.text or "", LONGEST_TEXT), page)
        )

    @api.post("/search/video", openapi_extra=_form("k", "offset"))
    async def search_by_video(request: Request) -> Any:
        """The videos that are most like the one in the form's `file`."""
        path, _, fields = await front.upload(_a_form(request))
        try:
            asked = Asked.model_validate({name: values[-1] for name, values in fields.items()})
            return Plain(await ask("replica", "find_example", path, front.page(asked), patience=PATIENCE))
        finally:
            Path(path).unlink(missing_ok=True)

    @api.post("/explain")
    async def explain(request: ExplainRequest) -> Any:
        """What each word and frame adds (`word_values`, `frame_values`), and each pair beyond what both add alone
        (`interaction[word][frame]`): Banzhaf's, in the game on what goes in."""
        text = require_text("text", request.text, LONGEST_TEXT)
        return Plain(await ask("replica", "explain", text, (await front.clip(request.id)).id))


def _telling(api: FastAPI, front: Front) -> None:
    @api.post("/answer", openapi_extra=_form("question", "answers", json=AnswerRequest))
    async def answer(request: Request) -> Any:
        """The answers to a question about a video, likeliest first: JSON with its `id`, or a form with a `file`."""
        front.require_head("qa")
        async with _asked(front, request, AnswerRequest) as (span, asked):
            return await front.answer(span, asked)

    @api.post("/caption", openapi_extra=_form(json=CaptionRequest))
    async def caption(request: Request) -> Any:
        """A caption of a video: JSON with its `id`, or a form with a `file`."""
        front.require_head("caption")
        async with _asked(front, request, CaptionRequest) as (span, asked):
            return await front.caption(span, asked)


def _videos(api: FastAPI, front: Front) -> None:
    @api.post(
        "/videos",
        status_code=201,
        openapi_extra=_form("id", "captions", "start", "end", "replace", json=NewVideo),
    )
    async def add(request: Request) -> Any:
        """Adds a video: JSON that names one inside the media roots, or a form with its `file`."""
        if _is_json(request):
            new = NewVideo.model_validate_json(await request.body() or b"null")
            place = await in_time(STORAGE_SECONDS, new.video[:300], front.roots.to_add, new.video)
            return await front.add(new, place, new.video)
        path, name, fields = await front.upload(_a_form(request))
        try:
            values: dict[str, Any] = {key: value[-1] for key, value in fields.items() if value[-1] != ""}
            values["captions"] = [caption for caption in fields.get("captions", []) if caption.strip()]
            new = NewVideo.model_validate(values | {"video": name})
            await anyio.to_thread.run_sync(look_at, path)
            return await front.add(new, path, name, upload=True)
        finally:
            Path(path).unlink(missing_ok=True)

    @api.delete("/videos/{id:path}")
    async def remove(id: str) -> Any:
        """Removes a video from the index; a file that was uploaded goes with it."""
        return await front.remove(id)

    @api.get("/videos/{id:path}")
    async def about(id: str) -> Any:
        """What the index knows of a video."""
        clip = await front.clip(id)
        names = ("id", "video", "start", "end", "captions", "split", "metadata")
        return Plain({name: getattr(clip, name) for name in names} | {"frames": len(clip.timestamps)})

    @api.get("/media/{id:path}")
    async def media(id: str, request: Request) -> Any:
        """The source video of an id, with ranges; `Clip-Start` and `Clip-End` say which part of it is the clip."""
        clip = await front.clip(id)
        place = await anyio.to_thread.run_sync(front.roots.inside, clip.source)
        times = {"Clip-Start": f"{clip.start:.6f}", "Clip-End": f"{clip.end:.6f}"}
        return await play(request, place, times)

    @api.get("/frames/{id:path}/{number}.jpg")
    async def frame(id: str, number: int) -> Any:
        """A small picture of one of the frames that the index holds, counted from 0."""
        clip = await front.clip(id)
        pictures = await front.reading(lambda snapshot: snapshot.thumbnails(clip.id))
        if not 0 <= number < len(pictures):
            raise Refused(404, f"no picture {number} of video {id!r}")
        return Response(
            pictures[number], media_type="image/jpeg", headers={"Cache-Control": "private, max-age=60"}
        )


def _pages(api: FastAPI, front: Front) -> None:
    policy = {
        "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; "
        "object-src 'none'; base-uri 'none'; frame-ancestors 'none'",
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }

    @api.get("/health")
    async def health() -> Any:
        """Whether it serves, which model answers, and how many videos there are."""
        return Plain(await front.health())

    @api.get("/examples")
    async def examples() -> Any:
        """Some captions of the index: sentences that find something."""
        return Plain({"examples": await front.examples()})

    @api.post("/session", include_in_schema=False)
    async def session(request: Request) -> Any:
        key = front.settings.api_key
        given = request.headers.get("authorization", "").partition(" ")[2].strip()
        if key and not same(given, key):
            raise Refused(401, "that is not the server's key", {"WWW-Authenticate": "Bearer"})
        answer = Plain({"status": "ok"})
        if key:
            answer.set_cookie(COOKIE, session_of(key), httponly=True, samesite="strict")
        return answer

    @api.get("/", include_in_schema=False)
    async def page() -> Any:
        return HTMLResponse((PAGE / "index.html").read_text(), headers=policy)

    @api.get("/page/{name}", include_in_schema=False)
    async def part(name: str) -> Any:
        if name not in {file.name for file in PAGE.iterdir()}:
            raise Refused(404, f"no file {name!r}")
        return FileResponse(PAGE / name, media_type=kind_of_static(name), headers=policy)

    @api.get("/docs", include_in_schema=False)
    async def docs() -> Any:
        # Addresses are relative: they hold behind any prefix.
        return get_swagger_ui_html(
            openapi_url="openapi.json",
            title="hbi",
            swagger_js_url="docs/swagger-ui-bundle.js",
            swagger_css_url="docs/swagger-ui.css",
            swagger_favicon_url="docs/favicon.png",
        )

    @api.get("/docs/{name}", include_in_schema=False)
    async def docs_part(name: str) -> Any:
        if name not in {file.name for file in DOCS.iterdir()}:
            raise Refused(404, f"no file {name!r}")
        return FileResponse(DOCS / name, media_type=kind_of_static(name))


def _refusals(api: FastAPI) -> None:
    @api.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        return Plain({"detail": error.detail}, error.status, error.headers)

    @api.exception_handler(IndexUnavailable)
    @api.exception_handler(storage.StorageError)
    async def unavailable(request: Request, error: Exception) -> Response:
        return Plain({"detail": str(error)}, 503, {"Retry-After": "2"})

    @api.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        return Plain({"detail": str(error.detail)}, error.status_code, dict(error.headers or {}))

    @api.exception_handler(ValidationError)
    @api.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: Any) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body") or "the body"
        return Plain({"detail": f"{where}: {first['msg']}"}, 422)

    @api.exception_handler(Exception)
    async def unforeseen(request: Request, error: Exception) -> Response:
        said = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        print(
            f"{request.method} {request.url.path} failed: {said}; logs: {logs()}", file=sys.stderr, flush=True
        )
        return Plain(
            {"detail": "the server failed at this request; its console says where the logs are"}, 500
        )


def _kind(request: Request) -> str:
    return request.headers.get("content-type", "").split(";")[0].strip().lower()


def _is_json(request: Request) -> bool:
    return _kind(request) == "application/json"


@asynccontextmanager
async def _asked(front: Front, request: Request, kind: type[Kind]) -> AsyncIterator[tuple[Span, Kind]]:
    """What is asked, and the video that it is about: one of the index, or a form's file while it is looked at."""
    if _is_json(request):
        asked = kind.model_validate_json(await request.body() or b"null")
        yield await front.span(asked.id), asked
        return
    path, name, fields = await front.upload(_a_form(request))
    try:
        given: dict[str, Any] = {key: values[-1] for key, values in fields.items()}
        if "answers" in fields:
            given["answers"] = fields["answers"]
        yield Span(path), kind.model_validate(given | {"id": name})
    finally:
        Path(path).unlink(missing_ok=True)


def _a_form(request: Request) -> Request:
    """The request itself; 415 where it brings neither JSON nor a form."""
    kind = _kind(request)
    if kind != "multipart/form-data":
        raise Refused(
            415, f"Content-Type {kind!r}: send application/json, or multipart/form-data with a `file`"
        )
    return request


def _form(*fields: str, json: type[BaseModel] | None = None) -> dict[str, Any]:
    """A form with a file, or JSON, for the schema."""
    properties: dict[str, Any] = {"file": {"type": "string", "format": "binary"}}
    properties |= {name: {"type": "string"} for name in fields}
    content = {"multipart/form-data": {"schema": {"type": "object", "properties": properties}}}
    if json is not None:
        content["application/json"] = {"schema": json.model_json_schema()}
    return {"requestBody": {"content": content}}
