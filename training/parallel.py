"""Ranks, applied to a model from outside it: DDP or FSDP2 around it, whole tensors out of it, sums over all."""

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hbi.infra.nodes import cores
from hbi.training.settings import ComputeSettings

if TYPE_CHECKING:
    from hbi.model.hbi import HBI

T = TypeVar("T")


@dataclass(frozen=True)
class Process:
    """This process among those that train together."""

    rank: int
    """Its number, from 0."""
    world_size: int
    """How many there are."""
    device: torch.device
    """Where it computes."""

    @staticmethod
    def current(device: str | torch.device = "cpu") -> "Process":
        """By the process group, if there is one."""
        if dist.is_initialized():
            return Process(dist.get_rank(), dist.get_world_size(), torch.device(device))
        return Process(0, 1, torch.device(device))

    @property
    def first(self) -> bool:
        """Whether this is the rank that prints, tracks and saves."""
        return self.rank == 0

    def all_reduce(self, values: Tensor) -> Tensor:
        """Sums over the ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def barrier(self) -> None:
        """Waits until all ranks are here."""
        self.all_reduce(torch.zeros(1, device=self.device)).item()

    def gather_objects(self, ours: T) -> list[T]:
        """What every rank gives, in the order of ranks. For rare events: it waits for all."""
        if self.world_size == 1:
            return [ours]
        everyone: list[Any] = [None] * self.world_size
        dist.all_gather_object(everyone, ours)
        return everyone

    def gather_messages(self, message: str | None) -> list[str]:
        """What the ranks have to say, in the order of ranks; None is nothing."""
        return [text for text in self.gather_objects(message) if text]

    def of_first(self, ours: T) -> T:
        """What the first rank gives, on all of them."""
        if self.world_size == 1:
            return ours
        said: list[Any] = [ours]
        dist.broadcast_object_list(said, device=self.device)
        return said[0]


def parallelize(model: nn.Module, process: Process, settings: ComputeSettings) -> nn.Module:
    """The module to call in training: the same weights, averaged gradients. One process needs none of it."""
    model.to(process.device)
    if process.world_size == 1:
        return model
    if settings.parallel == "ddp":
        # DDP regroups its buckets after the first step, and with three ranks or more another grouping sums in another
        # order. With `find_unused_parameters` it never does: on CPUs a resumed run stays bitwise the unbroken one.
        cpu = process.device.type == "cpu"
        # With heads a step trains a part of the model, and leaves the other heads alone.
        heads = [name for name in ("answerer", "captioner") if getattr(model, name, None) is not None]
        return nn.parallel.DistributedDataParallel(
            model,
            device_ids=None if cpu else [process.device],
            find_unused_parameters=cpu or len(heads) > 0,
            gradient_as_bucket_view=True,
        )
    return _shard(model, process, settings)


def _shard(model: nn.Module, process: Process, settings: ComputeSettings) -> nn.Module:
    """FSDP2: every list of layers is split layer by layer, and the rest as one."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(process.device.type, (process.world_size,))
    for layers in (module for module in model.modules() if isinstance(module, nn.ModuleList)):
        for layer in layers:
            if any(p.requires_grad for p in layer.parameters()):
                fully_shard(layer, mesh=mesh)
    # A scalar cannot be split: it stays whole on every rank, and `average_scalars` averages its gradient.
    fully_shard(model, mesh=mesh, ignored_params={p for p in model.parameters() if p.ndim == 0})
    return model


def averaging(wrapped: nn.Module, on: bool) -> contextlib.AbstractContextManager[None]:
    """Whether backward passes in here average gradients over ranks (FSDP2 always does, and adds them up)."""
    if on or not isinstance(wrapped, nn.parallel.DistributedDataParallel):
        return contextlib.nullcontext()
    return wrapped.no_sync()


def average_scalars(model: nn.Module, process: Process, settings: ComputeSettings) -> None:
    """Averages the gradients that FSDP2 leaves alone."""
    if process.world_size > 1 and settings.parallel == "fsdp":
        for parameter in model.parameters():
            if parameter.ndim == 0 and parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= process.world_size


def clip_gradients(model: nn.Module, limit: float) -> Tensor:
    """Scales all gradients so that their norm is at most `limit`; the norm before that."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norms = [torch.nn.utils.get_total_norm(same) for same in _by_kind(gradients) if same]
    norm = torch.linalg.vector_norm(torch.stack([full_tensor(n) for n in norms]))
    scale = (limit / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_([local_shard(gradient) for gradient in gradients], scale)
    return norm


def _by_kind(tensors: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Those that are split over ranks, and the others: torch's norms do not mix them."""
    split = [t for t in tensors if hasattr(t, "full_tensor")]
    return split, [t for t in tensors if not hasattr(t, "full_tensor")]


def full_tensor(tensor: Tensor) -> Tensor:
    """A tensor without its sharding. Collective: every rank must ask for the same tensors in the same order."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[operator]


def local_shard(tensor: Tensor) -> Tensor:
    """The part of a tensor that lies here."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # type: ignore[operator]


def copy_into(target: Tensor, value: Tensor) -> None:
    """Copies a whole tensor into one that may be split."""
    if hasattr(target, "device_mesh"):
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(target, DTensor)
        value = distribute_tensor(
            value.to(target.device, target.dtype), target.device_mesh, target.placements
        )  # type: ignore[attr-defined]
    with torch.no_grad():
        target.copy_(value)


def full_model(model: "HBI") -> "HBI":
    """The model itself, or, where its weights are split, a whole copy on every rank. Collective."""
    state = model.state_dict()
    if not any(hasattr(tensor, "full_tensor") for tensor in state.values()):
        return model
    copy = type(model)(model.config).to(next(model.parameters()).device)
    copy.vocabulary = model.vocabulary
    copy.load_state_dict({name: full_tensor(tensor) for name, tensor in state.items()})
    return copy


def threads_per_worker(workers: int) -> int:
    """CPU threads that each of `workers` processes on this machine may use without crowding the others."""
    return max(1, cores() // workers)
