"""The published retrieval datasets.

A clip shows one caption an epoch here. The published loader has one item for each caption, so where a dataset has
several captions a clip, one of its epochs is as many of ours: the runs below take the same number of steps.
"""

from dataclasses import replace

from hbi.model.config import LossSettings, ModelConfig, TowerConfig
from hbi.training.settings import (
    ComputeSettings,
    DataSettings,
    EvaluateSettings,
    OptimSettings,
    TrackingSettings,
    TrainConfig,
    WorkerSettings,
)


def msrvtt() -> TrainConfig:
    """MSR-VTT, 9,000 training clips of about 20 captions, tested on the 1,000 of the 1k-A split.

    Command: `hbi import-dataset msrvtt ANNOTATIONS VIDEOS msrvtt.jsonl`, `hbi shard msrvtt.jsonl SHARDS --frames 12
    --size 224`, `hbi train msrvtt --data SHARDS`.

    Published (README and code of V1): ViT-B/32, 2 GPUs, batch 128 in all, 5 epochs over captions (100 of ours), 24
    words, 12 frames, lr 1e-4 and 1e-7 for CLIP, warm-up 0.1, weight decay 0.2, kl 2, skl 1 (`LossSettings`
    has the same strength in our reductions). Expected: t2v R@1 48.2 with the released estimator (README); others
    retrained to less than 48.5 (issue 12). Scores of V2 are not known.

    Different here: the exact interaction is the target instead of a pretrained estimator's; padding is absent from all
    levels; the logit scale counts in the distillation; gradients through the gather are whole; CLIP's weights are
    float32 masters under bfloat16, so that steps of 1e-7 are not lost to rounding; no RandAugment; the cosine ends at 0
    whatever the epochs; one global clipping. The published protocol chooses its epoch on the test split; so does this
    run, since 1k-A has no val, and its metrics say so.
    """
    return TrainConfig(
        name="msrvtt",
        model=ModelConfig(
            backbone="openai/clip-vit-base-patch32",
            towers=TowerConfig(
                image_size=224, patch_size=32, vision_width=768, vision_layers=12, vision_heads=12,
                text_width=512, text_layers=12, text_heads=8, vocab_size=49408, dim=512,
            ),
            freeze_patches=True,
            checkpointing=True,
        ),
        data=DataSettings(batch=128, workers=8),
        optim=OptimSettings(epochs=100),
        compute=ComputeSettings(),
        workers=WorkerSettings(count=2, gpus=1, cpus=8),
        evaluate=EvaluateSettings(every_epochs=10, select="test", final=("test",)),
        tracking=TrackingSettings(experiment="msrvtt", every_steps=50),
    )  # fmt: skip


def msrvtt_published() -> TrainConfig:
    """MSR-VTT with the loss of the published code, its faults included, for those who must come close to its number.

    Command: as `msrvtt`, and `--set.estimator FILE` with the released estimator's weights (epoch 6). Expected: t2v R@1
    48.2 (README). Against `msrvtt`: objective, target and masking are the published ones. Still different: precision
    of CLIP's weights, whole gradients, no RandAugment, our schedule .
    """
    base = msrvtt()
    return replace(
        base,
        name="msrvtt-published",
        model=replace(base.model, estimator=True, masking="published"),
        loss=LossSettings(interaction=1.0, distillation=2.0, objective="published", target="estimator"),
    )


def msvd() -> TrainConfig:
    """MSVD, 1,200 training clips of about 40 captions (val 100, test 670).

    Command: as `msrvtt`, with `msvd`. The published code has no loader, settings or score for it: these are those of
    MSR-VTT, with as many epochs as 5 over captions are.
    """
    base = msrvtt()
    return replace(
        base,
        name="msvd",
        optim=replace(base.optim, epochs=200),
        evaluate=EvaluateSettings(every_epochs=20),
        tracking=replace(base.tracking, experiment="msvd"),
    )


def activitynet() -> TrainConfig:
    """ActivityNet Captions, paragraphs to whole videos; its val_1 is the test.

    Command: as `msrvtt`, with `activitynet` and `--frames 64` at one frame a second. Published (README): 8 GPUs, 10
    epochs, batch 128, 64 words, 64 frames, kl 2, skl 1. Expected: t2v R@1 42.2, R@5 73.0, R@10 84.6, MdR 2, MnR 6.6;
    v2t R@1 42.4, R@5 73.0, R@10 86.0 (Papers with Code). Different: as `msrvtt`; and the published schedule is made
    for 5 epochs, so that its learning rate rises again in the second half.
    """
    base = msrvtt()
    return replace(
        base,
        name="activitynet",
        model=replace(base.model, words=64, frames=64),
        loss=replace(base.loss, interaction=1 / 64, chunk=32),
        data=replace(base.data, paragraph=True, accumulate=2),
        optim=replace(base.optim, epochs=10),
        workers=replace(base.workers, count=8),
        evaluate=EvaluateSettings(every_epochs=2, select="test", final=("test",)),
        tracking=replace(base.tracking, experiment="activitynet"),
    )


def didemo() -> TrainConfig:
    """DiDeMo, paragraphs to videos.

    Command: as `msrvtt`, with `didemo` and `--frames 64`. The published code has a loader and no command; it chooses
    on test, this run on val. Settings are those of ActivityNet. No score could be confirmed.
    """
    base = activitynet()
    return replace(
        base,
        name="didemo",
        evaluate=EvaluateSettings(every_epochs=2),
        tracking=replace(base.tracking, experiment="didemo"),
    )


def lsmdc() -> TrainConfig:
    """LSMDC, movie clips of one caption each.

    Command: as `msrvtt`, with `lsmdc`. The published code has no loader, settings or score: these are those of
    MSR-VTT, 5 epochs.
    """
    base = msrvtt()
    return replace(
        base,
        name="lsmdc",
        optim=replace(base.optim, epochs=5),
        evaluate=EvaluateSettings(),
        tracking=replace(base.tracking, experiment="lsmdc"),
    )


def vatex() -> TrainConfig:
    """VATEX, clips of 10 English captions.

    Command: as `msrvtt`, with `vatex`. The published code has no loader, settings or score: these are those of
    MSR-VTT, with as many epochs as 5 over captions are.
    """
    base = msrvtt()
    return replace(
        base,
        name="vatex",
        optim=replace(base.optim, epochs=50),
        evaluate=EvaluateSettings(every_epochs=5),
        tracking=replace(base.tracking, experiment="vatex"),
    )
