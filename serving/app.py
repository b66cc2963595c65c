"""The Ray Serve application: a sentence in, ranked videos out, and the reason for each; with the page at `/`."""

import asyncio
import logging
import socket
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from fastapi import FastAPI, HTTPException
from fastapi.responses import FileResponse, HTMLResponse, Response
from pydantic import BaseModel, Field
from ray import serve

from hbi.infra import storage
from hbi.model.frames import from_jpegs
from hbi.model.tokenizer import load_tokenizer
from hbi.model.weights import load_model
from hbi.pipelines.decoding.clip import Clip, DecodeError
from hbi.pipelines.decoding.decoder import Decoder
from hbi.serving.index.table import TokenIndex, Video, encode_query, encode_video

api = FastAPI(title="hbi", description="Text-to-video search by Hierarchical Banzhaf Interaction.")
APP_NAME = "hbi"


class SearchRequest(BaseModel):
    """A sentence, and how many videos to answer with."""

    text: Annotated[str, Field(min_length=1, max_length=2000)]
    k: Annotated[int, Field(ge=1, le=1000)] = 10


class Result(BaseModel):
    """One video of an answer."""

    id: str
    score: float
    video: str
    start: float
    end: float


class SearchResponse(BaseModel):
    """Videos, best first."""

    results: list[Result]


class ExplainRequest(BaseModel):
    """A sentence, and the video whose match with it is to be explained."""

    text: Annotated[str, Field(min_length=1, max_length=2000)]
    id: str


class Explanation(BaseModel):
    """The exact Banzhaf interaction of every word with every frame: `interaction[word][frame]`."""

    words: list[str]
    times: list[float]
    interaction: list[list[float]]


class NewVideo(BaseModel):
    """A video to add to the index that is being served (not to the folder it came from)."""

    video: str
    id: str | None = None
    start: float | None = None
    end: float | None = None


# Above the deployment: Serve takes the class along as it stands when it is decorated, with what it can see by then.
def _unknown(id: str) -> HTTPException:
    return HTTPException(404, f"no video {id!r} in the index")


@serve.deployment(max_ongoing_requests=16, max_queued_requests=128, ray_actor_options={"num_cpus": 0.5})
@serve.ingress(api)
class Search:
    """One replica: the model, the tokenizer and the index in memory."""

    def __init__(self, model_folder: str, index_folder: str) -> None:
        self.model = load_model(model_folder).eval()
        self.tokenizer = load_tokenizer(model_folder)
        self.index = TokenIndex.open(index_folder)
        self.adding = asyncio.Lock()

    @api.post("/search")
    def search(self, request: SearchRequest) -> SearchResponse:
        """The `k` videos that match the sentence best, best first; the score is the weighted token-wise similarity."""
        query, _ = encode_query(self.model, self.tokenizer, request.text)
        found = self.index.search(query, request.k)
        return SearchResponse(
            results=[Result(id=v.id, score=s, video=v.video, start=v.start, end=v.end) for s, v in found]
        )

    @api.post("/explain")
    def explain(self, request: ExplainRequest) -> Explanation:
        """Which word met which frame."""
        query, words = encode_query(self.model, self.tokenizer, request.text)
        try:
            interaction, video = self.index.explain(query, request.id)
        except KeyError:
            raise _unknown(request.id) from None
        interaction = interaction[:, : len(video.timestamps)]
        return Explanation(words=words, times=video.timestamps, interaction=interaction.tolist())

    @api.post("/videos", status_code=201)
    async def add(self, request: NewVideo) -> dict[str, Any]:
        """Adds a video (a path or URI that the server can read), cut as the index's shards were; same id replaces."""
        id = request.id or Path(request.video).stem
        try:
            frames, clip = await asyncio.to_thread(self._decode, request)
        except (OSError, ValueError, DecodeError) as error:
            raise HTTPException(422, f"{request.video}: {error}") from None
        tokens = await asyncio.to_thread(encode_video, self.model, frames[None])
        async with self.adding:
            video = Video(id, request.video, clip.start, clip.end, clip.timestamps)
            self.index = self.index.plus(tokens, [video])
        return {"id": id, "frames": len(frames), "videos": len(self.index.videos)}

    @api.delete("/videos/{id:path}")
    async def remove(self, id: str) -> dict[str, Any]:
        """Removes a video from the index that is being served."""
        async with self.adding:
            try:
                self.index = self.index.without([id])
            except KeyError:
                raise _unknown(id) from None
        return {"id": id, "videos": len(self.index.videos)}

    @api.get("/media/{id:path}")
    def media(self, id: str) -> Response:
        """The source video of an id in the index, for the page."""
        try:
            video = self.index.videos[self.index.position(id)]
        except KeyError:
            raise _unknown(id) from None
        try:
            if storage.is_remote(video.video):
                return Response(storage.read_bytes(video.video), media_type="video/mp4")
            if not Path(video.video).is_file():
                raise FileNotFoundError
            return FileResponse(video.video)
        except OSError:
            raise HTTPException(404, f"{video.video}: the source video cannot be read") from None

    @api.get("/health")
    def health(self) -> dict[str, Any]:
        """Whether it serves, what, and how many videos."""
        return {"status": "ok", "model": self.index.maker.model, "videos": len(self.index.videos)}

    @api.get("/")
    def page(self) -> HTMLResponse:
        """The search page."""
        return HTMLResponse((Path(__file__).parent / "page" / "index.html").read_text())

    def _decode(self, request: NewVideo) -> tuple[np.ndarray, Clip]:
        """The clip cut as the shards were, through the same JPEG: its tokens equal those of a sharded clip."""
        with Decoder.of_settings(self.index.maker.shards) as decoder:
            clip = decoder.decode(storage.read_bytes(request.video), request.start, request.end)
        return from_jpegs(clip.jpegs), clip


def free_port(host: str, port: int) -> None:
    """ValueError if nothing can listen there."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            raise ValueError(
                f"--port {port}: cannot listen on {host} ({error}): choose another --port"
            ) from None


def start(model_folder: str, index_folder: str, host: str = "127.0.0.1", port: int = 8000) -> str:
    """Deploys the application on the running Ray and returns its address; ValueError if the port is taken."""
    free_port(host, port)
    TokenIndex.open(index_folder)  # refuse what is no index here, in one line, not in a replica's log
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(http_options={"host": host, "port": port})
    serve.run(Search.bind(model_folder, storage.absolute(index_folder)), name=APP_NAME, route_prefix="/")
    return f"http://{host}:{port}"


def stop() -> None:
    """Takes the application and its HTTP proxy down."""
    serve.shutdown()
