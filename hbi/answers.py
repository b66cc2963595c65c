"""What the demo asks its search, and what is true of the answers: the made corpus knows its scripts."""

import json
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hbi.pipelines.corpus.scripts import Script, make_scripts
from hbi.pipelines.corpus.truth import Verdict, told, verdict

VERDICTS: tuple[Verdict, ...] = ("right", "but for one word", "wrong")


@dataclass(frozen=True)
class Question:
    """A caption of a clip that was not trained on, asked as a search."""

    text: str
    """The caption."""
    id: str
    """Its own clip."""


@dataclass(frozen=True)
class Clips:
    """The test clips of a made corpus: what each plays, and how it is told."""

    scripts: dict[str, Script]
    """By id."""
    captions: dict[str, list[str]]
    """By id."""

    @staticmethod
    def read(manifest: Path, seed: int, split: str = "test") -> "Clips":
        """Of the manifest that `make_corpus` wrote with this seed."""
        rows = [json.loads(line) for line in manifest.read_text().splitlines()]
        scripts = make_scripts(len(rows), seed)
        pairs = [(row, script) for row, script in zip(rows, scripts, strict=True) if row["split"] == split]
        return Clips(
            {row["id"]: script for row, script in pairs}, {row["id"]: row["captions"] for row, _ in pairs}
        )

    def questions(self) -> list[Question]:
        """Every caption of every clip."""
        return [Question(text, id) for id, texts in self.captions.items() for text in texts]

    def examples(self) -> list[Question]:
        """One question of each number of clauses: the first clip's that has so many, told another way each time."""
        found: dict[int, Question] = {}
        for id, script in self.scripts.items():
            texts = self.captions[id]
            found.setdefault(len(script), Question(texts[min(len(script), len(texts)) - 1], id))
        return [found[clauses] for clauses in sorted(found)]


def ask(address: str, text: str, k: int) -> list[dict[str, Any]]:
    """What a running search answers."""
    body = json.dumps({"text": text, "k": k}).encode()
    request = urllib.request.Request(f"{address}/search", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)["results"]


def example_lines(clips: Clips, question: Question, results: list[dict[str, Any]]) -> list[str]:
    """A question and its answers: score, clip, verdict, and the question with brackets around what does not hold."""
    asked = clips.scripts[question.id]
    lines = ["", f"  “{question.text}”"]
    for result in results:
        answer = clips.scripts[result["id"]]
        lines.append(
            f"    {result['score']:.3f}  {result['id']}  {verdict(asked, answer):16}  {told(asked, answer)}"
        )
        if len(answer) != len(asked):
            lines[-1] += f"   [it shows {len(answer)} things, not {len(asked)}]"
    return lines


def count_verdicts(clips: Clips, address: str) -> dict[int, Counter[Verdict]]:
    """What the first answer to each caption is, by the caption's number of clauses."""
    questions = clips.questions()
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(partial(_first_answer, address), questions))
    counted: dict[int, Counter[Verdict]] = {}
    for question, id in zip(questions, answers, strict=True):
        asked = clips.scripts[question.id]
        counted.setdefault(len(asked), Counter())[verdict(asked, clips.scripts[id])] += 1
    return counted


def _first_answer(address: str, question: Question) -> str:
    return ask(address, question.text, 1)[0]["id"]


def verdict_table(counted: dict[int, Counter[Verdict]]) -> str:
    """Share of each verdict in percent, by number of clauses and over all."""
    rows = {str(clauses): counted[clauses] for clauses in sorted(counted)} | {
        "all": sum(counted.values(), Counter())
    }
    lines = [
        f"{'first answer, by clauses':26}{'sentences':>10}" + "".join(f"{name:>18}" for name in VERDICTS)
    ]
    for name, counts in rows.items():
        shares = "".join(f"{100 * counts[verdict] / counts.total():16.1f} %" for verdict in VERDICTS)
        lines.append(f"  {name:24}{counts.total():10}{shares}")
    return "\n".join(lines)
