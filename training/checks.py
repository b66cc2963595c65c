"""What a run asks for against what there is, before anything starts."""

from hbi.infra.nodes import require_resources
from hbi.pipelines.sample import ShardIndex
from hbi.training.settings import EvaluateSettings, TrainConfig


def check_splits(config: TrainConfig, index: ShardIndex) -> list[str]:
    """Lines to say of splits that the shards lack; ValueError where such a split was asked for by name.

    A corpus need not have the splits that are measured by default.
    """
    settings, default = config.evaluate, EvaluateSettings()
    have = {shard.split for shard in index.shards if shard.samples}
    listed = ", ".join(sorted(have)) or "none"
    lines = []
    if settings.every_epochs and settings.select not in have:
        if settings.select != default.select:
            raise ValueError(
                f"--set.evaluate.select {settings.select}: {index.folder} has the splits {listed}: choose one of "
                "them, or --set.evaluate.every-epochs 0 to keep the latest checkpoint"
            )
        lines.append(
            f"the shards have no split {settings.select}: nothing chooses the best checkpoint, the latest is taken "
            f"(they have {listed}; --set.evaluate.select)"
        )
    unknown = [split for split in settings.final if split not in have and split not in default.final]
    if unknown:
        raise ValueError(
            f"--set.evaluate.final {' '.join(unknown)}: {index.folder} has the splits {listed}: choose among them"
        )
    return lines


def check_cluster(config: TrainConfig) -> None:
    """ValueError where the running cluster cannot hold the workers that the run asks for, instead of waiting for it."""
    workers = config.workers
    count = workers.at_least or workers.count
    of_workers = f"{config.name}, {count} workers (--set.workers.count"
    if workers.gpus:
        mend = f"{of_workers}; --set.workers.gpus 0 trains on CPUs)"
        require_resources(mend, {"GPU": workers.gpus * count})
    require_resources(f"{of_workers}, --set.workers.cpus)", {"CPU": workers.cpus * count})
