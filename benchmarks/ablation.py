"""What each part of the method brings: the same towers, clips, steps and batches for every row, three seeds.

python -m benchmarks.ablation                      clips whose things are seen only in their own moment
python -m benchmarks.ablation --kind stories       the demo's clips, on which most things stay in view

Beside R@1 on the test split, probes that are right half the time by chance: the clip as it is against the clip played
backwards, a caption against the same with two clauses exchanged, or with one word changed. And what the explanations
are worth (`hbi.training.evaluate.explanations`). Every row and seed is an MLflow run (`hbi runs --tracking STORE`), the
whole a table and a picture; what is measured already is not measured again.
"""

import json
import statistics
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from torch import Tensor

from benchmarks.ablation_rows import ROWS, Row, Score
from benchmarks.interaction import train_predictor
from benchmarks.report import report
from hbi.commands.corpora import Corpus
from hbi.infra.mlflow.tracker import Tracker
from hbi.model.config import ModelConfig
from hbi.model.hbi import HBI
from hbi.model.losses import with_teacher
from hbi.model.metrics import retrieval_metrics
from hbi.model.tokenizer import tokenize, train_tokenizer
from hbi.model.tokens import Tokens
from hbi.pipelines.corpus.captions import caption
from hbi.pipelines.corpus.scripts import ACTIONS, COLOURS, SHAPES, Clause, Entity, Kind, Script, make_scripts
from hbi.pipelines.sample import ShardIndex
from hbi.training.evaluate.encode import readable
from hbi.training.evaluate.explanations import explanation_metrics
from hbi.training.optim import EMA, make_optimizer, schedule, set_learning_rate
from hbi.training.parallel import clip_gradients
from hbi.training.runs.table import RUNS
from hbi.training.settings import flatten

Levels = dict[str, Tokens]
SHOWN = {
    "t2v/R@1": "t2v R@1", "v2t/R@1": "v2t R@1", "probe/backwards": "backwards", "probe/exchanged": "exchanged",
    "probe/word": "one word", "explain/frames/token interaction/deletion": "deletion, interaction",
    "explain/frames/similarity/deletion": "deletion, similarity",
    "explain/frames/input values/deletion": "deletion, input values",
    "explain/pointing/token interaction": "pointing, interaction",
    "explain/pointing/similarity": "pointing, similarity",
    "explain/pointing/input values": "pointing, input", "explain/moment/input values/IoU": "IoU, input",
}  # fmt: skip


@dataclass(frozen=True)
class Ablation:
    """What is trained, and on what."""

    kind: Kind = "moments"
    """Of the corpus."""
    out: str = "ablation"
    """Folder for corpora, shards, results, MLflow's store and the picture."""
    clips: int = 6000
    """Of the corpus, test and validation among them."""
    steps: int = 800
    """Of training."""
    batch: int = 64
    """Pairs in a step."""
    lr: float = 1.5e-3
    """The largest learning rate."""
    seeds: int = 3
    """How often each row is trained; its weights and the order of its clips differ."""
    matches: int = 30
    """Clips whose explanations are measured."""
    processes: int = 2
    """Rows that are trained at the same time, one thread each."""
    rows: tuple[int, ...] = ()
    """Places of the rows in `ROWS` to train; none: all."""

    @property
    def frames(self) -> int:
        return 6 if self.kind == "stories" else 8

    @property
    def shards(self) -> str:
        return f"{self.out}/{self.kind}/shards"

    def run(self) -> None:
        folder = Path(self.out) / self.kind
        self._prepare(folder)
        results = folder / "results.jsonl"
        settings = {
            name: getattr(self, name) for name in ("kind", "clips", "steps", "batch", "lr", "matches")
        }
        held = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
        held = [entry for entry in held if entry["settings"] == settings]
        done = {(entry["row"], entry["seed"]) for entry in held}
        jobs = [
            (row, seed)
            for seed in range(self.seeds)
            for row in self.rows or range(len(ROWS))
            if (row, seed) not in done
        ]
        context = get_context("spawn")
        with ProcessPoolExecutor(self.processes, context) as pool, results.open("a") as file:
            waiting = {pool.submit(train_row, self, *job): job for job in jobs}
            for future in as_completed(waiting):
                row, seed = waiting[future]
                seconds, measured = future.result()
                entry = {
                    "row": row,
                    "seed": seed,
                    "seconds": seconds,
                    "settings": settings,
                    "measured": measured,
                }
                held.append(entry)
                file.write(json.dumps(entry) + "\n")
                file.flush()
                self._track(entry)
                for name, metrics in measured.items():
                    print(f"{name}  seed {seed}  R@1 {metrics['t2v/R@1']:.1f}  {seconds:.0f} s", flush=True)
        means = summary(held)
        print(table(means, Counter(name for entry in held for name in entry["measured"])))
        picture(means, folder / "ablation.svg")
        report("ablation", means, **settings, seeds=self.seeds)

    def _prepare(self, folder: Path) -> None:
        """Corpus and shards, where they are not there yet."""
        from hbi.infra.ray_runtime import ray_running
        from hbi.pipelines.sharding.run import shard
        from hbi.pipelines.sharding.settings import ShardSettings

        corpus = str(folder / "corpus")
        if not Path(corpus, "manifest.jsonl").exists():
            Corpus(corpus, self.clips, kind=self.kind).run()
        if not Path(self.shards, "index.json").exists():
            with ray_running():
                print(
                    shard(f"{corpus}/manifest.jsonl", self.shards, ShardSettings(frames=self.frames, size=32))
                )

    def _track(self, entry: dict[str, Any]) -> None:
        """One MLflow run for each row and seed."""
        for name, metrics in entry["measured"].items():
            uri = f"sqlite:///{Path(self.out).absolute()}/mlflow.db"
            outbox = Path(self.out) / "outbox"
            with Tracker(uri, f"ablation-{self.kind}", f"{name}, seed {entry['seed']}", outbox) as tracker:
                row = ROWS[entry["row"]]
                tracker.params(
                    {
                        "row": name,
                        "seed": entry["seed"],
                        **entry["settings"],
                        **flatten({"loss": asdict(row.loss)}),
                    }
                )
                tracker.metrics({f"test/{key}": value for key, value in metrics.items()}, self.steps)

    def model(self, row: Row) -> ModelConfig:
        """The demo's towers, with places for the longest caption."""
        base = RUNS["demo"].model
        towers = replace(base.towers, context=48)
        return replace(base, towers=towers, words=48, frames=self.frames, checkpointing=False, **row.model)


@dataclass(frozen=True)
class Split:
    """The clips of a split, in memory."""

    video: Tensor
    """uint8 [clips, frames, height, width, 3]."""
    captions: list[list[str]]
    scripts: list[Script]


def train_row(bench: Ablation, number: int, seed: int) -> tuple[float, dict[str, dict[str, float]]]:
    """Trains one row; the CPU seconds that took, and what each of its scores measures."""
    torch.set_num_threads(1)
    row, index = ROWS[number], ShardIndex.read(bench.shards)
    scripts = make_scripts(bench.clips, 0, bench.kind)
    train, test = (in_memory(index, split, scripts, bench.frames) for split in ("train", "test"))
    tokenizer = train_tokenizer((c for each in train.captions for c in each), 512)
    torch.manual_seed(seed)
    model = row.kind(bench.model(row))
    if model.estimator is not None:
        predictor, _ = train_predictor(
            "cpu", 400, words=24, frames=bench.frames, width=model.config.predictor_width
        )
        model.estimator.load_state_dict(predictor.state_dict())
    started = time.process_time()
    fit(bench, row, model, train, tokenizer, seed)
    seconds = time.process_time() - started
    model.eval()
    explained: dict[str, float] = {}
    if row.explained:
        found = explanation_metrics(model, tokenizer, index, "test", bench.matches)
        explained = {name.removeprefix("test/"): value for name, value in found.items()}
    return seconds, {
        name: retrieval(model, tokenizer, test, score) | probes(model, tokenizer, test, score) | explained
        for name, score in row.names.items()
    }


def in_memory(index: ShardIndex, split: str, scripts: list[Script], frames: int) -> Split:
    """A split's clips with their scripts, which the clips' numbers tell."""
    total = sum(shard.samples for shard in index.of_split(split))
    found = list(readable(index, split, range(total), frames, []))
    return Split(
        torch.from_numpy(np.stack([images for _, images in found])),
        [sample.captions for sample, _ in found],
        [scripts[int(sample.id.removeprefix("clip-"))] for sample, _ in found],
    )


def fit(bench: Ablation, row: Row, model: HBI, train: Split, tokenizer: Any, seed: int) -> None:
    """The training: AdamW with the demo's schedule; one caption of each clip in turn."""
    settings = replace(RUNS["demo"].optim, lr=bench.lr, backbone_lr=bench.lr)
    optimizer = make_optimizer(model, settings)
    average = EMA(model, 0.99) if row.loss.teacher else None
    generator = np.random.default_rng(seed)
    order = np.empty(0, np.int64)
    model.train()
    for step in range(bench.steps):
        if len(order) < bench.batch:
            order = generator.permutation(len(train.video))
        clips, order = order[: bench.batch], order[bench.batch :]
        texts = [train.captions[i][generator.integers(len(train.captions[i]))] for i in clips]
        ids, mask = tokens(tokenizer, texts, model)
        video = train.video[torch.from_numpy(clips)]
        batch = ids, mask, video, torch.ones(video.shape[:2], dtype=torch.bool)
        taught = None
        if average is not None:
            with torch.no_grad(), average.swapped(model):
                taught = model(*batch, loss=row.loss)
        set_learning_rate(optimizer, schedule(step, bench.steps, settings.warmup, settings.floor))
        encoded = model(*batch, loss=row.loss)
        loss = row.losses(encoded if taught is None else with_teacher(encoded, taught))
        if not loss.isfinite():
            raise ValueError(f"{next(iter(row.names))}, seed {seed}: step {step}: loss {loss.item()}")
        loss.backward()
        clip_gradients(model, settings.clip)
        optimizer.step()
        optimizer.zero_grad()
        model.clamp_logit_scale()
        if average is not None:
            average.update(model, step)


def tokens(tokenizer: Any, texts: list[str], model: HBI) -> tuple[Tensor, Tensor]:
    """Ids and mask, no longer than the longest text needs."""
    ids, mask = tokenize(tokenizer, texts, model.config.words)
    longest = int(mask.sum(1).max())
    return ids[:, :longest], mask[:, :longest]


@torch.inference_mode()
def text_levels(model: HBI, tokenizer: Any, texts: list[str]) -> Levels:
    ids, mask = tokens(tokenizer, texts, model)
    return model.text_levels(model.encode_text(ids, mask)[0], mask)


@torch.inference_mode()
def video_levels(model: HBI, video: Tensor, backwards: bool = False) -> Levels:
    frames = torch.cat([model.encode_frames(part) for part in video.split(64)])
    present = torch.ones(video.shape[:2], dtype=torch.bool)
    return model.video_levels(model.over_time(frames.flip(1) if backwards else frames, present), present)


@torch.inference_mode()
def retrieval(model: HBI, tokenizer: Any, test: Split, score: Score) -> dict[str, float]:
    """Every caption against every clip."""
    texts = [text for captions in test.captions for text in captions]
    owners = [i for i, captions in enumerate(test.captions) for _ in captions]
    scores = score(text_levels(model, tokenizer, texts), video_levels(model, test.video))
    return retrieval_metrics(scores, owners)


@torch.inference_mode()
def probes(model: HBI, tokenizer: Any, test: Split, score: Score) -> dict[str, float]:
    """How often the right one of two scores higher, in percent; half a point where they score alike."""

    def own(texts: list[str], video: Levels) -> Tensor:
        return score(text_levels(model, tokenizer, texts), video).diagonal()

    generator = np.random.default_rng(0)
    changed = {"exchanged": exchanged, "word": word_changed}
    played, back = video_levels(model, test.video), video_levels(model, test.video, backwards=True)
    right = [caption(script) for script in test.scripts]
    base = own(right, played)
    found = {"probe/backwards": share(base, own(right, back))}
    for name, change in changed.items():
        wrong = [change(script, generator) for script in test.scripts]
        some = [i for i, script in enumerate(wrong) if script is not None]
        texts = [caption(script) for script in wrong if script is not None]
        part = {level: Tokens(*(tensor[some] for tensor in side)) for level, side in played.items()}
        found[f"probe/{name}"] = share(base[some], own(texts, part))
    return found


def share(right: Tensor, wrong: Tensor) -> float:
    """Percent of the pairs in which the right one is higher."""
    return float(100 * ((right > wrong).double() + 0.5 * (right == wrong).double()).mean())


def exchanged(script: Script, generator: np.random.Generator) -> Script | None:
    """Two neighbours change places; None where that changes nothing."""
    if len(script) < 2:
        return None
    first = int(generator.integers(len(script) - 1))
    other = (*script[:first], script[first + 1], script[first], *script[first + 2 :])
    return other if other != script else None


def word_changed(script: Script, generator: np.random.Generator) -> Script:
    """One colour, shape or action of one clause is another one."""
    which = int(generator.integers(len(script)))
    clause = script[which]
    words = [clause.entity.colour, clause.entity.shape, clause.action]
    place = int(generator.integers(3))
    others = [word for word in ([*COLOURS], [*SHAPES], [*ACTIONS])[place] if word != words[place]]
    words[place] = str(generator.choice(others))
    return (*script[:which], Clause(Entity(words[0], words[1]), words[2]), *script[which + 1 :])


def summary(held: list[dict[str, Any]]) -> dict[str, dict[str, tuple[float, float, float]]]:
    """Mean, lowest and highest over the seeds of each shown number, by row."""
    found: dict[str, dict[str, tuple[float, float, float]]] = {}
    for row in ROWS:
        for name in row.names:
            seeds = [entry["measured"][name] for entry in held if name in entry["measured"]]
            for metric, shown in SHOWN.items():
                values = [metrics[metric] for metrics in seeds if metric in metrics]
                if values:
                    found.setdefault(name, {})[shown] = (statistics.mean(values), min(values), max(values))
    return found


def table(means: dict[str, dict[str, tuple[float, float, float]]], seeds: Counter[str]) -> str:
    """Markdown: mean and range, over so many seeds."""
    columns = [shown for shown in SHOWN.values() if any(shown in row for row in means.values())]
    lines = ["| | seeds | " + " | ".join(columns) + " |", "| --- | --- |" + " --- |" * len(columns)]
    for name, row in means.items():
        cells = [spread(row[column]) if column in row else "" for column in columns]
        lines.append(f"| {name} | {seeds[name]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def spread(values: tuple[float, float, float]) -> str:
    """Mean and range; of one seed, the number."""
    mean, lowest, highest = values
    return f"{mean:.1f} ({lowest:.1f}-{highest:.1f})" if lowest < highest else f"{mean:.1f}"


def picture(means: dict[str, dict[str, tuple[float, float, float]]], path: Path) -> None:
    """R@1 and the probes, one bar a row, with the range over the seeds."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "ablation"  # the same numbers give the same file
    from matplotlib import pyplot

    shown = [
        c for c in ("t2v R@1", "backwards", "exchanged", "one word") if any(c in r for r in means.values())
    ]
    names = list(means)
    figure, axes = pyplot.subplots(1, len(shown), figsize=(12, 0.34 * len(names) + 1), sharey=True)
    for axis, column in zip(np.atleast_1d(axes), shown, strict=True):
        values = np.array([means[name].get(column, (np.nan,) * 3) for name in names])
        spread = np.stack([values[:, 0] - values[:, 1], values[:, 2] - values[:, 0]])
        axis.barh(names, values[:, 0], xerr=spread, color="#4a7ba6", ecolor="#222222", capsize=2)
        axis.set_title(column, fontsize=10)
        if column != "t2v R@1":
            axis.set_xlim(45, 100)
            axis.axvline(50, color="#999999", linewidth=0.8)
    np.atleast_1d(axes)[0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    print(f"picture  {path}", file=sys.stderr)


if __name__ == "__main__":
    tyro.cli(Ablation, description=__doc__).run()
