"""What a training run is, as frozen dataclasses; `hbi.training.runs.table` has the named ones.

`hbi train RUN --data SHARDS --set.optim.lr 1e-3` changes any field; the resolved configuration lies beside every
checkpoint. A batch here is always the global batch: what the contrastive loss compares, over all workers.
"""

import json
import re
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal, get_type_hints

from hbi.model.config import DecodeSettings, LossSettings, ModelConfig

Task = Literal["retrieval", "qa", "caption"]
METRICS = {"retrieval": "t2v/R@1", "qa": "qa/accuracy", "caption": "caption/CIDEr"}
"""Tasks, and the metric that each is judged by."""

RETRIEVAL_METRIC = re.compile(r"(t2v|v2t|v2t-single(?!\+))(\+dsl|\+qbnorm)?/(R@(?:1|5|10|50))")
METRIC_RULE = (
    "t2v, v2t or v2t-single, then +dsl or +qbnorm where measured, then /R@1, /R@5, /R@10 or /R@50; or the name of a "
    "task that is trained, with a metric of it, as qa/accuracy or caption/CIDEr"
)


@dataclass(frozen=True)
class DataSettings:
    """Which samples, in which batches."""

    batch: int = 128
    """Clips in a step over all workers: each caption is told from batch - 1 others."""
    accumulate: int = 1
    """Micro-batches in which a worker encodes its share of the batch. Loss and gradient are those of the whole batch
    for any number of them (tokens first without a graph, then one micro-batch after the other with one): memory
    falls, at the cost of a second forward pass."""
    shuffle_window: int = 8
    """Shards over which samples are shuffled; also the shards that a loader worker holds open."""
    workers: int = 2
    """Loader processes of each training worker; 0 reads in the training process."""
    keep_mb: int = 0
    """Megabytes of decoded frames that each process that reads keeps: a corpus that fits is decoded once, and not in
    each epoch anew."""
    split: str = "train"
    """The split to train on."""
    paragraph: bool = False
    """All captions of a clip as one text, instead of one caption an epoch."""
    bad_samples: int = 100
    """Samples that may fail to be read in a run of the loop, over all workers, before it stops."""
    cache: str = ""
    """Folder for shards fetched from s3://; "" is one under the system's temporary folder."""


@dataclass(frozen=True)
class OptimSettings:
    """AdamW and its schedule."""

    lr: float = 1e-4
    """Peak learning rate of the new layers."""
    backbone_lr: float = 1e-7
    """Peak learning rate of the CLIP towers."""
    weight_decay: float = 0.2
    """Decoupled decay of matrices and embeddings; gains and biases do not decay."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Decay of the two moments."""
    eps: float = 1e-6
    """Added to the root of the second moment."""
    clip: float = 1.0
    """Largest norm of the whole gradient."""
    epochs: int = 5
    """Times that every clip is seen."""
    steps: int = 0
    """Stop after this many steps; 0 is as many as the epochs have. The schedule spans the whole run either way."""
    warmup: float = 0.1
    """Share of the run's steps over which the learning rate rises."""
    floor: float = 0.0
    """Share of the peak at which the cosine ends."""
    ema: float = 0.0
    """Decay of the averaged weights, which are then the ones evaluated and saved; 0 keeps none."""


@dataclass(frozen=True)
class ExchangeSettings:
    """How ranks learn of each other's clips."""

    form: Literal["gather", "ring"] = "gather"
    """Every rank holds the frames of the global batch, or they go from rank to rank: then a rank's memory does not grow
    with their number, and each step sends twice as often."""
    wire: Literal["float32", "bfloat16", "float16"] = "float32"
    """In which frames travel. The halves cost three digits of a cosine; whatever is summed is summed in float32."""


GATHERED = ExchangeSettings()
"""All frames on every rank, in float32."""


@dataclass(frozen=True)
class ComputeSettings:
    """How a step is computed. None of it changes what is computed, beyond rounding."""

    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Whole weights on every worker, or weights, gradients and optimiser state split between them (FSDP2)."""
    bf16: bool = True
    """bfloat16 autocast where the hardware has it; weights and optimiser stay float32."""
    compile: bool = False
    """torch.compile the model: pays on a GPU in runs of thousands of steps."""
    exchange: ExchangeSettings = field(default_factory=ExchangeSettings)
    """How ranks learn of each other's clips."""


@dataclass(frozen=True)
class WorkerSettings:
    """What Ray Train starts."""

    count: int = 1
    """Workers, each a rank."""
    at_least: int = 0
    """Elastic: go on with as few as this where nodes are lost, and grow back. 0 wants `count`."""
    gpus: float = 0
    """GPUs for each worker; 0 trains on CPUs over gloo."""
    cpus: float = 1
    """CPUs for each worker. Below 1 leaves room on a small machine; threads are shared out evenly anyway."""
    failures: int = 3
    """Worker losses to recover from; preempted nodes do not count."""


@dataclass(frozen=True)
class CheckpointSettings:
    """When the state is kept, and how many are."""

    every_steps: int = 500
    """Steps between checkpoints, besides the one after each epoch; 0 is after epochs only."""
    keep: int = 2
    """How many to keep: the best by the metric, and always the latest."""
    metric: str = ""
    """The metric on the evaluation split by which the best is chosen, higher is better; "" is the first task's own:
    t2v/R@1, qa/accuracy or caption/CIDEr."""


@dataclass(frozen=True)
class EvalProtocol:
    """How retrieval is measured."""

    paragraph: bool = False
    """All captions of a clip as one text (ActivityNet, DiDeMo), instead of each caption as a query of its own."""
    level_weights: tuple[float, float, float] = (1.0, 0.0, 0.0)
    """Weights of the entity, action and event similarities in the score; published: the entity level alone."""
    dsl: bool = False
    """Add the metrics with dual softmax (`t2v+dsl/...`), which sees all queries at once."""
    qbnorm: int = 0
    """Add the metrics with QB-Norm (`t2v+qbnorm/...`), its bank made of so many clips of the train split."""
    rerank: int = 0
    """Add the metrics (`t2v+rerank/...`) of a search whose best so many are scored again with rebuilt tokens, which
    wants a model that reconstructs."""
    products: Literal["float32", "bfloat16"] = "float32"
    """What the cosines of words and frames are computed in. bfloat16 takes about half the time on processors that have
    it, and may exchange the ranks of videos that score the same to two digits: for a look during training."""
    batch: int = 64
    """Clips encoded at once."""

    def __post_init__(self) -> None:
        if len(self.level_weights) != 3 or min(self.level_weights) < 0 or not any(self.level_weights):
            raise ValueError(
                f"level_weights is {self.level_weights}: give three numbers of at least 0, one of them above"
            )
        if self.batch < 1:
            raise ValueError(f"batch is {self.batch}, must be at least 1")
        if self.qbnorm < 0:
            raise ValueError(f"qbnorm is {self.qbnorm}: give a number of training clips, or 0 for none")
        if self.rerank < 0:
            raise ValueError(f"rerank is {self.rerank}: give a number of clips, or 0 for none")


@dataclass(frozen=True)
class EvaluateSettings(EvalProtocol):
    """When retrieval is measured in a run, and on which clips."""

    every_epochs: int = 1
    """Epochs between evaluations; the last epoch is always evaluated. 0 never evaluates."""
    select: str = "val"
    """The split on which the best checkpoint is chosen. Its metrics are called "selected-on-test" where it is test."""
    final: tuple[str, ...] = ("val", "test")
    """The splits on which the chosen checkpoint is measured at the end; those that the shards lack are passed over."""


@dataclass(frozen=True)
class TrackingSettings:
    """What MLflow gets."""

    enabled: bool = True
    """Track at all."""
    experiment: str = "hbi"
    """The MLflow experiment."""
    every_steps: int = 10
    """Steps between the lines that are printed and tracked."""
    register: bool = True
    """Register the model at the end."""
    alias: str = ""
    """Alias that the new version gets where it is better than the alias's holder by the checkpoints' metric; "" gives
    none."""


@dataclass(frozen=True)
class HeadSettings:
    """How the heads for questions and captions are trained."""

    texts_per_clip: int = 4
    """Most questions or captions of a clip in one step: its frames are encoded once for all of them."""
    qa_weight: float = 1.0
    """What the loss of a step on questions is multiplied by."""
    caption_weight: float = 1.0
    """What the loss of a step on captions is multiplied by."""
    qa_pairs: float = 0.0
    """What the contrast and the alignment of questions with their videos, as `loss` has them, count beside a level's
    cross entropy; published 0.5. 0: questions are answered, and not told from those of other videos."""
    qa_distillation: float = 0.0
    """What the divergence of the action and event levels' answers from those of the entity level counts beside a
    level's cross entropy, in the mean over questions and answers; published 2."""
    smoothing: float = 0.1
    """Share of a caption's target that goes to all other words evenly."""
    decode: DecodeSettings = field(default_factory=DecodeSettings)
    """How captions are written where they are measured."""
    samples: int = 20
    """Answers and captions that are kept in a table beside each measurement."""
    vocabulary: tuple[str, ...] = ()
    """The answers, the commonest of the training split first; the run finds them when it begins."""


@dataclass(frozen=True)
class TrainConfig:
    """One training run."""

    name: str = "debug"
    """The named run that this began as."""
    seed: int = 42
    """Of the weights, the order of the data and the choice of captions."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Sizes of the model."""
    init_from: str = ""
    """Weights to begin with: a model folder, models:/name@alias, or the file of a published checkpoint (whose tokenizer
    is that of `model.backbone`), local or s3://. Its sizes replace those of `model`."""
    estimator: str = ""
    """File with the published estimator's weights, for `loss.target` or `loss.objective` that need it."""
    loss: LossSettings = field(default_factory=LossSettings)
    """The objective and its weights."""
    task: tuple[Task, ...] = ("retrieval",)
    """What the steps train, one after another and again from the start: retrieval, qa, caption. Each may stand there
    several times: `retrieval retrieval qa` gives questions every third step."""
    heads: HeadSettings = field(default_factory=HeadSettings)
    """How the heads for questions and captions are trained."""
    data: DataSettings = field(default_factory=DataSettings)
    """Samples and batches."""
    optim: OptimSettings = field(default_factory=OptimSettings)
    """Optimiser and schedule."""
    compute: ComputeSettings = field(default_factory=ComputeSettings)
    """Precision, memory, parallelism."""
    workers: WorkerSettings = field(default_factory=WorkerSettings)
    """What Ray Train starts."""
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    """When the state is kept."""
    evaluate: EvaluateSettings = field(default_factory=EvaluateSettings)
    """Retrieval on held-out clips."""
    tracking: TrackingSettings = field(default_factory=TrackingSettings)
    """What MLflow gets."""

    def __post_init__(self) -> None:
        rules = [
            ("data.batch", self.data.batch, self.data.batch >= 1, "1 or more"),
            ("data.accumulate", self.data.accumulate, self.data.accumulate >= 1, "1 or more"),
            ("data.shuffle-window", self.data.shuffle_window, self.data.shuffle_window >= 1, "1 or more"),
            ("optim.epochs", self.optim.epochs, self.optim.epochs >= 1, "1 or more"),
            ("optim.warmup", self.optim.warmup, 0 <= self.optim.warmup < 1, "at least 0 and below 1"),
            ("optim.ema", self.optim.ema, 0 <= self.optim.ema < 1, "at least 0 and below 1"),
            (
                "loss.teacher",
                self.loss.teacher,
                not self.loss.teacher or self.optim.ema > 0,
                "0 without an average of the weights (--set.optim.ema 0.99)",
            ),
            ("workers.count", self.workers.count, self.workers.count >= 1, "1 or more"),
            (
                "workers.at-least",
                self.workers.at_least,
                self.workers.at_least <= self.workers.count,
                "at most count",
            ),
            ("checkpoint.keep", self.checkpoint.keep, self.checkpoint.keep >= 1, "1 or more"),
            *self._rules_of_tasks(),
            (
                "compute.exchange.form",
                self.compute.exchange.form,
                self.compute.exchange.form == "gather" or self.loss.objective == "exact",
                "gather where --set.loss.objective is published, which needs the whole batch on every rank",
            ),
            ("tracking.every-steps", self.tracking.every_steps, self.tracking.every_steps >= 1, "1 or more"),
        ]
        if self.task:
            rules.append(("checkpoint.metric", self.metric, *self._measured()))
        for name, value, holds, rule in rules:
            if not holds:
                raise ValueError(f"--set.{name} {value}: must be {rule}")

    def _rules_of_tasks(self) -> list[tuple[str, Any, bool, str]]:
        """(setting, value, whether it fits, the rule) of what is trained."""
        heads, most = self.heads, self.heads.texts_per_clip
        once = self.loss.objective == "published" and heads.qa_pairs > 0
        return [
            ("heads.texts-per-clip", most, most >= 1, "1 or more"),
            (
                "heads.texts-per-clip",
                most,
                most == 1 or not once,
                "1 where --set.loss.objective is published and --set.heads.qa-pairs above 0: that objective takes "
                "two questions of a clip for two clips",
            ),
            ("heads.qa-pairs", heads.qa_pairs, heads.qa_pairs >= 0, "0 or more"),
            ("heads.qa-distillation", heads.qa_distillation, heads.qa_distillation >= 0, "0 or more"),
            ("heads.smoothing", heads.smoothing, 0 <= heads.smoothing < 1, "at least 0 and below 1"),
            (
                "task",
                self.task,
                bool(self.task) and set(self.task) <= set(METRICS),
                f"some of {', '.join(METRICS)}",
            ),
            (
                "model.answers.head",
                self.model.answers.head,
                "qa" not in self.task or self.model.answers.head != "none",
                "published or open where questions are trained (--set.task qa)",
            ),
            (
                "model.captions.layers",
                self.model.captions.layers,
                "caption" not in self.task or self.model.captions.layers >= 1,
                "1 or more where captions are trained (--set.task caption)",
            ),
        ]

    @property
    def model_flags(self) -> str:
        """Where `hbi train` takes the model's sizes; empty where another model brings them."""
        return "" if self.init_from or self.model.backbone else "--set.model."

    def _measured(self) -> tuple[bool, str]:
        """Whether the metric that chooses is one that this run measures, and the rule that says which are."""
        task, _, name = self.metric.partition("/")
        found = RETRIEVAL_METRIC.fullmatch(self.metric)
        if found is None:
            return task != "retrieval" and task in self.task and bool(name), METRIC_RULE
        if found[2]:
            asked = self.evaluate.dsl if found[2] == "+dsl" else self.evaluate.qbnorm > 0
            return asked, f"measured: add --set.evaluate.{found[2][1:]}"
        return "retrieval" in self.task, METRIC_RULE

    @property
    def metric(self) -> str:
        """By which the best checkpoint is chosen."""
        return self.checkpoint.metric or METRICS.get(next(iter(self.task), ""), "")

    @property
    def protocol(self) -> EvalProtocol:
        """How this run is measured: on paragraphs where it is trained on them."""
        return replace(self.evaluate, paragraph=self.evaluate.paragraph or self.data.paragraph)

    def to_json(self) -> str:
        """As text; `from_json` is its inverse."""
        return json.dumps(asdict(self), indent=2)

    @staticmethod
    def from_json(text: str) -> "TrainConfig":
        """The inverse of `to_json`; files of an earlier version, with other names for some fields, are read too."""
        return _build(TrainConfig, json.loads(text))


EARLIER_NAMES = {"window": "shuffle_window", "start": "init_from", "rates": "level_weights"}
"""Fields that files of an earlier version have by another name."""


def _build(kind: Any, values: dict[str, Any]) -> Any:
    """A dataclass from what `asdict` and JSON made of it; fields that are gone are left out."""
    hints = get_type_hints(kind)
    known = {f.name for f in fields(kind)}
    values = {EARLIER_NAMES.get(name, name): value for name, value in values.items()}
    return kind(
        **{
            name: _build(hints[name], value)
            if is_dataclass(hints[name])
            else (tuple(value) if isinstance(value, list) else value)
            for name, value in values.items()
            if name in known
        }
    )


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as {"optim.lr": 1e-4}: how they are tracked and compared."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
