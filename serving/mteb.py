"""A model as the MTEB benchmark runs it, on tasks that have videos and texts (extra `mteb`).

    import mteb
    from hbi.serving.mteb import MTEBModel

    mteb.evaluate(MTEBModel(hbi.load("models:/hbi@champion")), mteb.get_tasks(["MSVDT2VRetrieval"]))

MTEB asks for one vector an item and for the similarity of two sets of vectors. Where a task ranks by similarity, the
vector holds all tokens of the item with their weights, and the similarity is the model's own; elsewhere (as in
classification and clustering) it is the pooled vector of `Model.encode_text` and `Model.encode_video`.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hbi.model.tokens import Tokens
from hbi.serving.model import Model

RANKED = ("Retrieval", "Reranking", "ZeroShot", "VideoCentricQA", "MultiChoice")
"""Parts of the names of those kinds of task that rank by similarity."""


class MTEBModel:
    """The encoder that `mteb.evaluate` takes."""

    def __init__(self, model: Model, name: str = "local/hbi", revision: str = "1") -> None:
        """name: as MTEB's results are filed, `organisation/model`."""
        self.model, self.name, self.revision = model, name, revision

    @property
    def mteb_model_meta(self) -> Any:
        """What MTEB notes of the model."""
        from mteb.models import ModelMeta  # pyright: ignore[reportMissingImports] (an extra)

        config = self.model.model.config
        return ModelMeta.create_empty(
            overwrites={
                "name": self.name,
                "revision": self.revision,
                "modalities": ["text", "video"],
                "n_parameters": sum(p.numel() for p in self.model.model.parameters()),
                "max_tokens": config.words,
                "embed_dim": config.towers.dim,
                "framework": ["PyTorch"],
                "use_instructions": False,
            }
        )

    def encode(self, inputs: Any, *, task_metadata: Any, **_: Any) -> Float[np.ndarray, "items width"]:
        """Vectors of the items of a loader, which have a text or a video. ValueError for an item with both or neither,
        or whose video cannot be decoded."""
        ranked = any(part in task_metadata.type for part in RANKED)
        kinds = {"text", "video"} & set(inputs.dataset.column_names)
        if len(kinds) != 1:
            raise ValueError(
                f"{task_metadata.name}: an item has {sorted(kinds)}: this model takes text or video"
            )
        if kinds == {"video"}:
            # Not by torchcodec: as every other video, in a process of its own and with a player's picture.
            videos = list(_videos(inputs.dataset))
            return (
                self._packed(self.model.video_tokens(videos)) if ranked else self.model.encode_video(videos)
            )
        texts = [text for batch in inputs for text in batch["text"]]
        return self._packed(self.model.text_tokens(texts)) if ranked else self.model.encode_text(texts)

    def similarity(self, one: Any, other: Any) -> Float[Tensor, "items others"]:
        """Similarity of each with each; texts and videos in any order."""
        first, second = (torch.atleast_2d(torch.as_tensor(np.asarray(side))) for side in (one, other))
        if first.shape[1] == self.model.model.config.towers.dim:
            return (
                torch.nn.functional.normalize(first, dim=-1) @ torch.nn.functional.normalize(second, dim=-1).T
            )
        with torch.inference_mode():
            return self.model.model.similarity(self._tokens(first), self._tokens(second), chunk=256)

    def similarity_pairwise(self, one: Any, other: Any) -> Float[Tensor, " items"]:
        """Similarity of each with the other of its own row."""
        rows = zip(np.asarray(one), np.asarray(other), strict=True)
        return torch.stack([self.similarity(*pair)[0, 0] for pair in rows])

    def _packed(self, tokens: Tokens) -> Float[np.ndarray, "items width"]:
        """All tokens of each item in a row: direction, weight logit, and whether it is there."""
        parts = (tokens.tokens.float(), tokens.logits.float()[:, :, None], tokens.mask.float()[:, :, None])
        return torch.cat(parts, dim=2).flatten(1).cpu().numpy()

    def _tokens(self, rows: Float[Tensor, "items width"]) -> Tokens:
        """The inverse of `_packed`."""
        dim = self.model.model.config.towers.dim
        parts = rows.unflatten(1, (-1, dim + 2)).to(self.model.device)
        return Tokens(parts[:, :, :dim], parts[:, :, dim], parts[:, :, dim + 1] > 0)


def _videos(dataset: Any) -> Iterable[Any]:
    """Paths of a dataset's videos, or their frames where it holds the files' bytes."""
    from datasets import Video  # pyright: ignore[reportMissingImports] (comes with mteb)

    for row in dataset.cast_column("video", Video(decode=False)).select_columns(["video"]):
        yield row["video"]["bytes"] or row["video"]["path"]
