"""The registered model as MLflow runs it: models-from-code, so that nothing is unpickled.

`hbi.serving.package` names what travels beside the weights. Who has the pip requirements and MLflow needs nothing
else:

    hbi = mlflow.pyfunc.load_model("models:/hbi@champion")
    hbi.predict(pandas.DataFrame({"text": ["a red square moves left"]}))
    hbi.predict(pandas.DataFrame({"video": ["clips/one.mp4"]}))
    hbi.predict(pandas.DataFrame({"video": ["clips/one.mp4"], "question": ["what moves left?"]}))
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import mlflow
import pandas as pd
import torch

if TYPE_CHECKING:
    from hbi.model.tokens import Tokens

COLUMNS = ("text", "video", "question", "answers")


class HBIPackage(mlflow.pyfunc.PythonModel):
    """Sentences and videos to the tokens that retrieval is scored on, videos to captions, questions to answers."""

    def load_context(self, context: Any) -> None:
        """Weights, settings and tokenizer from the packaged model folder; a GPU is used where there is one."""
        from hbi.model.tokenizer import load_tokenizer
        from hbi.model.weights import load_model
        from hbi.serving.model import Model

        folder = context.artifacts["model"]
        self.model = Model(load_model(folder), load_tokenizer(folder))

    def predict(  # pyright: ignore[reportIncompatibleMethodOverride] (MLflow's own says that it returns nothing)
        self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """One row for each input row: a `text`, a `video` (a local path), or a `video` and a `question` about it.

        A text or a video gives three columns:

        tokens: [n, dim] unit vectors of the words or frames;  weights: [n], which sum to 1;
        embedding: [dim], the weighted sum of the tokens, for a first rough search.

        A text a and a video b match by 1/2 (sum_t w_t max_v s[t, v] + sum_v w_v max_t s[t, v]), with s the inner
        products of their tokens. A video has a `caption` too, where the model writes captions. A question has an
        `answer` and its `probability`: of the model's own list, or of `answers`, a list in the row.

        model_input: a table, a list of rows, or a list of sentences (as a table of `text`). ValueError names the row
        and what to fill; nothing is passed over.
        """
        rows = [_checked(number, row) for number, row in enumerate(_records(model_input))]
        answers: dict[int, dict[str, Any]] = {}
        texts = {number: row["text"] for number, row in enumerate(rows) if "text" in row}
        if texts:
            answers |= zip(texts, _token_rows(self.model.text_tokens(list(texts.values()))), strict=True)
        videos = {n: row["video"] for n, row in enumerate(rows) if "video" in row and "question" not in row}
        if videos:
            answers |= zip(videos, self._videos(list(videos.values())), strict=True)
        for number, row in enumerate(rows):
            if "question" in row:
                ranked = self.model.rank_answers(row["video"], row["question"], row.get("answers"))
                answers[number] = {"answer": ranked[0][0], "probability": ranked[0][1]}
        return pd.DataFrame([answers[number] for number in range(len(rows))])

    def _videos(self, paths: Sequence[str]) -> list[dict[str, Any]]:
        found = _token_rows(self.model.video_tokens(paths))
        if self.model.model.captioner is not None:
            for row, caption in zip(found, self.model.caption(paths), strict=True):
                row["caption"] = caption
        return found


def _records(given: Any) -> list[dict[str, Any]]:
    """The rows of whatever came; ValueError where there is none."""
    if isinstance(given, pd.DataFrame):
        rows = given.to_dict("records")
    elif isinstance(given, str):
        rows = [{"text": given}]
    elif isinstance(given, dict):
        rows = [given]
    else:
        rows = [row if isinstance(row, dict) else {"text": row} for row in given]
    if not rows:  # MLflow leaves out columns that the signature does not know, and rows without any
        raise ValueError(
            f"no row with a column of {', '.join(COLUMNS)}: give a table of them, as in "
            'pandas.DataFrame({"text": ["a red square"]})'
        )
    return rows


def _checked(number: int, row: dict[Any, Any]) -> dict[str, Any]:
    """What is filled of a row's columns."""
    if strange := [str(name) for name in row if name not in COLUMNS]:
        raise ValueError(f"row {number}: no column {', '.join(strange)}; there are {', '.join(COLUMNS)}")
    for name in ("text", "video", "question"):
        if isinstance(value := row.get(name), list | tuple | dict):
            raise ValueError(
                f"row {number}: `{name}` is {value!r:.60}, must be one string: give several as rows of a table, as in "
                f'pandas.DataFrame({{"{name}": [...]}})'
            )
    filled = {name: row[name] for name in ("text", "video", "question") if _is_text(row.get(name))}
    if ("text" in filled) == ("video" in filled):
        raise ValueError(f"row {number}: fill either `text` or `video` (a path), and leave the other empty")
    if "question" in filled and "video" not in filled:
        raise ValueError(f"row {number}: a `question` is about a video: fill `video` (a path)")
    answers = row.get("answers")
    if answers is not None and not _is_nan(answers):
        if "question" not in filled:
            raise ValueError(f"row {number}: `answers` belong to a `question`: fill it")
        if isinstance(answers, str):
            raise ValueError(f"row {number}: `answers` is {answers!r}, must be a list of answers")
        filled["answers"] = list(answers)
    return filled


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_nan(value: Any) -> bool:
    """What pandas puts where a column has no value in a row."""
    return isinstance(value, float) and value != value


def _token_rows(tokens: "Tokens") -> list[dict[str, Any]]:
    """The present tokens of each row, as plain lists."""
    unit = torch.nn.functional.normalize(tokens.tokens.float(), dim=-1)
    weights = tokens.weights().float()
    return [
        {"tokens": t[m].tolist(), "weights": w[m].tolist(), "embedding": (w @ t).tolist()}
        for t, w, m in zip(unit.cpu(), weights.cpu(), tokens.mask.cpu(), strict=True)
    ]


mlflow.models.set_model(HBIPackage())
