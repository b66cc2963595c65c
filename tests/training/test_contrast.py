"""Two, three and four processes give the loss and the gradient of one that holds the global batch."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hbi.model.config import LossSettings
from hbi.model.hbi import HBI, Encoded
from hbi.model.losses import with_teacher
from hbi.training.contrast import backward, contrast, detach_tokens
from hbi.training.exchange import Sizes, gather_rows
from hbi.training.optim import make_optimizer
from hbi.training.parallel import (
    Process,
    average_scalars,
    averaging,
    clip_gradients,
    full_model,
    full_tensor,
    parallelize,
)
from hbi.training.settings import GATHERED, ComputeSettings, ExchangeSettings, OptimSettings
from tests.support.ranks import start_ranks
from tests.support.training_shards import FRAMES, SIZE, tiny_model

WORDS = 12
CASES = {
    "even": ([3, 3], LossSettings(interaction=1.0, distillation=2.0), 1),
    "uneven": ([4, 1], LossSettings(interaction=1.0, distillation=2.0), 1),
    "one rank without a clip": ([5, 0, 2], LossSettings(interaction=1.0, distillation=2.0), 1),
    "chunked": ([2, 3, 3], LossSettings(interaction=1.0, distillation=2.0, chunk=2), 1),
    "in pieces": ([3, 1, 2, 2], LossSettings(interaction=1.0, distillation=2.0), 2),
    "sigmoid": ([2, 0, 3], LossSettings(interaction=1.0, distillation=2.0, contrast="sigmoid"), 1),
    "sigmoid in pieces": ([4, 1], LossSettings(contrast="sigmoid"), 2),
    "ring of two": ([3, 2], LossSettings(interaction=1.0, distillation=2.0), 1),
    "ring of three, one without a clip": ([5, 0, 2], LossSettings(interaction=1.0, distillation=2.0), 1),
    "ring of four, chunked, in pieces": (
        [3, 1, 2, 2],
        LossSettings(interaction=1.0, distillation=2.0, chunk=2),
        2,
    ),
    "taught, in pieces": ([3, 2], LossSettings(teacher=1.5), 2),
    "ring of three, taught": ([2, 0, 3], LossSettings(teacher=1.5), 1),
    "published": ([2, 3, 1, 2], LossSettings(interaction=1.0, distillation=2.0, objective="published"), 1),
}


def fresh_model(settings: LossSettings | None = None, seed: int = 0) -> HBI:
    torch.manual_seed(seed)
    config = tiny_model(estimator=True)
    if settings is None or settings.contrast == "softmax":
        return HBI(config)
    model = HBI(replace(config, towers=replace(config.towers, family="siglip")))
    model.learn_bias()
    return model


def global_batch(clips: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(clips)
    ids = torch.randint(1, 300, (clips, WORDS), generator=generator)
    lengths = torch.randint(3, WORDS + 1, (clips, 1), generator=generator)
    video = torch.randint(0, 256, (clips, FRAMES, SIZE, SIZE, 3), generator=generator, dtype=torch.uint8)
    shown = torch.randint(2, FRAMES + 1, (clips, 1), generator=generator)
    return ids, torch.arange(WORDS) < lengths, video, torch.arange(FRAMES) < shown


def encode(wrapped: nn.Module, batch: tuple[Tensor, ...], settings: LossSettings) -> Encoded:
    """With what another model teaches, where it does."""
    encoded = wrapped(*batch)
    if not settings.teacher:
        return encoded
    with torch.no_grad():
        return with_teacher(encoded, fresh_model(settings, seed=1)(*batch))


def learn(  # noqa: PLR0913 (as many as a case has)
    model: HBI,
    wrapped: nn.Module,
    batch: tuple[Tensor, ...],
    settings: LossSettings,
    pieces: int,
    group=None,
    exchange: ExchangeSettings = GATHERED,
) -> tuple[dict[str, float], dict[str, Tensor]]:
    cut = list(zip(*(tensor.tensor_split(pieces) for tensor in batch), strict=True))
    losses = backward(
        lambda piece: encode(wrapped, piece, settings),
        cut,
        settings,
        lambda on: averaging(wrapped, on),
        group,
        exchange,
    )
    if group is not None:
        for loss in losses.values():
            dist.all_reduce(loss, group=group)
            loss /= dist.get_world_size(group)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {name: float(loss) for name, loss in losses.items()}, gradients


def run_cases(rank: int, folder: str) -> None:
    """One of four processes; each case uses the first two, three or four of them."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=4)
    groups = {world: dist.new_group(list(range(world))) for world in (2, 3, 4)}
    results = {}
    for name, (sizes, settings, pieces) in CASES.items():
        if rank >= len(sizes):
            continue
        group = groups[len(sizes)]
        model = fresh_model(settings)
        wrapped = nn.parallel.DistributedDataParallel(model, process_group=group, find_unused_parameters=True)
        batch = tuple(tensor.split(sizes)[rank] for tensor in global_batch(sum(sizes)))
        exchange = ExchangeSettings("ring" if name.startswith("ring") else "gather")
        results[name] = learn(model, wrapped, batch, settings, pieces, group, exchange)
    for accumulate in (1, 2):
        results[f"fsdp {accumulate}"] = learn_split(rank, accumulate)
    halves = {}
    for wire in (torch.float32, torch.bfloat16):
        rows = torch.full((rank, 2), 1 + rank / 1000, requires_grad=True)
        gathered, _ = gather_rows(rows, wire=wire)
        (gathered * (1 + rank / 3)).sum().backward()
        halves[str(wire)] = gathered.detach(), rows.grad
    results["halves"] = halves
    rows = torch.full((rank, 2), float(rank), requires_grad=True)
    gathered, first = gather_rows(rows)
    (gathered * (rank + 1)).sum().backward()
    results["rows"] = gathered.detach(), first, rows.grad
    results["collectives"] = collectives_of_a_step(rank)
    torch.save(results, f"{folder}/rank-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def collectives_of_a_step(rank: int) -> list[tuple[str, int]]:
    """Names and numbers sent to each rank of what a loss and its gradient exchange, once the clips are counted."""
    clips, settings = [2, 1, 3, 2], LossSettings(levels=(1.0, 0.0, 0.0))
    batch = (part.split(clips)[rank] for part in global_batch(sum(clips)))
    encoded, _ = detach_tokens(fresh_model()(*batch, loss=settings))
    asked, calls = Sizes(clips[rank], torch.device("cpu")), []

    def counted(name: str, call: Callable) -> Callable:
        def count(output: Tensor, *rest: Any, **more: Any) -> Any:
            calls.append((name, output.numel()))
            return call(output, *rest, **more)

        return count

    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_gather_single", "reduce_scatter_single", "all_to_all_single", "all_reduce"):
            patch.setattr(dist, name, counted(name, getattr(dist, name)))
        contrast(encoded, settings, asked=asked)["loss"].backward()
    return calls


def learn_split(rank: int, pieces: int) -> tuple[dict[str, Tensor], float, dict[str, Tensor]]:
    """Gradients under FSDP2, their norm, and the weights after a step of the optimiser."""
    place, settings = Process(rank, 4, torch.device("cpu")), ComputeSettings(parallel="fsdp", bf16=False)
    model = fresh_model()
    wrapped = parallelize(model, place, settings)
    optimizer = make_optimizer(model, OptimSettings(lr=1e-2))
    batch = tuple(tensor.split([2, 1, 0, 3])[rank] for tensor in global_batch(6))
    cut = list(zip(*(tensor.tensor_split(pieces) for tensor in batch), strict=True))
    backward(
        lambda piece: wrapped(*piece),
        cut,
        LossSettings(interaction=1.0, distillation=2.0),
        lambda on: averaging(wrapped, on),
    )
    average_scalars(model, place, settings)
    gradients = {
        name: full_tensor(p.grad).clone() for name, p in model.named_parameters() if p.grad is not None
    }
    norm = clip_gradients(model, 1.0)
    optimizer.step()
    return gradients, norm.item(), {name: t.clone() for name, t in full_model(model).state_dict().items()}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    start_ranks(run_cases, (str(folder),), 4)
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(4)]


@pytest.mark.parametrize("name", CASES)
def test_ranks_give_the_loss_and_gradient_of_one_process(results: list[dict], name: str) -> None:
    sizes, settings, _ = CASES[name]
    model = fresh_model(settings)
    # The reference is the plain way: one graph, the whole batch, nothing cut, nothing chunked.
    encoded = encode(model, global_batch(sum(sizes)), settings)
    losses = contrast(encoded, replace(settings, chunk=None))
    losses["loss"].backward()
    expected = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    assert ("teacher" in losses) == (settings.teacher > 0)
    assert ("logit_bias" in expected) == (settings.contrast == "sigmoid")
    for rank in range(len(sizes)):
        ranked_losses, gradients = results[rank][name]
        for key, loss in losses.items():
            assert ranked_losses[key] == pytest.approx(loss.item(), rel=1e-5, abs=1e-7), key
        assert gradients.keys() >= expected.keys()
        largest = max(gradient.norm() for gradient in expected.values())
        for key, gradient in expected.items():
            assert (gradients[key] - gradient).norm() <= 1e-5 * max(gradient.norm(), 1e-2 * largest), key


@pytest.mark.parametrize("pieces", [1, 2])
def test_split_weights_take_the_step_of_whole_ones(results: list[dict], pieces: int) -> None:
    model = fresh_model()
    optimizer = make_optimizer(model, OptimSettings(lr=1e-2))
    contrast(model(*global_batch(6)), LossSettings(interaction=1.0, distillation=2.0))["loss"].backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    for rank in range(4):
        gradients, split_norm, weights = results[rank][f"fsdp {pieces}"]
        for name, gradient in expected.items():
            assert (gradients[name] - gradient).norm() <= 1e-5 * max(gradient.norm(), 1e-3 * norm), name
        assert split_norm == pytest.approx(norm.item(), rel=1e-5)
        for name, weight in model.state_dict().items():
            # Adam's first step is the gradient's sign: where that is rounding, so is the step.
            assert (weights[name] - weight).norm() <= 1e-2 * (weight.norm() + 1e-2), name


def test_gathered_rows_lie_in_the_order_of_ranks_and_collect_the_gradients_of_all(
    results: list[dict],
) -> None:
    for rank in range(4):
        gathered, first, gradient = results[rank]["rows"]
        assert gathered[:, 0].tolist() == [1, 2, 2, 3, 3, 3]
        assert first == [0, 0, 1, 3][rank]
        assert torch.equal(gradient, torch.full((rank, 2), 1.0 + 2 + 3 + 4))


def test_half_precision_travels_and_is_summed_in_float32(results: list[dict]) -> None:
    for rank in range(1, 4):
        (exact, exact_gradient), (rounded, gradient) = results[rank]["halves"].values()
        assert torch.equal(rounded, exact.bfloat16().float()) and not torch.equal(rounded, exact)
        said = torch.tensor([1 + other / 3 for other in range(4)])
        assert torch.allclose(exact_gradient, said.sum())
        assert torch.equal(gradient, said.bfloat16().float().sum().expand_as(gradient))


def test_a_step_asks_for_no_sizes_and_sends_no_words(results: list[dict]) -> None:
    """Frames there and what is said of them back, similarities there and back: nothing else, and nothing of words."""
    clips, dim = [2, 1, 3, 2], tiny_model().towers.dim
    of_a_clip = FRAMES * (dim + 2)  # a frame's token, its logit, its mask
    for rank, ours in enumerate(clips):
        assert results[rank]["collectives"] == [
            ("all_gather_single", len(clips) * max(clips) * of_a_clip),
            ("all_to_all_single", ours * sum(clips)),
            ("all_to_all_single", ours * sum(clips)),
            ("reduce_scatter_single", max(clips) * of_a_clip),
        ]


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation makes."""

    entries = 0

    def __torch_dispatch__(self, operation: Callable, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        made = result if isinstance(result, tuple | list) else [result]
        self.entries = max([self.entries, *(t.numel() for t in made if isinstance(t, Tensor))])
        return result


@pytest.mark.parametrize("chunk", [None, 4])
def test_in_chunks_the_pairwise_tensor_is_never_whole(chunk: int | None) -> None:
    clips = 24
    model = fresh_model()
    encoded, _ = detach_tokens(model(*global_batch(clips)))
    whole = clips * clips * WORDS * FRAMES
    with Largest() as largest:
        contrast(encoded, LossSettings(chunk=chunk, interaction=0.0))["loss"].backward()
    assert (largest.entries >= whole) == (chunk is None)


@pytest.mark.parametrize("pieces", [2, 3])
def test_pieces_give_the_gradient_of_the_whole_batch(pieces: int) -> None:
    batch = global_batch(5)
    one, several = fresh_model(), fresh_model()
    losses, expected = learn(one, one, batch, LossSettings(interaction=1.0, distillation=2.0), 1)
    in_pieces, gradients = learn(
        several, several, batch, LossSettings(interaction=1.0, distillation=2.0), pieces
    )
    assert in_pieces == pytest.approx(losses, rel=1e-5)
    largest = max(gradient.norm() for gradient in expected.values())
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).norm() <= 1e-5 * max(gradient.norm(), 1e-3 * largest), name


def test_a_batch_without_a_clip_has_loss_zero_and_leaves_the_gradient_alone() -> None:
    model = fresh_model()
    losses, gradients = learn(
        model, model, global_batch(0), LossSettings(interaction=1.0, distillation=2.0), 1
    )
    assert losses == {"loss": 0.0}
    assert all(not gradient.any() for gradient in gradients.values())


def test_a_gradient_through_detached_tokens_is_the_plain_one(tmp_path: Path) -> None:
    batch, settings = global_batch(4), LossSettings(interaction=1.0, distillation=2.0)
    plain, cut = fresh_model(), fresh_model()
    encoded: Encoded = plain(*batch)
    contrast(encoded, settings)["loss"].backward()
    _, gradients = learn(cut, cut, batch, settings, 1)
    for name, parameter in plain.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name], parameter.grad)
