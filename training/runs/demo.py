"""Runs on the made corpus, on a laptop: a few steps to see that everything is in place, and the demo."""

from dataclasses import replace

from hbi.model.config import (
    AnswerConfig,
    CaptionConfig,
    DecodeSettings,
    LossSettings,
    ModelConfig,
    ReconstructionConfig,
    TowerConfig,
)
from hbi.training.settings import (
    ComputeSettings,
    DataSettings,
    EvaluateSettings,
    HeadSettings,
    OptimSettings,
    TrackingSettings,
    TrainConfig,
    WorkerSettings,
)


def debug() -> TrainConfig:
    """A few steps of a tiny model, to see that everything is in place.

    Command: `hbi train debug --data SHARDS`, shards of `hbi shard MANIFEST SHARDS --frames 4 --size 32`.
    No score is expected of it.
    """
    towers = TowerConfig(
        image_size=32, patch_size=16, vision_width=32, vision_layers=1, vision_heads=2,
        text_width=32, text_layers=1, text_heads=2, vocab_size=400, dim=32,
    )  # fmt: skip
    return TrainConfig(
        name="debug",
        model=ModelConfig(towers=towers, frames=4, temporal_layers=1, predictor_width=8),
        data=DataSettings(batch=8, workers=0),
        optim=OptimSettings(lr=1e-3, backbone_lr=1e-3, epochs=1, steps=20),
        compute=ComputeSettings(bf16=False),
        workers=WorkerSettings(cpus=0.5),
        tracking=TrackingSettings(every_steps=1, register=False),
    )


def demo() -> TrainConfig:
    """The made corpus of moving shapes, on two CPU workers over gloo.

    Command: `hbi demo`, or `hbi train demo --data demo-out/shards`. No score is published for it: the corpus is ours.
    Expected, of 14,000 clips: t2v R@1 78.0 and 73.3, v2t R@1 76.5 and 76.0 among 200 test clips (seeds 0 and 1).
    The towers are small and fresh, so they learn at the rate of the new layers. At twice that rate they stay with
    colours alone for a thousand steps. The entity level alone is contrasted: in the same time three levels learn less.
    """
    towers = TowerConfig(
        image_size=32, patch_size=8, stem=16, vision_width=64, vision_layers=1, vision_heads=4, vision_mlp=128,
        text_width=64, text_layers=1, text_heads=4, text_mlp=128, vocab_size=512, context=32, dim=64,
    )  # fmt: skip
    return TrainConfig(
        name="demo",
        model=ModelConfig(towers=towers, words=32, frames=6, temporal_layers=2, predictor_width=8),
        loss=LossSettings(levels=(1.0, 0.0, 0.0), interaction=0.0, distillation=0.0),
        data=DataSettings(batch=64, workers=0, keep_mb=500),
        optim=OptimSettings(lr=1e-3, backbone_lr=1e-3, weight_decay=0.05, epochs=16),
        compute=ComputeSettings(bf16=False),
        workers=WorkerSettings(count=2, cpus=0.5),
        evaluate=EvaluateSettings(every_epochs=8),
        tracking=TrackingSettings(alias="champion", every_steps=50),
    )


def demo_heads() -> TrainConfig:
    """Answers and captions on the made corpus, from the model of the demo, in a minute or two.

    Command: `hbi demo`, or `hbi train demo-heads --data demo-out/shards --set.init-from demo-out/run/model`. Expected,
    from a model of t2v R@1 78.0 (measured once): 60 % of the 1,462 test questions are answered rightly, where the
    commonest answer of each type gives 17 %; CIDEr 186, BLEU@4 31 (times 100). No score says how well the model still
    retrieves: the demo searches with its own.
    """
    base = demo()
    return replace(
        base,
        name="demo-heads",
        task=("qa", "caption"),
        model=replace(
            base.model,
            checkpointing=True,
            reconstruction=ReconstructionConfig("attention"),
            answers=AnswerConfig("open", 200),
            captions=CaptionConfig(layers=1, heads=2, words=32),
        ),
        heads=HeadSettings(texts_per_clip=6, decode=DecodeSettings(beam=1, words=30)),
        optim=replace(base.optim, lr=2e-3, backbone_lr=2e-4, steps=300, warmup=0.05),
        evaluate=replace(base.evaluate, every_epochs=0, final=("test",)),
        tracking=replace(base.tracking, alias="", every_steps=10),
    )
