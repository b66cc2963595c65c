"""The named runs by name, and what each is."""

import inspect

from hbi.training.runs.captions import msrvtt_caption, msvd_caption
from hbi.training.runs.demo import debug, demo, demo_heads
from hbi.training.runs.questions import activitynet_qa, msrvtt_qa, msvd_qa
from hbi.training.runs.retrieval import (
    activitynet,
    didemo,
    lsmdc,
    msrvtt,
    msrvtt_published,
    msvd,
    vatex,
)
from hbi.training.settings import TrainConfig

RECIPES = (
    *(debug, demo, demo_heads, msrvtt, msrvtt_published, msvd, activitynet, didemo, lsmdc, vatex),
    *(msrvtt_qa, msvd_qa, activitynet_qa, msrvtt_caption, msvd_caption),
)
RUNS: dict[str, TrainConfig] = {config.name: config for config in (recipe() for recipe in RECIPES)}


def description(run: str) -> str:
    """What a named run is: its recipe's docstring."""
    return inspect.getdoc(next(recipe for recipe in RECIPES if recipe().name == run)) or ""
