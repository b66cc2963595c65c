"""The whole state of a run, written whole or not at all, and where such states are kept.

A checkpoint is a model folder (`model.safetensors`, `config.json`, the tokenizer: `load_model` reads it, and holds
the weights that are evaluated) with two files more: `training.safetensors` (optimiser, random states, and the live
weights where an average is evaluated) and `state.json`. Nothing is pickled.
"""

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hbi.infra import storage
from hbi.infra.scratch import scratch_folder
from hbi.model.folder import WEIGHTS
from hbi.model.hbi import HBI
from hbi.model.weights import save_model
from hbi.training.data.order import LoaderState
from hbi.training.optim import EMA
from hbi.training.parallel import Process, copy_into, full_model, full_tensor
from hbi.training.settings import TrainConfig, flatten

STATE, TRAINING = "state.json", "training.safetensors"


@dataclass(frozen=True)
class Progress:
    """How far a run is."""

    step: int = 0
    """Optimiser steps taken."""
    position: LoaderState = field(default_factory=LoaderState)
    """Where it stands in the data."""
    metrics: dict[str, float] | None = None
    """What the latest evaluation gave."""

    def stepped(self, world_size: int, batch: int) -> "Progress":
        """One step later; metrics belong to the step that they were measured at."""
        return Progress(self.step + 1, self.position.advanced(world_size, batch))

    def next_epoch(self) -> "Progress":
        """After the last step of an epoch."""
        return Progress(self.step, self.position.next_epoch())

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> "Progress":
        """The inverse of `to_dict`."""
        position = values["position"]
        done = tuple((world_size, batch, steps) for world_size, batch, steps in position["done"])
        return Progress(values["step"], LoaderState(position["epoch"], done), values["metrics"])


@dataclass
class State:
    """What a checkpoint holds beside the weights that are served."""

    model: HBI
    """The model itself, inside whatever parallelism is around it."""
    optimizer: torch.optim.Optimizer
    """Its optimiser."""
    ema: EMA | None
    """The averaged weights, where they are kept: then they are the ones served."""
    process: Process
    """This process among the ranks."""

    @contextmanager
    def served(self) -> Iterator[HBI]:
        """The model to evaluate and save: with averaged weights, if any; under FSDP2 a whole copy. Collective."""
        with nullcontext() if self.ema is None else self.ema.swapped(self.model):
            yield full_model(self.model)

    def snapshot(self) -> dict[str, Tensor]:
        """Optimiser, random states, and the live weights where others are served. Collective."""
        tensors = {f"random/{name}": states for name, states in _random_states(self.process).items()}
        names: dict[Tensor, str] = {parameter: name for name, parameter in self.model.named_parameters()}
        for parameter, held in self.optimizer.state.items():
            for key, tensor in held.items():
                tensors[f"optimizer/{names[parameter]}/{key}"] = _kept(tensor, self.process)
        if self.ema is not None:
            for name, parameter in self.model.named_parameters():
                if name in self.ema.weights:
                    tensors[f"live/{name}"] = _kept(parameter, self.process)
        return tensors

    def restore(self, folder: Path) -> None:
        """Takes everything from a checkpoint folder, whatever the number of ranks that wrote it."""
        served, tensors = load_file(folder / WEIGHTS), load_file(folder / TRAINING)
        for name, tensor in self.model.state_dict().items():
            copy_into(tensor, tensors.get(f"live/{name}", served[name]))
        if self.ema is not None:
            for name, tensor in self.ema.weights.items():
                copy_into(tensor, served[name])
        for name, parameter in self.model.named_parameters():
            if f"optimizer/{name}/step" in tensors:
                keys = ("step", "exp_avg", "exp_avg_sq")
                held = {key: _like(parameter, tensors[f"optimizer/{name}/{key}"], key) for key in keys}
                self.optimizer.state[parameter] = held
        _set_random_states(tensors, self.process)


def _kept(tensor: Tensor, process: Process) -> Tensor:
    """A whole tensor on the CPU, on the first rank; the others only take part in the gathering."""
    full = full_tensor(tensor.detach())
    return full.cpu().contiguous() if process.first else torch.empty(0)


def _like(parameter: Tensor, value: Tensor, key: str) -> Tensor:
    """Optimiser state as torch makes it: moments like the weights, the step count a scalar (on a GPU if fused)."""
    if key == "step":
        return value.to(parameter.device) if parameter.device.type == "cuda" else value
    target = torch.zeros_like(parameter, memory_format=torch.preserve_format).detach()
    copy_into(target, value)
    return target


def _random_states(process: Process) -> dict[str, Tensor]:
    """The generators of all ranks, a row each."""
    states = {"cpu": torch.get_rng_state()}
    if process.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(process.device)
    for name, state in states.items():
        if process.world_size > 1:
            mine = state.to(process.device)
            rows = [torch.empty_like(mine) for _ in range(process.world_size)]
            dist.all_gather(rows, mine)
            states[name] = torch.stack(rows).cpu()
        else:
            states[name] = state[None]
    return states


def _set_random_states(tensors: dict[str, Tensor], process: Process) -> None:
    """Ours, if there was a rank of our number; a new rank keeps the state that its seed gave it."""
    rows = tensors["random/cpu"]
    if process.rank < len(rows):
        # A copy: torch reads a state from the start of its storage, wherever the view begins.
        torch.set_rng_state(rows[process.rank].clone())
        if process.device.type == "cuda" and "random/cuda" in tensors:
            torch.cuda.set_rng_state(tensors["random/cuda"][process.rank].clone(), process.device)


def write_checkpoint(
    folder: Path, state: State, progress: Progress, tokenizer: Any, config: TrainConfig, about: dict[str, Any]
) -> None:
    """Fills a folder. Collective: every rank takes part, the first writes. about: `data`, the digest of the shards, and
    `tracked`, for `read_tracked`."""
    tensors, failure = state.snapshot(), None
    if state.process.first:  # before the average takes the live weights' place: on a CPU these are not copies
        try:
            save_file(tensors, folder / TRAINING)
        except (OSError, SafetensorError) as error:  # after what all ranks do together
            failure = error
    with state.served() as model:
        if state.process.first and failure is None:
            save_model(model, folder, tokenizer)
            held = {"progress": progress.to_dict(), "config": json.loads(config.to_json()), **about}
            (folder / STATE).write_text(json.dumps(held, indent=2))
    if failure is not None:
        raise failure


def read_progress(folder: Path) -> Progress:
    """How far the run was that wrote this checkpoint."""
    return Progress.from_dict(json.loads((folder / STATE).read_text())["progress"])


def read_tracked(folder: Path) -> list[tuple[dict[str, float], int]]:
    """What was tracked between the checkpoint before and this one: metrics and their step."""
    return [(metrics, step) for metrics, step in json.loads((folder / STATE).read_text()).get("tracked", [])]


def check_checkpoint(folder: Path, where: str, config: TrainConfig, data: str) -> None:
    """ValueError for a checkpoint of another model, of other data or of another data order: it says what differs."""
    state = json.loads((folder / STATE).read_text())
    theirs = flatten(asdict(TrainConfig.from_json(json.dumps(state["config"]))))
    ours = flatten(asdict(config))
    computed = ("model.checkpointing",)
    fixed = ("model.", "task", "heads.vocabulary", "seed", "data.split", "data.shuffle_window", "optim.ema")
    differing = [
        f"{name} {theirs.get(name)} there, {ours.get(name)} here"
        for name in sorted(theirs.keys() | ours.keys())
        if name.startswith(fixed) and name not in computed and theirs.get(name) != ours.get(name)
    ]
    if differing:
        raise ValueError(f"{where} holds another run ({'; '.join(differing)}): give this one another --out")
    if state["data"] != data:
        raise ValueError(
            f"{where} holds a run on other shards: give this one another --out, or its own --data"
        )


def changed_schedule(folder: Path, config: TrainConfig) -> list[str]:
    """The settings of a checkpoint's run that shape the schedule and are others now, as `optim.epochs 2 -> 4`."""
    state = json.loads((folder / STATE).read_text())
    theirs = flatten(asdict(TrainConfig.from_json(json.dumps(state["config"]))))
    return [
        f"{name} {theirs[name]} -> {value}"
        for name, value in flatten(asdict(config)).items()
        if name.startswith(("optim.", "data.batch")) and theirs[name] != value
    ]


class Checkpoints:
    """The checkpoints of a run, in a local folder or under an s3:// prefix, with Ray and without.

    A checkpoint exists once its `state.json` does, and that is written last and removed first: it is whole or absent
    whenever a process dies. (Ray Train's own list of checkpoints is rewritten in place: a driver killed in that moment
    leaves a run that cannot be resumed, and a worker killed in mid-upload leaves a folder that nothing removes.)
    """

    def __init__(self, folder: str, keep: int, metric: str, process: Process):
        self.folder, self.keep, self.metric, self.process = folder, keep, metric, process

    def _all(self) -> list[str]:
        """Folders of whole checkpoints, by epoch and step (their names sort so)."""
        found = [
            storage.parent(path)
            for path in storage.list_files(self.folder, True)
            if path.endswith("/" + STATE) and "/.part-" not in path
        ]
        return sorted(found)

    def _ranked(self) -> list[str]:
        """Worst first; the later of two equals is the better, and any metric beats none."""
        scores: dict[str, float] = {}
        for path in self._all():
            metrics = json.loads(storage.read_bytes(storage.join(path, STATE)))["progress"]["metrics"] or {}
            scores[path] = metrics.get(self.metric, float("-inf"))
        return sorted(scores, key=lambda path: (scores[path], path))

    def latest(self) -> str | None:
        """The checkpoint to go on from."""
        return next(reversed(self._all()), None)

    def best(self) -> str | None:
        """The checkpoint with the highest metric; the latest if none has it."""
        return next(reversed(self._ranked()), None)

    def save(self, write: Callable[[Path], None], progress: Progress) -> None:
        """Keeps what `write` puts into a folder. Collective: every rank calls it, none goes on before it is kept.

        ValueError on all ranks where a disk is full or cannot be written to: it names the folder, in which the earlier
        checkpoints stay and nothing partial does.
        """
        name = f"epoch-{progress.position.epoch:05d}-step-{progress.step:08d}"
        target, failure = storage.join(self.folder, name), None
        try:
            with tempfile.TemporaryDirectory(prefix=".part-", dir=self._staging()) as part:
                write(Path(part))
                if self.process.first:
                    self._remove(target)  # a process may have died while it wrote this
                    for file in Path(part).iterdir():
                        flush(file)
                    storage.put_files(Path(part).iterdir(), target, last=STATE, move=True)
                    self._prune()
        except (OSError, SafetensorError) as error:  # safetensors raises its own for a full disk
            if self.process.first:
                self._remove(target)
            failure = f"{target} cannot be written ({error})"
        failures = self.process.gather_messages(failure)
        if failures:
            raise ValueError(
                f"{failures[0]}: make room there, or give fewer checkpoints (--set.checkpoint.keep {self.keep}), and "
                f"run again; the last good checkpoint is {self.latest() or 'none'}"
            )

    def _staging(self) -> str:
        """Where a checkpoint is written first: on the disk that it goes to, so that it is moved and not copied; where
        that is none of this machine, in a folder that is removed if this process is killed."""
        if storage.is_remote(self.folder) or not self.process.first:
            return str(scratch_folder())
        Path(self.folder).mkdir(parents=True, exist_ok=True)
        return self.folder

    def _prune(self) -> None:
        latest = self.latest()
        for path in self._ranked()[: -self.keep]:
            if path != latest:
                self._remove(path)
        whole = set(self._all())
        for path in {storage.parent(file) for file in storage.list_files(self.folder, True)} - whole:
            self._remove(path)

    def _remove(self, path: str) -> None:
        for file in sorted(storage.list_files(path), key=lambda file: not file.endswith("/" + STATE)):
            storage.delete(file)
        if not storage.is_remote(path) and Path(path).is_dir():
            Path(path).rmdir()


def flush(file: Path) -> None:
    """Brings a file from the system's memory to its disk, so that a rename after it holds over a power cut."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
