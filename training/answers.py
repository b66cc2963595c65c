"""The answers that a run learns to give, and what a model to begin with must not have seen."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace

from hbi.infra import storage
from hbi.infra.mlflow.resolve import resolve_model
from hbi.model.answer_metrics import question_type
from hbi.pipelines.sample import ShardIndex
from hbi.training.data.shards import described
from hbi.training.settings import TrainConfig

ANSWERS = "answers.json"
"""The file of a run that holds its answers, the commonest first."""
TRAINED = "trained.json"
"""The file of a model folder that says which shards and split it was trained on, and those of what it began from."""
TEST = "test"


def training_answers(index: ShardIndex, split: str) -> Iterator[tuple[str, str]]:
    """(type, answer) of every question of a split; shards in object storage are left alone, since all would come."""
    if not storage.is_remote(index.folder):
        for clip in described(index, split):
            for entry in clip.get("qa", []):
                yield entry.get("type") or question_type(entry["question"]), entry["answer"]


def with_vocabulary(
    config: TrainConfig, index: ShardIndex, out: str, log: Callable[[str], None]
) -> TrainConfig:
    """The configuration with the commonest answers of the training split, which are kept in OUT/answers.json.

    It says how many answers, and how many training questions, are left out. ValueError where no question is there.
    """
    if "qa" not in config.task:
        return config
    path = storage.join(out, ANSWERS)
    if not storage.exists(path):
        found = Counter(
            entry["answer"]
            for clip in described(index, config.data.split)
            for entry in clip.get("qa", [])
            if entry["answer"].strip()
        )
        if not found:
            raise ValueError(
                f"{index.folder}: no clip of split {config.data.split!r} has a question: "
                "questions come from the manifest's column qa"
            )
        ranked = sorted(found, key=lambda answer: (-found[answer], answer))
        kept = ranked[: config.model.answers.vocabulary]
        asked, answered = sum(found.values()), sum(found[answer] for answer in kept)
        log(
            f"answers: the {len(kept)} commonest of {len(found)}; {asked - answered} of {asked} training questions "
            "have another answer and are left out"
        )
        storage.write_bytes(path, json.dumps(kept, ensure_ascii=False, indent=1).encode())
    vocabulary = tuple(json.loads(storage.read_bytes(path)))
    answers = replace(config.model.answers, vocabulary=len(vocabulary))
    return replace(
        config,
        model=replace(config.model, answers=answers),
        heads=replace(config.heads, vocabulary=vocabulary),
    )


def refuse_seen_tests(
    config: TrainConfig, index: ShardIndex, tracking: str | None, log: Callable[[str], None]
) -> None:
    """ValueError, with the count, where the model to begin with was trained on clips whose questions are the test.

    The splits of questions are not those of retrieval: 1k-A trains on videos of MSR-VTT that MSRVTT-QA tests on.
    """
    tests = {shard.split for shard in index.shards if shard.samples} & {TEST}
    if not config.init_from or "qa" not in config.task or not tests:
        return
    sources = trained_on(config.init_from, tracking)
    if not sources:
        log(
            f"{config.init_from}: which clips it was trained on is not known: they may be in the test of questions"
        )
        return
    ids = {clip["id"] for clip in described(index, TEST)}
    for source in sources:
        try:
            seen = ids & {clip["id"] for clip in described(ShardIndex.read(source["data"]), source["split"])}
        except (ValueError, OSError):
            log(
                f"{source['data']}: not there any more: whether its clips are in the test of questions is not known"
            )
            continue
        if seen:
            raise ValueError(
                f"--set.init-from {config.init_from}: it was trained on {len(seen)} of the {len(ids)} clips of the "
                f"{TEST} split ({min(seen)}, for one): begin from a model of another split"
            )


def trained_on(model: str, tracking: str | None) -> list[dict[str, str]]:
    """Shards and split of what a model was trained on, and before that; empty where it does not say."""
    try:
        folder = resolve_model(model, tracking)
        return json.loads(storage.read_bytes(storage.join(folder, TRAINED)))
    except (OSError, ValueError):  # a published checkpoint, or one of an earlier version
        return []
