"""Questions and answers about videos, as the QA datasets publish them: a row a video, with all its questions."""

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from hbi.pipelines.datasets.files import SPLITS, Files, read_json, read_lines
from hbi.pipelines.manifest import Row


def question_files(files: Files) -> list[tuple[str, str]]:
    names = [(split, (f"{split}_qa.json", f"{split}.jsonl", f"{split}_qa.jsonl")) for split in SPLITS]
    found = [(split, path) for split, some in names if (path := files.find(*some))]
    if not found:
        files.need("train_qa.json", "train.jsonl")
    return found


def read_questions(path: str, prefix: str) -> Iterator[tuple[str, str, str]]:
    """(video, question, answer); a video that is a number is called <prefix><number>."""
    entries = map(json.loads, read_lines(path)) if path.endswith(".jsonl") else read_json(path)
    for entry in entries:
        id = str(entry["video_id"])
        yield f"{prefix}{id}" if id.isdecimal() else id, entry["question"], entry["answer"]


def rows_by_video(
    split: str, pairs: Iterable[tuple[str, str, Any]], place: Callable[[str], str]
) -> Iterator[Row]:
    asked: dict[str, list[dict[str, str]]] = {}
    for id, question, answer in pairs:
        asked.setdefault(id, []).append({"question": question, "answer": str(answer)})
    for id, qa in asked.items():
        yield Row(place(id), id, split=split, qa=qa)
