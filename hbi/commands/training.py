"""From shards to a registered model."""

import inspect
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Annotated

import tyro
from tyro.conf import OmitArgPrefixes, Positional, arg

from hbi.commands.arguments import Model, Path, Shards, Tracking
from hbi.training.runs.table import RUNS
from hbi.training.settings import EvalProtocol, TrainConfig, flatten

if TYPE_CHECKING:
    from hbi.training.run import TrainResult

HELP = {"-h", "--help"}


@dataclass(frozen=True)
class Train:
    """Train a named run on shards; run again, it goes on from its last checkpoint.

    Example: hbi train demo --data shards --set.optim.lr 1e-3
    """

    name: Annotated[Positional[str], arg(metavar="RUN")]
    """The named run."""
    data: Annotated[str, arg(metavar="SHARDS")]
    """A folder that `hbi shard` wrote, local or s3://."""
    set: TrainConfig
    """Any field of the run."""
    out: Path = None
    """Folder or s3:// URI for checkpoints and the model (default: runs/RUN)."""
    tracking: Tracking = None
    """MLflow store (default: MLFLOW_TRACKING_URI, else runs/mlflow.db)."""

    @classmethod
    def read(cls, args: Sequence[str]) -> "Train":
        """A command line whose `--set` flags have the defaults of the run that is named, wherever it stands."""
        name = named_run(args)
        if name is not None and name not in RUNS:
            raise ValueError(f"{name}: no such run: choose one of {', '.join(RUNS)}")
        shown = RUNS[name or "debug"]
        about = f"{inspect.getdoc(cls)}\n\nRuns: {', '.join(RUNS)}.\n\nThe defaults below are those of {shown.name}."
        if HELP & set(args):
            args = ["--help"]  # with the run's name before it, that argument would be left out
        default = cls(tyro.MISSING, tyro.MISSING, shown)
        return tyro.cli(cls, prog="hbi train", args=args, default=default, description=about)

    def run(self) -> "TrainResult":
        from hbi.infra.mlflow.resolve import pin_model
        from hbi.serving.package import PACKAGE
        from hbi.training.evaluate.table import table
        from hbi.training.run import train

        result = train(self.set, self.data, self.out or f"runs/{self.name}", self.tracking, PACKAGE)
        print(f"model  {result.model}")
        if result.run_id:
            print(f"run    {result.run_id}")
        if result.version:
            name, alias = f"models:/hbi/{result.version}", f"models:/hbi@{self.set.tracking.alias}"
            if self.set.tracking.alias and pin_model(alias, self.tracking) == name:
                name = f"{alias}, {name}"  # the alias may have stayed with a better version
            print(f"name   {name}")
        for split in dict.fromkeys(metric.split("/")[0] for metric in result.metrics):
            print(table(result.metrics, split))
        return result


def named_run(args: Sequence[str]) -> str | None:
    """The first argument that is neither a flag nor a flag's value."""
    defaults = {"data": "", "out": "", "tracking": "", **flatten({"set": asdict(TrainConfig())})}
    values = 0
    for given in args:
        if given.startswith("-"):
            value = defaults.get(given.removeprefix("--").replace("-", "_"), True)
            values = 0 if isinstance(value, bool) else len(value) if isinstance(value, tuple) else 1
        elif values:
            values -= 1
        else:
            return given
    return None


@dataclass(frozen=True)
class Evaluate:
    """Measure retrieval, both ways, of a model on a split of shards.

    Example: hbi evaluate models:/hbi@champion shards --split test
    """

    model: Model
    """A model folder, models:/name@alias or models:/name/version, or the file of a published checkpoint."""
    shards: Shards
    """A folder that `hbi shard` wrote, local or s3://."""
    split: str = "test"
    """Which split."""
    protocol: Annotated[EvalProtocol, OmitArgPrefixes] = field(default_factory=EvalProtocol)
    """How retrieval is measured."""
    explanations: int = 0
    """How many matches to explain, to see how true the explanations are; 0 explains none."""
    tokenizer: Path = None
    """For a published checkpoint: a CLIP name or folder."""
    words: Annotated[int | None, arg(metavar="INT", help_behavior_hint="")] = None
    """For a published checkpoint: tokens a text is cut to."""
    tracking: Tracking = None
    """MLflow store of a models:/ name (default: MLFLOW_TRACKING_URI, else runs/mlflow.db)."""

    def run(self) -> None:
        from hbi.model.meteor import MEND, has_meteor
        from hbi.training.evaluate.explanations import explanation_table
        from hbi.training.evaluate.retrieval import evaluate_named
        from hbi.training.evaluate.table import table
        from hbi.training.init import ModelSource

        source = ModelSource(self.model, self.tracking, self.tokenizer, self.words)
        metrics = evaluate_named(source, self.shards, self.split, self.protocol, self.explanations)
        print(table(metrics, self.split))
        if f"{self.split}/caption/CIDEr" in metrics and not has_meteor():
            print(f"  METEOR is left out: {MEND}")
        if self.explanations:
            print(explanation_table(metrics, self.split))


@dataclass(frozen=True)
class Runs:
    """Compare training runs: a table, best first, of metrics and of the settings that differ.

    Example: hbi runs --experiment hbi
    """

    experiment: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="")] = None
    """One MLflow experiment; all of them otherwise."""
    tracking: Tracking = None
    """MLflow store (default: MLFLOW_TRACKING_URI, else runs/mlflow.db)."""

    def run(self) -> None:
        from hbi.infra.mlflow.runs import runs_table

        print(runs_table(self.experiment, self.tracking))


@dataclass(frozen=True)
class Promote:
    """Move an alias of the registered model to the version that a run made.

    Example: hbi promote 1f3a9c --alias champion
    """

    run_id: Annotated[Positional[str], arg(metavar="RUN_ID")]
    """An MLflow run, as `hbi runs` shows it; its beginning is enough."""
    alias: str = "champion"
    """The alias to move."""
    tracking: Tracking = None
    """MLflow store (default: MLFLOW_TRACKING_URI, else runs/mlflow.db)."""

    def run(self) -> None:
        from hbi.infra.mlflow.registry import promote

        version = promote(self.run_id, self.alias, self.tracking)
        print(f"models:/hbi@{self.alias} is version {version}")
