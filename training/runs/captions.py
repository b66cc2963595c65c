"""The published datasets of video captions.

A clip shows up to four of its captions in a step that trains captions, and one in a step of retrieval; the two take
turns, so that the model stays one that can be searched with.
"""

from dataclasses import replace

from hbi.model.config import CaptionConfig, ModelConfig, TowerConfig
from hbi.training.settings import (
    DataSettings,
    EvaluateSettings,
    OptimSettings,
    TrackingSettings,
    TrainConfig,
    WorkerSettings,
)


def msrvtt_caption() -> TrainConfig:
    """MSR-VTT captions: the full split of 6,513 / 497 / 2,990 clips of 20 captions.

    Command: `hbi import-dataset msrvtt ANNOTATIONS VIDEOS msrvtt.jsonl` with the full split, `hbi shard msrvtt.jsonl
    SHARDS --frames 12 --size 224`, `hbi train msrvtt-caption --data SHARDS`.

    Of V2's captions nothing could be read but that there are some. The recipe is that of CoCap (ICCV 2023), the
    nearest: CLIP, a decoder of 2 layers and 8 heads at CLIP's width, dropout 0.1, label smoothing 0.1, lr 1e-4 and
    1e-6 for CLIP, weight decay 0.01, 20 epochs over captions. Here 64 clips a step, of 4 captions in every other one,
    100 epochs. Expected: CIDEr 50 to 55 is plausible for ViT-B/32 without caption pre-training; SwinBERT 53.8
    (README), CLIP4Caption 57.7 and CoCap with ViT-B/16 about 56 (from memory). The best epoch is chosen on val.
    """
    return TrainConfig(
        name="msrvtt-caption",
        task=("caption", "retrieval"),
        model=ModelConfig(
            backbone="openai/clip-vit-base-patch32",
            towers=TowerConfig(
                image_size=224, patch_size=32, vision_width=768, vision_layers=12, vision_heads=12,
                text_width=512, text_layers=12, text_heads=8, vocab_size=49408, dim=512,
            ),
            captions=CaptionConfig(layers=2, heads=8),
            freeze_patches=True,
            checkpointing=True,
        ),
        data=DataSettings(batch=64, workers=8),
        optim=OptimSettings(epochs=100, backbone_lr=1e-6, weight_decay=0.01),
        workers=WorkerSettings(count=2, gpus=1, cpus=8),
        evaluate=EvaluateSettings(every_epochs=10),
        tracking=TrackingSettings(experiment="msrvtt-caption", every_steps=50),
    )  # fmt: skip


def msvd_caption() -> TrainConfig:
    """MSVD captions: 1,200 / 100 / 670 clips of about 40 captions.

    Command: as `msrvtt-caption`, with `msvd`. Settings are those of MSR-VTT. Expected: others have SwinBERT 120.6
    (README).
    """
    base = msrvtt_caption()
    return replace(base, name="msvd-caption", tracking=replace(base.tracking, experiment="msvd-caption"))
