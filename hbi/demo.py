"""`hbi demo`: the whole chain on a laptop, through the same functions as the commands, and a table of what came of it.

Every stage resumes by itself: the corpus and the shards redo only what is missing, training goes on from its last
checkpoint, and a demo that ended is only shown again. Other settings in the same folder start clean.
"""

import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hbi.answers import Clips, ask, count_verdicts, example_lines, verdict_table
from hbi.commands.corpora import Corpus
from hbi.commands.search import BuildIndex
from hbi.commands.training import Train
from hbi.pipelines.corpus.truth import Verdict

if TYPE_CHECKING:
    from hbi.serving.front import Served

FORMAT = 4
"""Of a demo folder: another version's is not resumed."""
DEFAULT_CLIPS = 14_000
"""With fewer there is too little to learn from to ask for a score."""
LEAST_RECALL = 45.0
"""Text-to-video R@1 on the test split, in percent, under which something is wrong."""
MODEL = "models:/hbi@champion"


@dataclass(frozen=True)
class DemoSettings:
    """What the demo makes, and what it leaves running."""

    out: str = "demo-out"
    """Folder for everything that the demo makes."""
    clips: int = DEFAULT_CLIPS
    """How many clips to make; a tenth of them is the test, 200 at most."""
    seed: int = 0
    """Of the corpus and of the training."""
    serve: bool = False
    """Keep the search page and the MLflow UI up at the end, until Ctrl-C."""
    fresh: bool = False
    """Start clean even where an earlier demo could be resumed."""
    port: int = 8000
    """Of the search page; the MLflow UI takes the next one that is free."""


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
        """Resumes what lies in the folder, or starts clean, and says which. ValueError: it is no demo's of ours."""
        held = self._held()
        if held and held["settings"] == self.settings and not fresh:
            if held["format"] != FORMAT:
                raise ValueError(
                    f"--out {self.folder}: another version of the demo made it: --fresh starts clean"
                )
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

    def _held(self) -> dict[str, Any] | None:
        """What the folder says of itself."""
        if not self.file.exists():
            return None
        try:
            held = json.loads(self.file.read_text())
            return {"format": held.get("format", 1), "settings": held["settings"], "stages": held["stages"]}
        except (json.JSONDecodeError, AttributeError, KeyError, TypeError):
            raise ValueError(
                f"{self.file}: not what a demo wrote: remove it, or choose another --out"
            ) from None

    def save(self) -> None:
        held = {"format": FORMAT, "settings": self.settings, "stages": self.stages}
        part = self.file.with_suffix(".part")
        part.write_text(json.dumps(held, indent=1))
        part.replace(self.file)  # a full disk leaves what was there

    @contextlib.contextmanager
    def stage(self, name: str, what: str) -> Iterator[dict[str, Any]]:
        """Times a stage and keeps what it puts into the dictionary; a stage that fails is not kept."""
        print(f"\n== {name}: {what}", flush=True)
        started = time.perf_counter()
        result: dict[str, Any] = {}
        yield result
        self.stages[name] = {"seconds": round(time.perf_counter() - started, 1), **result}
        self.save()


def run(settings: DemoSettings) -> None:
    """The demo. ValueError: too few clips, the folder is someone else's, or the port is taken; RuntimeError: R@1 is
    under `LEAST_RECALL`."""
    from hbi.infra.ray_runtime import ray_running
    from hbi.pipelines.corpus.make import check_clips
    from hbi.serving.front import free_port
    from hbi.serving.settings import IndexSettings

    check_clips(settings.clips)
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
        if "heads" not in demo.stages:
            _train_heads(demo, tracking)
        if "index" not in demo.stages:
            with demo.stage(
                "index", f"the frame tokens of the test clips, none of them trained on, by {MODEL}"
            ):
                made_of = IndexSettings(split="test")
                BuildIndex(MODEL, demo.path("shards"), demo.path("index"), made_of, tracking=tracking).run()
        with _served(demo, tracking, settings.port) as served:
            counted = _search(demo, served.address)
            _tell(demo)
            print(table(demo, counted), flush=True)
            recall = demo.stages["train"]["metrics"]["test/t2v/R@1"]
            if settings.clips >= DEFAULT_CLIPS and recall < LEAST_RECALL:
                raise RuntimeError(
                    f"text-to-video R@1 is {recall:.1f} %, under {LEAST_RECALL:.0f} %: "
                    "the model or its training is wrong"
                )
            if settings.serve:
                print(next_commands(Path(settings.out), tracking), flush=True)
                _keep_serving(tracking, settings.port)
    print(next_commands(Path(settings.out), tracking), flush=True)  # last, after whatever Ray says as it ends


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


def _train_heads(demo: Demo, tracking: str) -> None:
    from hbi.training.runs.table import RUNS

    with demo.stage("heads", "the same model learns to answer questions and to write captions") as result:
        config = replace(RUNS["demo-heads"], seed=demo.settings["seed"], init_from=demo.path("run/model"))
        made = Train("demo-heads", demo.path("shards"), config, demo.path("heads"), tracking).run()
        result.update(metrics=made.metrics, run_id=made.run_id)


def _tell(demo: Demo) -> None:
    """Three captions and three answers about clips that were not trained on, beside the truth."""
    import hbi

    rows = map(json.loads, Path(demo.path("corpus/manifest.jsonl")).read_text().splitlines())
    rows = [row for row in rows if row["split"] == "test" and row["qa"]]
    told = rows[:: max(1, len(rows) // 3)][:3]  # neighbours differ in a word
    model = hbi.load(demo.path("heads/model"))
    videos = [demo.path(f"corpus/{row['video']}") for row in told]
    print("\ncaptions and answers, of clips that were not trained on")
    for turn, (row, video, caption) in enumerate(
        zip(told, videos, model.caption(videos, beam=1), strict=True)
    ):
        asked = row["qa"][turn % len(row["qa"])]
        print(f"\n  {row['id']}  {row['captions'][0]}")
        print(f"    caption   {caption}")
        answer = model.answer(video, asked["question"])
        print(f"    {asked['question']} {answer} (it is: {asked['answer']})", flush=True)


def _served(demo: Demo, tracking: str, port: int) -> "Served":
    from hbi.serving.front import model_of, start
    from hbi.serving.settings import ServeSettings

    index = demo.path("index")
    settings = ServeSettings(port=port, media_root=[demo.path("corpus")])
    return start(model_of(index, MODEL, tracking), index, settings)


def _search(demo: Demo, address: str) -> dict[int, Counter[Verdict]]:
    """Asks the running search, prints a few answers, and counts them all."""
    clips = Clips.read(Path(demo.path("corpus/manifest.jsonl")), demo.settings["seed"])
    with demo.stage("search", f"Ray Serve answers over HTTP with {MODEL}"):
        for question in clips.examples():
            print("\n".join(example_lines(clips, question, ask(address, question.text, 3))))
        return count_verdicts(clips, address)


def table(demo: Demo, counted: dict[int, Counter[Verdict]]) -> str:
    """What came of it: clips, seconds, scores on the test split beside chance, and what the first answers are."""
    from hbi.training.evaluate.table import table as measured

    shard, metrics = demo.stages["shard"], demo.stages["train"]["metrics"]
    return "\n".join(
        [
            "",
            f"clips    {shard['rows']} in the manifest = {shard['samples']} samples + {shard['failures']} failures",
            "seconds  " + ", ".join(f"{name} {stage['seconds']:.0f}" for name, stage in demo.stages.items()),
            measured(metrics, "test"),
            measured(demo.stages["heads"]["metrics"], "test"),
            verdict_table(counted),
        ]
    )


def next_commands(out: Path, tracking: str) -> str:
    """What a person may do next, as it can be pasted."""
    hbi = shlex.quote(_command())
    python = shlex.quote(os.path.relpath(sys.executable) if _below(sys.executable) else sys.executable)
    index, store = shlex.quote(str(out / "index")), shlex.quote(tracking)
    return "\n".join(
        [
            "",
            "next, as it can be pasted here:",
            f"  {hbi} demo --out {shlex.quote(str(out))} --serve              # the search page and the MLflow UI",
            f"  {hbi} serve {MODEL} {index} --tracking {store}",
            f'  {hbi} search {index} "the red square moves left"',
            f"  {hbi} runs --tracking {store}",
            f"  {python} -m mlflow ui --backend-store-uri {store} --port 5000",
            f"  {hbi} import-dataset folder . VIDEOS mine.jsonl             # your own: VIDEOS is a folder of them",
            f"  {hbi} shard mine.jsonl mine-shards --frames 6 --size 32 && "
            f"{hbi} index {MODEL} mine-shards mine-index --tracking {store}",
        ]
    )


def _command() -> str:
    """How `hbi` is called here: by name where that finds this one, else by its place beside the Python that runs."""
    beside = Path(sys.executable).parent / "hbi"
    found = shutil.which("hbi")
    if found and Path(found).resolve() == beside.resolve():
        return "hbi"
    return os.path.relpath(beside) if _below(str(beside)) else str(beside)


def _below(path: str) -> bool:
    return not os.path.relpath(path).startswith("..")


def _keep_serving(tracking: str, port: int) -> None:
    """Keeps the page up, and the MLflow UI beside it, until Ctrl-C."""
    ui_port = _next_free(port + 1)
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--backend-store-uri",
        tracking,
        "--port",
        str(ui_port),
    ]
    # Its job runners would outlive it, and nothing here needs them.
    quiet = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    nowhere = subprocess.DEVNULL
    with subprocess.Popen([*command, "--workers", "1"], env=quiet, stdout=nowhere, stderr=nowhere) as ui:
        try:
            page, store = f"http://127.0.0.1:{port}/", f"http://127.0.0.1:{ui_port}/"
            print(f"\nsearch page  {page}\nMLflow UI    {store}\nCtrl-C ends both", flush=True)
            threading.Event().wait()
        finally:
            ui.terminate()


def _next_free(port: int) -> int:
    """The first port from this one on that nothing listens on."""
    from hbi.serving.front import free_port

    for candidate in range(port, min(port + 50, 65536)):
        with contextlib.suppress(ValueError):
            free_port("127.0.0.1", candidate)
            return candidate
    raise ValueError(f"--port {port - 1}: the 50 ports after it are all taken: choose another --port")
