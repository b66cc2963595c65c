"""`hbi demo`: the whole chain on a laptop, through the same functions as the commands, and a table of what came of it.

Every stage resumes by itself: the corpus and the shards redo only what is missing, training goes on from its last
checkpoint, and a demo that ended is only shown again. Other settings in the same folder start clean.
"""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hbi.commands.corpora import Corpus
from hbi.commands.search import BuildIndex
from hbi.commands.training import Train

QUESTIONS = (
    "the red square moves left",
    "the blue star grows then the yellow circle moves down",
    "first a green cross spins and after that a green cross goes away",
)
DEFAULT_CLIPS = 2000
"""With fewer there is too little to learn from to ask for a score."""
MODEL = "models:/hbi@champion"


@dataclass(frozen=True)
class DemoSettings:
    """What the demo makes, and what it leaves running."""

    out: str = "demo-out"
    """Folder for everything that the demo makes."""
    clips: int = DEFAULT_CLIPS
    """How many clips to make; a tenth of them is the test."""
    seed: int = 0
    """Of the corpus and of the training."""
    serve: bool = False
    """Keep the search page and the MLflow UI up at the end, until Ctrl-C."""
    fresh: bool = False
    """Start clean even where an earlier demo could be resumed."""
    port: int = 8000
    """Of the search page; the MLflow UI takes the next one."""


@dataclass
class Demo:
    """What a demo folder holds: its settings, and the seconds and results of the stages that ended."""

    folder: Path
    """Everything lies under it."""
    settings: dict[str, Any]
    """Number of clips and seed."""
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By name, in order: `{"seconds", …}`."""

    @property
    def file(self) -> Path:
        return self.folder / "demo.json"

    def path(self, name: str) -> str:
        """Something in the folder."""
        return str(self.folder / name)

    def open(self, fresh: bool) -> None:
        """Resumes what lies in the folder, or starts clean, and says which."""
        held = json.loads(self.file.read_text()) if self.file.exists() else None
        if held and held["settings"] == self.settings and not fresh:
            self.stages = held["stages"]
            done = ", ".join(self.stages) or "nothing yet"
            print(f"Resuming the demo in {self.folder} (done: {done}). --fresh starts clean.")
            return
        if held:
            print(f"Starting clean: removing the demo in {self.folder}.")
            shutil.rmtree(self.folder)
        elif self.folder.exists() and any(self.folder.iterdir()):
            raise ValueError(f"--out {self.folder}: not empty and not a demo's folder: choose another")
        else:
            print(f"Starting clean in {self.folder}.")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.save()

    def save(self) -> None:
        self.file.write_text(json.dumps({"settings": self.settings, "stages": self.stages}, indent=1))

    @contextmanager
    def stage(self, name: str, what: str) -> Iterator[dict[str, Any]]:
        """Times a stage and keeps what it puts into the dictionary; a stage that fails is not kept."""
        print(f"\n== {name}: {what}", flush=True)
        started = time.perf_counter()
        result: dict[str, Any] = {}
        yield result
        self.stages[name] = {"seconds": round(time.perf_counter() - started, 1), **result}
        self.save()


def run(settings: DemoSettings) -> None:
    """The demo. ValueError: the folder is someone else's, or the port is taken; RuntimeError: R@1 is near chance."""
    from hbi.infra.ray_runtime import ray_running
    from hbi.serving.app import free_port

    free_port("127.0.0.1", settings.port)
    folder = Path(settings.out).resolve()
    demo = Demo(folder, {"clips": settings.clips, "seed": settings.seed})
    demo.open(settings.fresh)
    tracking = f"sqlite:///{folder / 'mlflow.db'}"
    if "corpus" not in demo.stages:
        with demo.stage("corpus", "H.264 clips of moving shapes, with captions and questions"):
            Corpus(demo.path("corpus"), settings.clips, settings.seed).run()
    with ray_running():
        if "shard" not in demo.stages:
            _shard(demo)
        if "train" not in demo.stages:
            _train(demo, tracking)
        if "index" not in demo.stages:
            with demo.stage("index", f"the frame tokens of every clip, by {MODEL}"):
                BuildIndex(MODEL, demo.path("shards"), demo.path("index"), tracking=tracking).run()
        _search(demo, tracking, settings.port)
        print(table(demo), flush=True)
        if settings.serve:
            _keep_serving(tracking, settings.port)
    metrics = demo.stages["train"]["metrics"]
    if settings.clips >= DEFAULT_CLIPS and metrics["test/t2v/R@1"] < 1000 / metrics["test/videos"]:
        raise RuntimeError("text-to-video R@1 is under ten times chance: the model or its training is wrong")


def _shard(demo: Demo) -> None:
    from hbi.pipelines.sharding.run import shard
    from hbi.pipelines.sharding.settings import ShardSettings
    from hbi.training.runs.table import RUNS

    model = RUNS["demo"].model
    with demo.stage("shard", "Ray Data decodes them into WebDataset tars") as result:
        settings = ShardSettings(frames=model.frames, size=model.towers.image_size)
        made = shard(demo.path("corpus/manifest.jsonl"), demo.path("shards"), settings)
        print(made)
        result.update(rows=made.rows, samples=made.samples, failures=made.rows - made.samples)


def _train(demo: Demo, tracking: str) -> None:
    from hbi.training.runs.table import RUNS

    with demo.stage("train", "Ray Train, two workers over gloo; MLflow tracks and registers") as result:
        config = replace(RUNS["demo"], seed=demo.settings["seed"])
        made = Train("demo", demo.path("shards"), config, demo.path("run"), tracking).run()
        result.update(metrics=made.metrics, run_id=made.run_id)


def _search(demo: Demo, tracking: str, port: int) -> None:
    from hbi.infra.mlflow.resolve import resolve_model
    from hbi.serving.app import start

    with demo.stage("search", f"Ray Serve answers over HTTP with {MODEL}"):
        address = start(resolve_model(MODEL, tracking), demo.path("index"), port=port)
        captions = _captions(Path(demo.path("corpus/manifest.jsonl")))
        for question in QUESTIONS:
            print(f"\n  “{question}”")
            for result in _ask(address, question, 3):
                print(f"    {result['score']:.3f}  {result['id']}  {captions[result['id']]}")


def _ask(address: str, text: str, k: int) -> list[dict[str, Any]]:
    body = json.dumps({"text": text, "k": k}).encode()
    request = urllib.request.Request(f"{address}/search", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)["results"]


def _captions(manifest: Path) -> dict[str, str]:
    """The first caption of every clip."""
    rows = map(json.loads, manifest.read_text().splitlines())
    return {row["id"]: row["captions"][0] for row in rows}


def table(demo: Demo) -> str:
    """What came of it: clips, seconds, and retrieval on the test split beside chance."""
    from hbi.training.evaluate.table import table as retrieval

    shard, metrics = demo.stages["shard"], demo.stages["train"]["metrics"]
    ratio = metrics["test/t2v/R@1"] * metrics["test/videos"] / 100
    return "\n".join(
        [
            "",
            f"clips    {shard['rows']} in the manifest = {shard['samples']} samples + {shard['failures']} failures",
            "seconds  " + ", ".join(f"{name} {stage['seconds']:.0f}" for name, stage in demo.stages.items()),
            retrieval(metrics, "test"),
            f"text-to-video R@1 is {ratio:.1f} times chance",
        ]
    )


def _keep_serving(tracking: str, port: int) -> None:
    """Keeps the page up, and the MLflow UI beside it, until Ctrl-C."""
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--backend-store-uri",
        tracking,
        "--port",
        str(port + 1),
    ]
    # Its job runners would outlive it, and nothing here needs them.
    quiet = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    nowhere = subprocess.DEVNULL
    with subprocess.Popen([*command, "--workers", "1"], env=quiet, stdout=nowhere, stderr=nowhere) as ui:
        try:
            print(
                f"\nsearch page  http://127.0.0.1:{port}/\nMLflow UI    http://127.0.0.1:{port + 1}/\nCtrl-C ends both"
            )
            threading.Event().wait()
        finally:
            ui.terminate()
