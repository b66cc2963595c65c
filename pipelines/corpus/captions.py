"""What is said of a script: captions in three ways, and questions that the script decides."""

from typing import Any

from hbi.pipelines.corpus.render import clause_times
from hbi.pipelines.corpus.scripts import ACTIONS, Clause, Script


def caption(script: Script, style: int = 0) -> str:
    """One of three ways (0, 1, 2) to tell a script."""
    if style == 0:
        return " then ".join(f"the {c.entity} {c.action}" for c in script)
    if style == 1:
        told = [f"{_article(c)} {c.entity} {ACTIONS[c.action]}" for c in script]
        return told[0] if len(told) == 1 else "first " + " and after that ".join(told)
    told = [f"the {c.entity} {c.action}" for c in reversed(script)]
    return " after ".join(told)


def _article(clause: Clause) -> str:
    return "an" if clause.entity.colour[0] in "aeiou" else "a"


def moments(script: Script) -> list[dict[str, Any]]:
    """Each clause in words, with its times in seconds, in the order in which they play."""
    each = [(caption((clause,)), *clause_times(number)) for number, clause in enumerate(script)]
    return [{"text": text, "start": start, "end": end} for text, start, end in each]


def questions(script: Script) -> list[dict[str, str]]:
    """Questions with one-word (or one-action) answers, all decided by the script."""
    asked = []
    actions = [c.action for c in script]
    for clause in script:
        if actions.count(clause.action) == 1:
            asked.append((f"what colour is the thing that {clause.action}?", clause.entity.colour))
            asked.append((f"which shape {clause.action}?", clause.entity.shape))
    asked.append((f"what does the {script[0].entity} do first?", script[0].action))
    asked.append(("how many things happen?", str(len(script))))
    if len(script) > 1 and script[0] != script[-1]:
        first, last = script[0], script[-1]
        asked.append(
            (
                f"is it the {first.entity} that does something last?",
                "yes" if first.entity == last.entity else "no",
            )
        )
    return [{"question": q, "answer": a} for q, a in asked]
