"""The training loop. It needs neither Ray nor MLflow: one process, or the ranks of whatever process group there is."""

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hbi.model.hbi import HBI, Encoded
from hbi.model.tokenizer import tokenize
from hbi.model.weights import build_model, load_estimator
from hbi.pipelines.sample import ShardIndex, check_shards
from hbi.training.checkpoint import (
    Checkpoints,
    Progress,
    State,
    check_checkpoint,
    fetched,
    read_progress,
    write_checkpoint,
)
from hbi.training.contrast import backward
from hbi.training.data.loader import Batch, Loader, index_digest
from hbi.training.init import start_model
from hbi.training.optim import Average, make_optimizer, schedule, set_learning_rate
from hbi.training.parallel import Place, average_scalars, averaging, clip_gradients, parallelize
from hbi.training.settings import TrainConfig
from hbi.training.throughput import Ledger, Meter, clock, flops_per_clip, memory_bytes, peak_flops


class Stopped(ValueError):
    """The run cannot go on. Every rank raises it at the same step, with the same words."""


@dataclass(frozen=True)
class Hooks:
    """What a run tells and asks the world around it."""

    say: Callable[[str], None] = print
    """Gets lines of progress, on the first rank."""
    track: Callable[[dict[str, float], int], None] = lambda metrics, step: None
    """Gets metrics and their step, on the first rank. Must not block."""
    evaluate: Callable[[HBI, str], dict[str, float]] = lambda model, split: {}
    """Metrics of a model on a split, none where there is no such split. All ranks call it."""
    ending: Callable[[], bool] = lambda: False
    """Whether this machine is about to be taken away. All ranks call it."""


class Training:
    """A run: everything as it was at its latest checkpoint, or fresh; `fit` is the loop."""

    def __init__(
        self,
        config: TrainConfig,
        index: ShardIndex,
        tokenizer: Any,
        checkpoints: Checkpoints,
        place: Place,
        hooks: Hooks,
        start: str = "",
    ):
        """start: folder of the model to begin with, where it is not a fresh one."""
        torch.manual_seed(config.seed)
        self.model = start_model(config.model, start) if start else build_model(config.model)
        # A backbone brings its own sizes: from here on the configuration says what is there.
        self.config = config = replace(config, model=self.model.config)
        check_shards(index, config.model, config.model_flags)
        if config.estimator:
            self.model.estimator = load_estimator(config.estimator)
        self.tokenizer, self.checkpoints, self.place, self.hooks = tokenizer, checkpoints, place, hooks
        self.wrapped = parallelize(self.model, place, config.compute)
        if config.compute.compile:
            self.model.compile()
        self.optimizer = make_optimizer(self.model, config.optim)
        self.average = Average(self.model, config.optim.ema) if config.optim.ema else None
        self.loader = Loader(index, config, place)
        self.state = State(self.model, self.optimizer, self.average, place)
        self.digest, self.progress = index_digest(index), Progress()
        torch.manual_seed(config.seed * 1_000_003 + place.rank)
        latest = self._resume()
        steps = config.optim.epochs * self.loader.steps_per_epoch
        self.steps = min(steps, config.optim.steps or steps)
        self.bf16 = config.compute.bf16 and has_bf16(place.device)
        self.meter, self.ledger = Meter(self.steps - self.progress.step), Ledger()
        self.peak = peak_flops(place.device, self.bf16)
        if place.first:
            begun = f"goes on at step {self.progress.step} from {latest}" if latest else "starts"
            precision = "bfloat16" if self.bf16 else "float32"
            hooks.say(
                f"{config.name} {begun}: {sum(self.loader.samples)} clips, {self.steps} steps of "
                f"{config.data.batch}, {place.world} x {place.device.type} in {precision}"
            )

    def fit(self) -> Progress:
        """Trains to the end of the run; returns where it ended."""
        with contextlib.closing(self.loader):
            while not self.over():
                for batch in self.meter.waiting(self.loader.batches(self.progress.position)):
                    self.schedule()
                    losses = self.backward(batch)
                    norm = self.update()
                    self.note(batch, losses, norm)
                    if self.checkpoint_is_due():
                        self.save()
                    if self.over():
                        break
                else:
                    self.progress = self.progress.next_epoch()
                self.evaluate()
                self.save()
        return self.progress

    def over(self) -> bool:
        """Whether all epochs are done, or as many steps as were asked for."""
        settings = self.config.optim
        return self.progress.position.epoch >= settings.epochs or 0 < settings.steps <= self.progress.step

    def schedule(self) -> None:
        """Sets the learning rates of this step."""
        settings = self.config.optim
        share = schedule(self.progress.step, self.steps, settings.warmup, settings.floor)
        set_learning_rate(self.optimizer, share)

    def backward(self, batch: Batch) -> dict[str, Tensor]:
        """The losses of the global batch, and its gradient in the weights."""
        return backward(
            self._encode, self._pieces(batch), self.config.loss, lambda on: averaging(self.wrapped, on)
        )

    def _pieces(self, batch: Batch) -> list[tuple[Tensor, ...]]:
        """What the model takes, on its device, in `data.accumulate` pieces (the later ones may be empty)."""
        ids, mask = tokenize(self.tokenizer, batch.captions, self.config.model.words)
        if batch.video.is_pinned():
            ids, mask = ids.pin_memory(), mask.pin_memory()
        whole = [
            t.to(self.place.device, non_blocking=True) for t in (ids, mask, batch.video, batch.video_mask)
        ]
        return list(zip(*(t.tensor_split(self.config.data.accumulate) for t in whole), strict=True))

    def _encode(self, piece: tuple[Tensor, ...]) -> Encoded:
        with torch.autocast(self.place.device.type, torch.bfloat16, enabled=self.bf16):
            return self.wrapped(*piece)

    def update(self) -> Tensor:
        """Moves the weights along the gradient; the gradient's norm before clipping."""
        average_scalars(self.model, self.place, self.config.compute)
        norm = clip_gradients(self.model, self.config.optim.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.model.clamp_logit_scale()
        if self.average is not None:
            self.average.update(self.model, self.progress.step)
        self.progress = self.progress.stepped(self.place.world, self.config.data.batch)
        return norm

    def note(self, batch: Batch, losses: dict[str, Tensor], norm: Tensor) -> None:
        """Adds up what the ranks measured, stops where it must, and now and then says and tracks how it goes."""
        self.ledger.add(self.progress.step, batch, self.meter.wait, losses, norm, self.place)
        self._settle(keep=1 if self.place.device.type == "cuda" else 0)

    def _settle(self, keep: int = 0) -> None:
        """Looks at the numbers of all steps but the last `keep`, whose kernels may still run."""
        for step, numbers in self.ledger.read(keep):
            self._stop_if_broken(step, numbers)
            if step % self.config.tracking.every_steps == 0:
                self._report(step)

    def _stop_if_broken(self, step: int, numbers: dict[str, float]) -> None:
        """Raises Stopped on all ranks alike, for the numbers are those of all ranks."""
        limit = self.config.data.bad_samples
        if not math.isfinite(numbers["loss"]) or not math.isfinite(numbers["gradient_norm"]):
            shards = self.place.messages(", ".join(self.ledger.shards[step]))
            raise Stopped(
                f"step {step}: loss {numbers['loss']}, gradient norm {numbers['gradient_norm']}; the batch came "
                f"from {', '.join(shards)}; the last good checkpoint is {self.checkpoints.latest() or 'none'}: "
                f"look at those clips, or lower --set.optim.lr ({self.config.optim.lr})"
            )
        if self.ledger.unread > limit:
            damage = [f"{name} ({count}: {reason})" for name, (count, reason) in self.ledger.damage.items()]
            raise Stopped(
                f"{self.ledger.unread} samples could not be read, more than --set.data.bad-samples {limit}: "
                f"{'; '.join(self.place.messages('; '.join(damage[:3])))}: run the same `hbi shard` again, which makes "
                f"anew what is missing or damaged, or raise the limit"
            )

    def _report(self, step: int) -> None:
        """One line, and the same numbers and more for the tracker."""
        seconds, left = self.meter.read()
        means, clips, waited = self.ledger.take()
        if not self.place.first:
            return
        rate = clips / seconds
        work = rate * flops_per_clip(self.config.model) / (self.place.world * self.peak)
        self.hooks.say(
            f"step {step}/{self.steps}  epoch {self.progress.position.epoch + 1}/{self.config.optim.epochs}  "
            f"loss {means['loss']:.4f}  {rate:.1f} clips/s  {clock(left)} left"
        )
        self.hooks.track(
            {
                **{f"train/{name}": value for name, value in means.items()},
                **{f"lr/{group['name']}": group["lr"] for group in self.optimizer.param_groups},
                "logit_scale": float(self.model.logit_scale.detach().exp()),
                "speed/clips_per_second": rate,
                "speed/data_wait_share": waited / (seconds * self.place.world),
                "speed/flop_utilisation": work,
                "speed/memory_bytes": memory_bytes(self.place.device),
                "data/clips": clips,
                "data/unread_samples": self.ledger.unread,
                "data/uncaptioned_clips": self.ledger.uncaptioned,
            },
            step,
        )

    def checkpoint_is_due(self) -> bool:
        """By the number of steps, or because the machine is about to go (asked now and then: all ranks must agree)."""
        step = self.progress.step
        every = self.config.checkpoint.every_steps
        if every and step % every == 0:
            return True
        return step % self.config.tracking.every_steps == 0 and self.hooks.ending()

    def save(self) -> None:
        """Keeps everything, once the latest losses are known to be finite."""
        self._settle()
        with self.meter.paused():
            self.checkpoints.save(
                lambda folder: write_checkpoint(
                    folder, self.state, self.progress, self.tokenizer, self.config, self.digest
                ),
                self.progress,
            )

    def evaluate(self) -> None:
        """Measures the served model on the split by which the best checkpoint is chosen, where it is due."""
        settings, epoch = self.config.evaluate, self.progress.position.epoch
        if not settings.every_epochs or (epoch % settings.every_epochs and not self.over()):
            return
        with self.meter.paused(), self.state.served() as model:
            model.eval()
            metrics = self.hooks.evaluate(model, settings.select)
        self.model.train()
        self.progress = replace(self.progress, metrics=metrics)
        if self.place.first and metrics:
            chosen = {
                name: value for name, value in metrics.items() if name.endswith(self.config.checkpoint.metric)
            }
            self.hooks.say(
                f"epoch {epoch}  " + "  ".join(f"{name} {value:.1f}" for name, value in chosen.items())
            )
            self.hooks.track(metrics, self.progress.step)

    def _resume(self) -> str | None:
        """Takes up the latest checkpoint, if there is one, and says which."""
        latest = self.checkpoints.latest()
        if latest is not None:
            with fetched(latest) as folder:
                check_checkpoint(folder, latest, self.config, self.digest)
                self.state.restore(folder)
                self.progress = read_progress(folder)
        return latest


def has_bf16(device: torch.device) -> bool:
    """Whether the hardware computes in bfloat16 (torch emulates it elsewhere, slower than float32)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able = torch.cpu.get_capabilities()
    return bool(able.get("amx_bf16") or able.get("avx512_bf16"))
