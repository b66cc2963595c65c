"""The application on Ray Serve: replicas that answer, one writer, and what stands in front of them.

    Replica   holds the model and reads the index; as many as the load asks for; sentences are encoded in batches
    Writer    adds and removes, one after another: the only one, so that two clients cannot take the same id

A write is committed to the table before it is answered, and read by every replica within a second. Whatever is killed
is started anew by Serve; what was committed is in the table. `Backend` is how the front asks them.
"""

import asyncio
import functools
import sys
import threading
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from hbi.serving.index.rows import IndexUnavailable
from hbi.serving.index.table import ClipTable, IdInUse
from hbi.serving.media import remove_strays
from hbi.serving.questions import NewClip, Page, Span
from hbi.serving.refusal import Refused
from hbi.serving.settings import ServeSettings

TRIES = 4
"""How often a request is sent whose replica died."""
DRAINED_SECONDS = 0.2
"""How often a replica that is told to go looks for requests that it still has; Serve's 2 s are too long for Ctrl-C."""
MAINTAINED_AFTER = 50
"""Writes from one time that the table is looked after to the next; the first is after the first write."""
RETRY = {"Retry-After": "1"}


def answered(
    method: Callable[..., Awaitable[Any]],
) -> Callable[..., Awaitable[tuple[int, Any, dict[str, str]]]]:
    """Status, content and headers, whatever happens: exceptions of ours do not travel through Ray."""

    @functools.wraps(method)
    async def answer(*args: Any) -> tuple[int, Any, dict[str, str]]:
        try:
            return 200, await method(*args), {}
        except Refused as refused:
            return refused.status, refused.detail, refused.headers
        except IndexUnavailable as error:
            return 503, str(error), RETRY

    return answer


class Replica:
    """One process with the model."""

    def __init__(self, model: str, tracking: str, index: str, settings: ServeSettings) -> None:
        # In here, so that the writer and the front do without the model.
        from hbi.serving.engine import Engine

        self.engine = Engine(model, tracking, index, gpu=settings.replica_gpus > 0)
        batches: Any = self._encode
        batches.set_max_batch_size(settings.batch_queries)
        batches.set_batch_wait_timeout_s(settings.batch_wait_seconds)

    @serve.batch
    async def _encode(self, texts: list[str]) -> list[Any]:
        return await asyncio.to_thread(self.engine.encode, texts)

    @answered
    async def find(self, text: str, page: Page) -> dict[str, Any]:
        """`Engine.find`."""
        return await asyncio.to_thread(self.engine.find, await self._encode(text), page)

    @answered
    async def like(self, id: str, page: Page) -> dict[str, Any]:
        """`Engine.like`."""
        return await asyncio.to_thread(self.engine.like, id, page)

    @answered
    async def find_example(self, place: str, page: Page) -> dict[str, Any]:
        """`Engine.find_example`."""
        return await asyncio.to_thread(self.engine.find_example, place, page)

    @answered
    async def explain(self, text: str, id: str) -> dict[str, Any]:
        """`Engine.explain`."""
        return await asyncio.to_thread(self.engine.explain, await self._encode(text), id)

    @answered
    async def answer(self, clip: Span, question: str, answers: list[str] | None) -> list[tuple[str, float]]:
        """`Engine.answer`."""
        return await asyncio.to_thread(self.engine.answer, clip, question, answers)

    @answered
    async def caption(self, clip: Span) -> str:
        """`Engine.caption`."""
        return await asyncio.to_thread(self.engine.caption, clip)

    @answered
    async def rows(self, new: NewClip) -> bytes:
        """`Engine.rows`, as an Arrow stream."""
        return to_stream(await asyncio.to_thread(self.engine.rows, new))


class Writer:
    """The one who writes."""

    def __init__(self, index: str) -> None:
        self.table = ClipTable.open(index)
        # Of threads: one whose client was answered 504 still writes, and the next waits for it.
        self.turn = threading.Lock()
        self.writes = 0
        self.maintenance: asyncio.Task[None] | None = None

    @answered
    async def add(self, rows: bytes, replace: bool) -> dict[str, Any]:
        """Adds the rows of one request; 409 where their id is in use. The same request again changes nothing."""
        await asyncio.to_thread(self._add, pa.ipc.open_stream(rows).read_all(), replace)
        self._look_after()
        return {"videos": await self._rows()}

    def _add(self, rows: pa.Table, replace: bool) -> None:
        with self.turn:
            try:
                self.table.add(rows, replace)
            except IdInUse as used:
                held = self.table.snapshot().clip(str(used))
                if held.part != rows["part"][0].as_py():
                    raise Refused(
                        409, f"id {str(used)!r} is in use: choose another, or ask to replace it"
                    ) from None

    @answered
    async def remove(self, id: str) -> dict[str, Any]:
        """Removes a clip; its source, and how many are left. The same request again changes nothing, and has none."""
        source = await asyncio.to_thread(self._remove, id)
        self._look_after()
        return {"source": source, "videos": await self._rows()}

    def _remove(self, id: str) -> str | None:
        with self.turn:
            try:
                clip = self.table.snapshot().clip(id)
                self.table.remove([id])
            except KeyError:
                return None
            return clip.source

    async def _rows(self) -> int | None:
        """How many clips there are; None where the storage fails now that the write is done."""
        try:
            return (await asyncio.to_thread(self.table.snapshot)).rows
        except IndexUnavailable:
            return None

    def _look_after(self) -> None:
        self.writes += 1
        if self.writes % MAINTAINED_AFTER == 1 and (self.maintenance is None or self.maintenance.done()):
            self.maintenance = asyncio.create_task(self._maintain())

    async def _maintain(self) -> None:
        try:
            await asyncio.to_thread(self.table.maintain)
            await asyncio.to_thread(remove_strays, self.table)
        except OSError as error:  # a write came between, or the storage fails: the next time
            print(f"the index could not be put in order: {error}", file=sys.stderr)


class Together:
    """Nothing but the root of the application that the two belong to."""

    def __init__(self, *parts: Any) -> None:
        self.parts = parts


def to_stream(rows: pa.Table) -> bytes:
    """An Arrow table as bytes."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, rows.schema) as writer:
        writer.write_table(rows)
    return sink.getvalue().to_pybytes()


class Backend:
    """Asks replicas and the writer, and says in HTTP's words what became of it."""

    def __init__(self, replica: Any, writer: Any, seconds: float) -> None:
        """replica, writer: handles of the deployments. seconds: how long an answer may take."""
        self.handles = {"replica": replica, "writer": writer}
        self.seconds = seconds

    async def ask(self, whom: str, method: str, *args: Any, patience: float = 1.0) -> Any:
        """What a method answers; Refused otherwise. patience: how many times as long as usual it may take."""
        for attempt in range(TRIES):
            response = getattr(self.handles[whom], method).remote(*args)
            try:
                status, content, headers = await asyncio.wait_for(response, patience * self.seconds)
            except TimeoutError:
                response.cancel()
                raise Refused(504, f"no answer within {patience * self.seconds:g} s") from None
            except BackPressureError:
                raise Refused(503, "too many requests wait already: ask again in a moment", RETRY) from None
            except (RayActorError, DeploymentUnavailableError):
                # The replica was killed: another one, or the next life of this one, answers.
                await asyncio.sleep(0.2 * 3**attempt)
                continue
            except RayTaskError as error:
                cause = error.cause if isinstance(error.cause, Exception) else error
                raise cause from None
            if status != 200:
                raise Refused(status, content, headers)
            return content
        raise Refused(503, "no replica answers: ask again in a moment", RETRY)


def deployments(model: str, tracking: str, index: str, settings: ServeSettings) -> tuple[Any, Any]:
    """The two deployments, bound. model: a folder or a pinned name."""
    secretless = replace(settings, host="127.0.0.1", api_key="")  # replicas need no key
    scaling: dict[str, Any] = {"num_replicas": settings.replicas}
    if settings.most_replicas > settings.replicas:
        scaling = {
            "autoscaling_config": {
                "min_replicas": settings.replicas,
                "max_replicas": settings.most_replicas,
                "target_ongoing_requests": settings.replica_load,
                "upscale_delay_s": settings.grow_seconds,
                "downscale_delay_s": settings.shrink_seconds,
            }
        }
    replica = (
        _deployment(Replica)
        .options(
            **scaling,
            max_ongoing_requests=settings.ongoing,
            max_queued_requests=settings.queued,
            ray_actor_options={"num_cpus": settings.replica_cpus, "num_gpus": settings.replica_gpus},
            health_check_period_s=2,
            graceful_shutdown_wait_loop_s=DRAINED_SECONDS,
            health_check_timeout_s=30,
        )
        .bind(model, tracking, index, secretless)
    )
    writer = (
        _deployment(Writer)
        .options(
            max_ongoing_requests=64,
            max_queued_requests=settings.queued,
            ray_actor_options={"num_cpus": 0.1},
            health_check_period_s=2,
            graceful_shutdown_wait_loop_s=DRAINED_SECONDS,
        )
        .bind(index)
    )
    return replica, writer


def _deployment(kind: type) -> Any:
    return serve.deployment(kind)


def together(replica: Any, writer: Any) -> Any:
    """One application of the two."""
    return (
        _deployment(Together)
        .options(ray_actor_options={"num_cpus": 0}, graceful_shutdown_wait_loop_s=DRAINED_SECONDS)
        .bind(replica, writer)
    )


def logs() -> str:
    """Where Ray keeps what the replicas say, on this machine."""
    from ray._private import worker

    node: Any = worker._global_node
    return str(Path(node.get_logs_dir_path(), "serve"))


def prometheus() -> str:
    """Where Prometheus reads this machine's metrics, or nothing where Ray has none."""
    import ray

    ports = [
        f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        for node in ray.nodes()
        if node.get("Alive") and node.get("MetricsExportPort")
    ]
    return ports[0] if ports else ""
