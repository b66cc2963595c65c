"""Serving under load: requests a second, and the milliseconds of the median and the slowest hundredth, by clients.

    python -m benchmarks.serving --index INDEX [--clients 1 4 16] [--seconds 15]

The bare loop is the same engine in one process, one sentence after another: what HTTP, Ray Serve and batching cost or
bring is the difference. Everything stays on this machine, and ends by itself.
"""

import http.client
import json
import socket
import statistics
import threading
import time
from typing import Any

import tyro

from benchmarks.report import report

SENTENCES = tuple(f"the {colour} {shape} moves {way}" for colour in ("red", "blue", "green") for shape in
                  ("square", "circle", "star") for way in ("left", "right", "up", "down"))  # fmt: skip


def percentiles(milliseconds: list[float], seconds: float) -> dict[str, float]:
    ordered = sorted(milliseconds)
    return {
        "requests_per_second": len(ordered) / seconds,
        "p50_ms": statistics.median(ordered),
        "p99_ms": ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))],
    }


def bare_loop(folder: str, tracking: str, index: str, seconds: float, k: int) -> dict[str, float]:
    """The engine alone."""
    from hbi.serving.engine import Engine
    from hbi.serving.questions import Page

    engine = Engine(folder, tracking, index)
    engine.find(engine.encode(SENTENCES[:1])[0], Page(k))
    times, began = [], time.perf_counter()
    while (now := time.perf_counter()) - began < seconds:
        engine.find(engine.encode([SENTENCES[len(times) % len(SENTENCES)]])[0], Page(k))
        times.append(1000 * (time.perf_counter() - now))
    return percentiles(times, time.perf_counter() - began)


def load(port: int, clients: int, seconds: float, k: int) -> dict[str, float]:
    """So many clients, each sending its next sentence when the last one was answered."""
    times: list[float] = []
    failed: list[int] = []
    ending = time.perf_counter() + seconds

    def client(number: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        sent = number
        while (now := time.perf_counter()) < ending:
            body = json.dumps({"text": SENTENCES[sent % len(SENTENCES)], "k": k})
            connection.request("POST", "/search", body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            answer.read()
            if answer.status != 200:
                failed.append(answer.status)
            times.append(1000 * (time.perf_counter() - now))
            sent += clients
        connection.close()

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return percentiles(times, seconds) | {"failed": len(failed)}


def main(
    index: str,
    clients: tuple[int, ...] = (1, 4, 16),
    seconds: float = 15.0,
    k: int = 10,
    replicas: int = 1,
) -> None:
    """The bare loop, and so many clients. index: one that `hbi index` made."""
    from hbi.infra.ray_runtime import ray_running
    from hbi.serving.front import model_of, start
    from hbi.serving.settings import ServeSettings

    answering = model_of(index)
    results: dict[str, Any] = {}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with (
        ray_running(),
        start(answering, index, ServeSettings(port=port, replicas=replicas, max_replicas=replicas)),
    ):
        load(port, 2, 2.0, k)
        for count in clients:
            results[f"clients_{count}"] = load(port, count, seconds, k)
            print(f"{count:3} clients", results[f"clients_{count}"], flush=True)
    # Last: where LanceDB is open already, Ray cannot be started without a fork of it.
    results["bare_loop"] = bare_loop(answering.folder, answering.tracking, index, seconds, k)
    print("bare loop ", results["bare_loop"], flush=True)
    report("serving", results, seconds=seconds, k=k, replicas=replicas)


if __name__ == "__main__":
    tyro.cli(main)
