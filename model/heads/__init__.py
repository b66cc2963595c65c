"""The heads beside retrieval: answers to questions, and captions.

What a front needs of them, all on `HBI`, tensors in and tensors or plain lists out:

    frames = model.encode_video(video, video_mask)                                  [videos, frames, dim]
    model.answer_logits(input_ids, text_mask, frames, video_mask, candidates=None)  [questions, answers]
        Question i is about video i. Without candidates the answers are those of `model.vocabulary`, in its order; with
        them, (ids, mask) of `tokenize(tokenizer, answers, words)`, whatever was asked for (head `open` alone).
        The open head asks for candidates always: give those of the vocabulary.
    model.write_captions(frames, video_mask, marks, settings)                       [[id, ...], ...] a caption a video
        marks: `caption_marks(tokenizer)`; settings: `DecodeSettings`; text: `detokenize(tokenizer, ids)`.

Both raise ValueError, in one line, where the model has no such head.
"""

from typing import Literal, NamedTuple

from jaxtyping import Bool, Int
from torch import Tensor


class HeadInputs(NamedTuple):
    """What a head needs beside texts and videos, in training."""

    task: Literal["qa", "caption"]
    """Which head."""
    video_of_text: Int[Tensor, " texts"]
    """The row of the video that each text belongs to: several texts may share one, which is encoded once."""
    candidates: tuple[Int[Tensor, "answers words"], Bool[Tensor, "answers words"]] | None = None
    """Ids and mask of the answers that are scored, for head `open`."""
    pairs: bool = False
    """Whether questions and their videos are wanted as the matched pairs of `hbi_loss`, too."""
