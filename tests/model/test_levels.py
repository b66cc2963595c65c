"""Clustering and merging: against plain loops, alone in a batch, at the edges."""

import math

import pytest
import torch
from torch import Tensor

from hbi.model.levels import TokenMerge, cluster_tokens


def by_loops(x: Tensor, clusters: int) -> list[int]:
    """The clusters of one row of present tokens, step by step."""
    n, dim = x.shape
    d = [[math.dist(x[i].tolist(), x[j].tolist()) / math.sqrt(dim) for j in range(n)] for i in range(n)]
    density = [math.exp(-sum(v * v for v in sorted(row)[:3]) / min(3, n)) for row in d]
    score = []
    for i in range(n):
        denser = [
            d[i][j] for j in range(n) if density[j] > density[i] or (density[j] == density[i] and j < i)
        ]
        score.append(density[i] * min([*denser, max(max(row) for row in d)]))
    centres = sorted(range(n), key=lambda i: (-score[i], i))[:clusters]
    nearest = [min(range(len(centres)), key=lambda c: (d[centres[c]][i], c)) for i in range(n)]
    return [centres.index(i) if i in centres else nearest[i] for i in range(n)]


def everything(n: int, rows: int = 1) -> Tensor:
    return torch.ones(rows, n, dtype=torch.bool)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 12])
@pytest.mark.parametrize("clusters", [1, 2, 4])
def test_clusters_are_those_of_the_loops(n: int, clusters: int) -> None:
    x = torch.randn(6, n, 5, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    count = min(clusters, n)
    cluster, present = cluster_tokens(x, everything(n, 6), count)
    assert present.all()
    assert cluster.tolist() == [by_loops(row, count) for row in x]


def test_each_row_stands_alone_and_padding_is_nowhere() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 10, 6, generator=generator)
    mask = torch.rand(8, 10, generator=generator) < 0.7
    mask[:, 0] = True
    x[3] *= 1000  # a row of far distances must not touch the others
    cluster, present = cluster_tokens(x, mask, 4)
    for row in range(8):
        alone, held = cluster_tokens(x[row][mask[row]][None], everything(int(mask[row].sum())), 4)
        assert torch.equal(cluster[row][mask[row]], alone[0])
        assert torch.equal(present[row, : held.shape[1]], held[0])
    assert (cluster[~mask] == 0).all()
    garbage = cluster_tokens(x.masked_fill(~mask[:, :, None], 1e4), mask, 4)
    assert torch.equal(garbage[0], cluster) and torch.equal(garbage[1], present)


def test_duplicates_go_by_position() -> None:
    x = torch.ones(1, 40, 3) * 0.1  # more than 25 points, where a matrix product would blur the distances
    cluster, present = cluster_tokens(x, everything(40), 3)
    assert cluster[0].tolist() == [0, 1, 2] + [0] * 37 and present.all()
    pairs = torch.tensor([[0.0, 0.0, 5.0, 5.0, 0.0]])[:, :, None]
    assert cluster_tokens(pairs, everything(5), 2)[0].tolist() == [[0, 0, 1, 1, 0]]


@pytest.mark.parametrize(
    "points", [[0.0, 1.0, 10.0, 11.0], [5.0, 5.0, 5.0], [0.0, 4.0], [2.0, 0.0, 2.0, 0.0, 7.0, 7.0]]
)
@pytest.mark.parametrize("clusters", [1, 2])
def test_ties_go_by_position(points: list[float], clusters: int) -> None:
    """Equal densities at a distance: of two equals the earlier counts as the denser."""
    x = torch.tensor(points, dtype=torch.float64)[:, None] / 4
    for row in (x, x.flip(0)):
        ours, _ = cluster_tokens(row[None], everything(len(points)), clusters)
        assert ours[0].tolist() == by_loops(row, clusters)


def test_fewer_tokens_than_clusters() -> None:
    x, mask = torch.randn(2, 6, 4), torch.tensor([[0, 1, 0, 0, 1, 0], [0, 0, 0, 0, 0, 1]]).bool()
    cluster, present = cluster_tokens(x, mask, 4)
    assert present.sum(1).tolist() == [2, 1]
    assert sorted(cluster[0][mask[0]].tolist()) == [0, 1] and cluster[1, 5] == 0
    merge = TokenMerge(4, 0.6, 4)
    tokens, kept, _ = merge(x, mask)
    assert tokens.shape == (2, 4, 4) and tokens.isfinite().all() and torch.equal(kept, present)


def merge_by_loops(merge: TokenMerge, x: Tensor) -> Tensor:
    """One row of present tokens, head by head."""
    n, dim = x.shape
    wide = torch.nn.functional.pad(x, (0, 0, 1, 1))
    mixed = torch.stack([sum(merge.conv.weight[:, :, k] @ wide[i + k] for k in range(3)) for i in range(n)])
    x = merge.norm(x + mixed)
    score = merge.score(x)[:, 0]
    cluster = by_loops(x.detach(), merge.count(n))
    merged = []
    for c in range(merge.count(n)):
        members = [i for i in range(n) if cluster[i] == c]
        weight = score[members].exp()
        merged.append((weight[:, None] * x[members]).sum(0) / (weight.sum() + 1e-6))
    merged = torch.stack(merged)
    q, kv = merge.query(merge.attention_norm(merged)), merge.key_value(merge.attention_norm(x))
    width = dim // merge.heads
    seen = []
    for h in range(merge.heads):
        part = slice(h * width, (h + 1) * width)
        logits = q[:, part] @ kv[:, :dim][:, part].T / width**0.5 + score
        seen.append(logits.softmax(-1) @ kv[:, dim:][:, part])
    return merged + merge.out(torch.cat(seen, dim=1))


def test_merge_is_its_formula_whatever_the_padding() -> None:
    torch.manual_seed(0)
    merge = TokenMerge(8, 0.34, 4).double()
    torch.nn.init.normal_(merge.score.weight, std=0.5)
    x = torch.randn(3, 9, 8, dtype=torch.float64)
    mask = torch.arange(9) < torch.tensor([[9], [7], [5]])
    tokens, kept, _ = merge(x, mask)
    for row, length in enumerate((9, 7, 5)):
        if merge.count(length) == 4 or length == 9:
            assert torch.allclose(tokens[row], merge_by_loops(merge, x[row, :length]), atol=1e-9)
    dirty, _, _ = merge(x.masked_fill(~mask[:, :, None], 7.0), mask)
    assert torch.equal(dirty, tokens) and kept.all()
    again = [merge(x[row : row + 1], mask[row : row + 1]).tokens for row in range(3)]
    assert torch.allclose(torch.cat(again), tokens, atol=1e-12)


def test_merge_is_the_same_in_training() -> None:
    torch.manual_seed(0)
    merge, x = TokenMerge(8, 0.5, 8), torch.randn(2, 6, 8)
    assert torch.equal(merge.train()(x, everything(6, 2)).tokens, merge.eval()(x, everything(6, 2)).tokens)


@pytest.mark.parametrize(
    ("n", "ratio", "left"), [(24, 0.25, 6), (6, 0.5, 3), (1, 0.25, 1), (5, 1.0, 5), (12, 0.01, 1)]
)
def test_any_ratio(n: int, ratio: float, left: int) -> None:
    merge = TokenMerge(4, ratio, 4)
    tokens, mask, cluster = merge(torch.randn(2, n, 4), everything(n, 2))
    assert tokens.shape == (2, left, 4) and mask.all() and int(cluster.max()) < left


def test_no_rows() -> None:
    merge = TokenMerge(4, 0.5, 4)
    tokens, mask, _ = merge(torch.zeros(0, 6, 4), everything(6, 0))
    tokens.sum().backward()
    assert tokens.shape == (0, 3, 4) and mask.shape == (0, 3)
    assert all(p.grad is not None and (p.grad == 0).all() for p in merge.parameters())
