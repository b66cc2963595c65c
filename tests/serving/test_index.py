"""The token index: what was written is read, the best is found, pooling agrees with the exact search."""

from pathlib import Path

import pytest
import torch

from hbi.model.similarity import weighted_similarity
from hbi.model.tokens import Tokens
from hbi.serving.index import table as index_module
from hbi.serving.index.table import Maker, PartWriter, TokenIndex, Video

MAKER = Maker("models:/hbi/1", "sqlite:///x.db", {"frames": 3, "size": 32})


def tokens(count: int, frames: int = 3, dim: int = 16, seed: int = 0) -> Tokens:
    generator = torch.Generator().manual_seed(seed)
    unit = torch.nn.functional.normalize(torch.randn(count, frames, dim, generator=generator), dim=-1)
    return Tokens(
        unit.half(),
        torch.randn(count, frames, generator=generator),
        torch.ones(count, frames, dtype=torch.bool),
    )


def videos(count: int, prefix: str = "v", frames: int = 3) -> list[Video]:
    return [
        Video(f"{prefix}{i}", f"{prefix}{i}.mp4", 0.0, 1.5, [0.5 * f for f in range(frames)])
        for i in range(count)
    ]


def query(seed: int = 9) -> Tokens:
    words = tokens(1, frames=5, seed=seed)
    return Tokens(words.tokens.float(), words.logits, words.mask)


def test_parts_of_different_lengths_come_back_as_one_index(tmp_path: Path) -> None:
    writer = PartWriter(str(tmp_path))
    rows = [
        writer.write("train-000000", tokens(4), videos(4)),
        writer.write("test-000000", tokens(2, frames=2, seed=1), videos(2, "w é/", frames=2)),
    ]
    with pytest.raises(ValueError, match="not an index"):
        TokenIndex.open(str(tmp_path))  # no index.json yet: it is written last
    writer.finish(MAKER, rows)
    held = TokenIndex.open(str(tmp_path))
    assert [v.id for v in held.videos] == ["v0", "v1", "v2", "v3", "w é/0", "w é/1"]
    assert held.maker == MAKER
    assert held.tokens.mask.sum(1).tolist() == [3, 3, 3, 3, 2, 2]
    torch.testing.assert_close(held.tokens.tokens[:4], tokens(4).tokens)


def test_search_ranks_by_the_exact_similarity() -> None:
    held = TokenIndex(MAKER, tokens(50), videos(50))
    expected = weighted_similarity(query(), Tokens(held.tokens.tokens.float(), *held.tokens[1:]))[0]
    found = held.search(query(), 50)
    assert [int(v.id[1:]) for _, v in found] == expected.argsort(descending=True).tolist()
    torch.testing.assert_close(torch.tensor([s for s, _ in found]), expected.sort(descending=True).values)
    assert held.search(query(), 5) == found[:5]


def test_pooled_candidates_then_exact_finds_the_same_best(monkeypatch: pytest.MonkeyPatch) -> None:
    held = TokenIndex(MAKER, tokens(400), videos(400))
    exact = held.search(query(), 3)
    monkeypatch.setattr(index_module, "POOLED_ABOVE", 100)
    assert held.search(query(), 3, candidates=200) == exact
    assert len(held.search(query(), 3, candidates=1)) == 3


def test_adding_replaces_and_removing_removes(tmp_path: Path) -> None:
    held = TokenIndex(MAKER, tokens(4), videos(4))
    grown = held.plus(tokens(2, seed=5), [*videos(1, "new"), videos(4)[1]])
    assert [v.id for v in grown.videos] == ["v0", "v2", "v3", "new0", "v1"]
    torch.testing.assert_close(grown.tokens.tokens[-1], tokens(2, seed=5).tokens[1])
    assert len(held.videos) == 4
    less = grown.without(["v0", "new0"])
    with pytest.raises(KeyError, match="v0"):
        less.without(["v0"])
    less.save(str(tmp_path))
    assert [v.id for v in TokenIndex.open(str(tmp_path)).videos] == ["v2", "v3", "v1"]
    assert less.without(["v1", "v2", "v3"]).search(query(), 5) == []


def test_explain_gives_a_number_for_every_word_and_frame() -> None:
    held = TokenIndex(MAKER, tokens(4), videos(4))
    interaction, video = held.explain(query(), "v2")
    assert interaction.shape == (5, 3)
    assert video.id == "v2"
    assert interaction.abs().sum() > 0
    with pytest.raises(KeyError):
        held.explain(query(), "nobody")
