"""The registered model as MLflow runs it: models-from-code, so that nothing is unpickled.

`hbi.serving.package` names what travels beside the weights. Who has the pip requirements and MLflow needs nothing
else:

    hbi = mlflow.pyfunc.load_model("models:/hbi@champion")
    hbi.predict(pandas.DataFrame({"text": ["a red square moves left"]}))
    hbi.predict(pandas.DataFrame({"video": ["clips/one.mp4"]}))
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import torch

BATCH = 32
"""Rows encoded at once."""


class HBIPackage(mlflow.pyfunc.PythonModel):
    """Sentences and videos to the tokens of the entity level, on which retrieval is scored."""

    def load_context(self, context: Any) -> None:
        """Weights, settings and tokenizer from the packaged model folder; a GPU is used where there is one."""
        from hbi.model.tokenizer import load_tokenizer
        from hbi.model.weights import load_model

        folder = context.artifacts["model"]
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = load_model(folder).eval().to(self.device)
        self.tokenizer = load_tokenizer(folder)

    def predict(  # pyright: ignore[reportIncompatibleMethodOverride] (MLflow's own says that it returns nothing)
        self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """One row for each input row, whose `text` or `video` (a local path) is filled, with three columns:

        tokens: [n, dim] unit vectors of the words or frames;  weights: [n], which sum to 1;
        embedding: [dim], the weighted sum of the tokens, for a first rough search.

        A text a and a video b match by 1/2 (sum_t w_t max_v s[t, v] + sum_v w_v max_t s[t, v]), with s the inner
        products of their tokens. ValueError for a row with neither or both.
        """
        texts, videos = {}, {}
        for number, row in enumerate(model_input.to_dict("records")):
            text, video = _filled(row, "text"), _filled(row, "video")
            if (text is None) == (video is None):
                raise ValueError(
                    f"row {number}: fill either `text` or `video` (a path), and leave the other empty"
                )
            if text is not None:
                texts[number] = text
            if video is not None:
                videos[number] = video
        answers: dict[int, dict[str, Any]] = {}
        for encode, wanted in ((self._texts, texts), (self._videos, videos)):
            numbers = list(wanted)
            for first in range(0, len(numbers), BATCH):
                part = numbers[first : first + BATCH]
                answers |= zip(part, encode([wanted[number] for number in part]), strict=True)
        ordered = [answers[number] for number in range(len(model_input))]
        return pd.DataFrame(ordered, columns=["tokens", "weights", "embedding"])

    @torch.inference_mode()
    def _texts(self, texts: Sequence[str]) -> list[dict[str, Any]]:
        from hbi.model.tokenizer import tokenize

        ids, mask = (
            tensor.to(self.device) for tensor in tokenize(self.tokenizer, texts, self.model.config.words)
        )
        words, _ = self.model.encode_text(ids, mask)
        return _rows(self.model.text_levels(words, mask)["entity"])

    @torch.inference_mode()
    def _videos(self, paths: Sequence[str]) -> list[dict[str, Any]]:
        from hbi.model.frames import FrameSettings
        from hbi.pipelines.decoding.clip import DecodeError
        from hbi.pipelines.decoding.decoder import Decoder

        config = self.model.config
        settings = FrameSettings(num_frames=config.frames, size=config.towers.image_size)
        clips = []
        with Decoder(settings) as decoder:  # a process of its own: a video can hang a decoder, or kill it
            for path in paths:
                try:
                    clips.append(decoder.decode(Path(path)).frames)
                except (DecodeError, OSError) as error:
                    raise ValueError(f"{path}: gives no frames ({error})") from None
        frames = np.zeros((len(clips), config.frames, settings.size, settings.size, 3), dtype=np.uint8)
        mask = torch.zeros(len(clips), config.frames, dtype=torch.bool)
        for i, clip in enumerate(clips):
            frames[i, : len(clip)] = np.stack(clip)
            mask[i, : len(clip)] = True
        mask = mask.to(self.device)
        encoded = self.model.encode_video(torch.from_numpy(frames).to(self.device), mask)
        return _rows(self.model.video_levels(encoded, mask)["entity"])


def _filled(row: dict[Any, Any], column: str) -> str | None:
    value = row.get(column)
    return value if isinstance(value, str) and value else None


def _rows(tokens: Any) -> list[dict[str, Any]]:
    """The present tokens of each row, as plain lists."""
    unit = torch.nn.functional.normalize(tokens.tokens.float(), dim=-1)
    weights = tokens.weights().float()
    return [
        {"tokens": t[m].tolist(), "weights": w[m].tolist(), "embedding": (w @ t).tolist()}
        for t, w, m in zip(unit.cpu(), weights.cpu(), tokens.mask.cpu(), strict=True)
    ]


mlflow.models.set_model(HBIPackage())
