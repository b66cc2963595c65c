"""The training loss: contrast, alignment of interactions, self-distillation. Pure functions, no ranks."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import kl_div, softplus

from hbi.model.banzhaf import exact_interaction
from hbi.model.config import LossSettings
from hbi.model.hbi import Encoded
from hbi.model.similarity import fitting_chunk, pair_similarity, weighted_similarity
from hbi.model.tokens import Tokens

Similarities = dict[str, tuple[Tensor, Tensor | None]]
"""By level: [rows, candidates] of texts with videos, and the same of videos with texts (None: its transpose)."""
TEACHER = "teacher"
"""Beside the levels: the entity level as the average of the weights encodes it."""
QUADRATURE_NODES = 128
"""Of the exact target: enough while the weight logits of a text or a video lie within 25 of each other."""


def contrastive_loss(logits: Float[Tensor, "rows candidates"], first: int = 0) -> Float[Tensor, ""]:
    """Sum over the rows r of -log softmax(logits[r])[first + r]: row r belongs to candidate first + r."""
    return -logits.log_softmax(-1).diagonal(first).sum()


def sigmoid_loss(logits: Float[Tensor, "rows candidates"], first: int = 0) -> Float[Tensor, ""]:
    """Sum over all pairs of -log sigmoid(logit) where row r meets candidate first + r, -log sigmoid(-logit) elsewhere.

    Zhai et al., "Sigmoid Loss for Language Image Pre-Training", ICCV 2023; there divided by the number of texts.
    """
    matches = torch.zeros_like(logits)
    matches.diagonal(first).fill_(1.0)
    return softplus((1 - 2 * matches) * logits).sum()


def alignment_loss(
    predicted: Float[Tensor, "batch words frames"],
    target: Float[Tensor, "batch words frames"],
    word_mask: Bool[Tensor, "batch words"],
    frame_mask: Bool[Tensor, "batch frames"],
) -> Float[Tensor, ""]:
    """Sum over the pairs of

        mean over words t  KL( softmax_v target[t, .] || softmax_v predicted[t, .] )
      + mean over frames v KL( softmax_t target[., v] || softmax_t predicted[., v] )

    over present words and frames alone. No gradient goes into the target.
    """
    absent = ~(word_mask[:, :, None] & frame_mask[:, None, :])
    lowest = torch.finfo(predicted.dtype).min
    target = target.detach().masked_fill(absent, lowest)
    predicted = predicted.masked_fill(absent, lowest)
    total = predicted.new_zeros(())
    for across, mask in ((2, word_mask), (1, frame_mask)):
        share = target.softmax(across)
        divergence = share * (target.log_softmax(across) - predicted.log_softmax(across))
        each = divergence.masked_fill(absent, 0.0).sum(across)
        total = total + (each.sum(1) / mask.sum(1).clamp(min=1)).sum()
    return total


def distillation_loss(
    student: Float[Tensor, "rows candidates"], teacher: Float[Tensor, "rows candidates"]
) -> Float[Tensor, ""]:
    """Sum over the rows of KL( softmax teacher || softmax student ). No gradient goes into the teacher."""
    return kl_div(student.log_softmax(-1), teacher.detach().log_softmax(-1), reduction="sum", log_target=True)


def interaction_targets(
    local: Encoded, settings: LossSettings
) -> dict[str, Float[Tensor, "batch words frames"]]:
    """What the predicted interaction of each pair is aligned to, at each level; ValueError where the target is an
    estimator that the model does not have."""
    if settings.target == "estimator":
        return _estimated(local, "LossSettings.target is 'estimator'")
    with torch.no_grad():
        return {
            level: settings.target_scale
            * exact_interaction(
                local.players[level]
                if local.players
                else pair_similarity(local.text[level], local.video[level]),
                local.text[level].logits,
                local.video[level].logits,
                local.text[level].mask,
                local.video[level].mask,
                nodes=QUADRATURE_NODES,
            )
            for level in settings.learned
        }


def hbi_loss(
    local: Encoded,
    pool: Encoded,
    first: int,
    settings: LossSettings,
    batch: int,
    videos: Int[Tensor, " candidates"] | None = None,
) -> dict[str, Float[Tensor, ""]]:
    """The share of these rows in the loss of the whole batch; the shares of all the ranks add up to the loss.

        loss = sum over levels ( weight * contrastive + interaction * alignment )
               + distillation * sum over action, event
               + teacher * teacher

        contrastive   1/2 the mean cross entropy of texts to videos + 1/2 that of videos to texts, at
                      logit_scale * similarity; or, with contrast "sigmoid", the mean over texts of `sigmoid_loss` at
                      logit_scale * similarity + logit_bias
        alignment     mean over pairs of `alignment_loss`
        distillation  mean over texts, plus mean over videos, of KL(entity level || this level) at the same logits
        teacher       the same of KL(average of the weights || entity level), where `with_teacher` gave its tokens

    local: the rows of this rank; pool: the whole batch, with gradients, of which `local` is rows first, first + 1, ...
    (one process: the same, and first 0); batch: pairs in the whole batch. The logit scale is the local one.
    videos: where the texts are questions, a number for the video of each pair of the whole batch, those of one video
    next to each other: they are not told from each other, and the video is compared once.

    Returns "loss" and its parts without their weights: "contrastive/<level>", "alignment/<level>",
    "distillation/<level>", "teacher".
    """
    with torch.autocast(local.logit_scale.device.type, enabled=False):
        if settings.objective == "published":
            pool = pool._replace(logit_scale=local.logit_scale)
            losses = published_loss(pool, settings, questions=videos is not None)
            share = len(local.text["entity"].mask) / batch
            return {name: value * share for name, value in losses.items()}
        of_texts = text_similarities(local.text, pool.video, settings, videos)
        ours = None if videos is None else videos[first : first + len(local.text["entity"].mask)]
        of_videos = {} if local is pool else text_similarities(pool.text, local.video, settings, ours)
        similarities: Similarities = {
            level: (found, of_videos[level].T if of_videos else None) for level, found in of_texts.items()
        }
        return loss_of_similarities(local, similarities, first, settings, batch, videos)


def with_teacher(encoded: Encoded, taught: Encoded) -> Encoded:
    """`encoded`, and beside its levels the entity level of `taught`."""
    return encoded._replace(
        text={**encoded.text, TEACHER: taught.text["entity"]},
        video={**encoded.video, TEACHER: taught.video["entity"]},
    )


def compared_levels(text: dict[str, Tokens], settings: LossSettings) -> list[str]:
    """The levels that are learned, and the teacher's where there is one."""
    return [*settings.learned, *([TEACHER] if TEACHER in text else [])]


def text_similarities(
    text: dict[str, Tokens],
    video: dict[str, Tokens],
    settings: LossSettings,
    numbers: Int[Tensor, " videos"] | None = None,
) -> dict[str, Float[Tensor, "texts videos"]]:
    """Every text with every video, at `compared_levels`; numbers: `videos` of `hbi_loss`."""
    found = {}
    for level in compared_levels(text, settings):
        words, frames = text[level], video[level]
        chunk = settings.chunk or fitting_chunk(words.mask.shape[1], frames.mask.shape[1])
        found[level] = _each_once(words, frames, numbers, chunk)
    return found


def _each_once(
    text: Tokens, video: Tokens, numbers: Int[Tensor, " videos"] | None, chunk: int
) -> Float[Tensor, "texts videos"]:
    """`weighted_similarity`; neighbours of the same number are the same video, and are compared once."""
    if numbers is None:
        return weighted_similarity(text, video, chunk)
    _, place, counts = numbers.unique_consecutive(return_inverse=True, return_counts=True)
    begins = counts.cumsum(0) - counts
    return weighted_similarity(text, Tokens(*(part[begins] for part in video)), chunk)[:, place]


def loss_of_similarities(
    local: Encoded,
    similarities: Similarities,
    first: int,
    settings: LossSettings,
    batch: int,
    videos: Int[Tensor, " candidates"] | None = None,
) -> dict[str, Float[Tensor, ""]]:
    """`hbi_loss` with the exact objective, from the similarities of the local rows with the whole batch."""
    targets = interaction_targets(local, settings) if settings.interaction else {}
    losses: dict[str, Tensor] = {}
    total = local.logit_scale.new_zeros(())
    entity: tuple[Tensor, Tensor] | None = None
    others = None if videos is None else _other_pairs(videos, first, len(local.text["entity"].mask))
    for level in settings.learned:
        text, video = local.text[level], local.video[level]
        of_texts, of_videos = _both_ways(local.logit_scale, *similarities[level])
        if others is not None:
            lowest = torch.finfo(of_texts.dtype).min
            of_texts, of_videos = of_texts.masked_fill(others, lowest), of_videos.masked_fill(others, lowest)
        if settings.contrast == "softmax":
            contrast = (contrastive_loss(of_texts, first) + contrastive_loss(of_videos, first)) / 2
        else:
            assert local.logit_bias is not None, "the model learns no bias"
            contrast = sigmoid_loss(of_texts + local.logit_bias, first)
        losses[f"contrastive/{level}"] = contrast / batch
        total = total + settings.learned[level] * losses[f"contrastive/{level}"]
        if settings.interaction:
            alignment = alignment_loss(local.predicted[level], targets[level], text.mask, video.mask)
            losses[f"alignment/{level}"] = alignment / batch
            total = total + settings.interaction * losses[f"alignment/{level}"]
        if entity is None:
            entity = of_texts, of_videos
        elif settings.distillation:
            distillation = distillation_loss(of_texts, entity[0]) + distillation_loss(of_videos, entity[1])
            losses[f"distillation/{level}"] = distillation / batch
            total = total + settings.distillation * losses[f"distillation/{level}"]
    if TEACHER in similarities:
        assert entity is not None
        of_texts, of_videos = _both_ways(local.logit_scale, *similarities[TEACHER])
        taught = distillation_loss(entity[0], of_texts) + distillation_loss(entity[1], of_videos)
        losses[TEACHER] = taught / batch
        total = total + settings.teacher * losses[TEACHER]
    return {"loss": total, **losses}


def _both_ways(scale: Tensor, with_videos: Tensor, with_texts: Tensor | None) -> tuple[Tensor, Tensor]:
    """Logits of texts with videos and of videos with texts, from an entry of `Similarities`."""
    of_texts = scale * with_videos
    return of_texts, of_texts.T if with_texts is None else scale * with_texts


def _other_pairs(
    videos: Int[Tensor, " candidates"], first: int, rows: int
) -> Bool[Tensor, "rows candidates"]:
    """Which candidates have the video of each row, but are another pair."""
    same = videos[first : first + rows, None] == videos
    same.diagonal(first).fill_(False)
    return same


def published_loss(
    encoded: Encoded, settings: LossSettings, questions: bool = False
) -> dict[str, Float[Tensor, ""]]:
    """The loss of the published code on the whole batch, its faults included, for those who must reproduce a number.

    The faults: a KL divergence is averaged over every element instead of summed over each distribution; that over the
    words is taken over the batch (`.T` of a three-dimensional tensor turns all its axes); padding enters the maxima as
    0 and is part of every softmax of interactions; the self-distillation compares cosines without the logit scale, and
    its gradient goes into the teacher too. With questions for texts the entity level's interactions keep what they have
    at padding, which is 0 with captions. It needs the frozen estimator: ValueError without one.
    """
    estimated = _estimated(encoded, "LossSettings.objective is 'published'")

    def divergence(student: Tensor, teacher: Tensor) -> Tensor:
        # "mean" by hand: torch warns that its meaning will change.
        return kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction="none").mean()

    losses: dict[str, Tensor] = {}
    total = encoded.logit_scale.new_zeros(())
    entity: Tensor | None = None
    for level in settings.learned:
        text, video = encoded.text[level], encoded.video[level]
        similarity = weighted_similarity(text, video, settings.chunk, padding="zero")
        pairs = max(len(similarity), 1)
        logits = encoded.logit_scale * similarity
        contrast = (contrastive_loss(logits) + contrastive_loss(logits.T)) / 2 / pairs
        student, teacher = encoded.predicted[level], estimated[level]
        if level == "entity" and not questions:
            present = text.mask[:, :, None] & video.mask[:, None, :]
            student, teacher = student * present, teacher * present
        turned = (2, 1, 0)
        alignment = divergence(student, teacher) + divergence(
            student.permute(turned), teacher.permute(turned)
        )
        losses[f"contrastive/{level}"], losses[f"alignment/{level}"] = contrast, alignment
        total = total + settings.learned[level] * contrast + settings.interaction * alignment
        if entity is None:
            entity = similarity
        else:
            distillation = divergence(similarity.T, entity.T) + divergence(similarity, entity)
            losses[f"distillation/{level}"] = distillation
            total = total + settings.distillation * distillation
    return {"loss": total, **losses}


def _estimated(encoded: Encoded, why: str) -> dict[str, Tensor]:
    if not encoded.estimated:
        raise ValueError(f"{why}, but the model has no estimator: load a published checkpoint that holds one")
    return encoded.estimated
