"""The training loop. It needs neither Ray nor MLflow: one process, or the ranks of whatever process group there is."""

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from hbi.model.hbi import HBI, Encoded
from hbi.model.losses import with_teacher
from hbi.model.tokenizer import tokenize
from hbi.model.weights import build_model, load_estimator
from hbi.pipelines.sample import ShardIndex, check_shards
from hbi.training.checkpoint import (
    Checkpoints,
    Progress,
    State,
    changed_schedule,
    check_checkpoint,
    read_progress,
    read_tracked,
    write_checkpoint,
)
from hbi.training.contrast import backward
from hbi.training.data.batch import Batch
from hbi.training.data.loader import Loader
from hbi.training.data.shards import index_digest
from hbi.training.exchange import Sizes
from hbi.training.init import init_model
from hbi.training.job import TrainingAborted, TrainingStopped, fetched
from hbi.training.optim import EMA, make_optimizer, schedule, set_learning_rate
from hbi.training.parallel import average_scalars, averaging, clip_gradients, parallelize
from hbi.training.settings import METRICS, TrainConfig
from hbi.training.step_metrics import StepMetrics
from hbi.training.tasks import HeadTasks
from hbi.training.throughput import Throughput, clock, flops_per_clip, memory_bytes, peak_flops


@dataclass(frozen=True)
class Hooks:
    """What a run tells and asks the world around it."""

    log: Callable[[str], object] = print
    """Gets lines of progress, on the first rank."""
    track: Callable[[dict[str, float], int], None] = lambda metrics, step: None
    """Gets metrics and their step, on the first rank. Must not block."""
    evaluate: Callable[[HBI, str], dict[str, float]] = lambda model, split: {}
    """Metrics of a model on a split, none where there is no such split. All ranks call it."""
    preempted: Callable[[], bool] = lambda: False
    """Whether this machine is about to be taken away. All ranks call it."""
    stop: Callable[[], bool] = lambda: False
    """Whether an early end was asked for. Any rank may know it first. Must not block."""


class Training:
    """A run: everything as it was at its latest checkpoint, or fresh; `fit` is the loop."""

    def __init__(
        self,
        config: TrainConfig,
        index: ShardIndex,
        tokenizer: Any,
        checkpoints: Checkpoints,
        hooks: Hooks,
        init_from: str = "",
    ):
        """init_from: folder of the model to begin with, where it is not a fresh one."""
        torch.manual_seed(config.seed)
        self.model = init_model(config.model, init_from) if init_from else build_model(config.model)
        # A backbone brings its own sizes: from here on the configuration says what is there.
        self.config = config = replace(config, model=self.model.config)
        check_shards(index, config.model, config.model_flags)
        if "qa" in config.task:
            self.model.vocabulary = config.heads.vocabulary
        if config.loss.contrast == "sigmoid":
            self.model.learn_bias()
        if config.estimator:
            self.model.estimator = load_estimator(config.estimator)
        self.tokenizer, self.checkpoints, self.hooks = tokenizer, checkpoints, hooks
        self.process = process = checkpoints.process
        self.wrapped = parallelize(self.model, process, config.compute)
        if config.compute.compile:
            self.model.compile()
        self.optimizer = make_optimizer(self.model, config.optim)
        self.ema = EMA(self.model, config.optim.ema) if config.optim.ema else None
        self.loader = Loader(index, config, process)
        self.heads = HeadTasks(config, tokenizer, process)
        self.state = State(self.model, self.optimizer, self.ema, process)
        self.digest, self.progress = index_digest(index), Progress()
        torch.manual_seed(config.seed * 1_000_003 + process.rank)
        self.changed: list[str] = []
        self.tracked: list[tuple[dict[str, float], int]] = []
        self.saved_step = 0
        latest = self._resume()
        self.steps = self._steps_in_all()
        self.bf16 = config.compute.bf16 and has_bf16(process.device)
        self.throughput = Throughput(self.steps - self.progress.step)
        self.step_metrics = StepMetrics(process, hooks.stop)
        self.peak = peak_flops(process.device, self.bf16)
        if process.first:
            self._introduce(latest)

    def fit(self) -> Progress:
        """Trains to the end of the run; returns where it ended."""
        with contextlib.closing(self.loader):
            while not self.over():
                for batch in self.throughput.waiting(
                    self.loader.batches(self.progress.position, self.progress.step)
                ):
                    self.schedule()
                    losses = self.backward(batch)
                    norm = self.update()
                    self.note(batch, losses, norm)
                    if self.checkpoint_is_due():
                        self.save()
                    if self.over():
                        break
                    if self.step_metrics.stopping:
                        self.stop()
                else:
                    self.progress = self.progress.next_epoch()
                self.evaluate()
                self.save()
        return self.progress

    def _steps_in_all(self) -> int:
        """Those that are done, however many clips each had, and those that are left from here."""
        settings, at = self.config.optim, self.progress
        epochs = settings.epochs - at.position.epoch
        for done, name, most in (
            (at.position.epoch, "epochs", settings.epochs),
            (at.step, "steps", settings.steps or at.step),
        ):
            if done > most:
                raise ValueError(
                    f"the run has done {done} {name}, more than --set.optim.{name} {most} asks for: raise it, or give "
                    "another --out"
                )
        left = 0
        if epochs:
            left = self.loader.steps_left(at.position) + (epochs - 1) * self.loader.steps_per_epoch
        return min(at.step + left, settings.steps or at.step + left)

    def _introduce(self, latest: str | None) -> None:
        """A line that says what begins here, and one for what changes the schedule of a run that goes on."""
        config, clips = self.config, sum(self.loader.samples)
        begun = f"goes on at step {self.progress.step} from {latest}" if latest else "starts"
        precision = "bfloat16" if self.bf16 else "float32"
        self.hooks.log(
            f"{config.name} {begun}: {clips} clips, {self.steps} steps of {config.data.batch}, "
            f"{self.process.world_size} x {self.process.device.type} in {precision}"
        )
        if self.changed:
            settings = config.optim
            share = schedule(self.progress.step, self.steps, settings.warmup, settings.floor)
            self.hooks.log(
                f"changed since that checkpoint: {', '.join(self.changed)}; {self.steps} steps in all, and the "
                f"learning rate goes on at {share * settings.lr:.3g}"
            )
        if clips < config.data.batch:
            self.hooks.log(
                f"all {clips} clips of {config.data.split} are one step: they are fewer than --set.data.batch "
                f"{config.data.batch}, and each caption is told from {clips - 1} others only"
            )

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
        self.finite: list[Tensor] = []
        if batch.task != "retrieval":
            return self.heads.backward(self._encode, batch, lambda on: averaging(self.wrapped, on))

        def encode(given: tuple[tuple[Tensor, ...], Encoded | None]) -> Encoded:
            micro_batch, taught = given
            encoded: Encoded = self._encode(micro_batch)
            if taught is not None:
                encoded = with_teacher(encoded, taught)
            if len(self.finite) < self.config.data.accumulate:  # those of the second pass are the same
                self.finite.append(finite_clips(encoded))
            return encoded

        ranked = self.process.world_size > 1
        return backward(
            encode,
            self._taught(self._micro_batches(batch)),
            self.config.loss,
            lambda on: averaging(self.wrapped, on),
            exchange=self.config.compute.exchange,
            asked=Sizes(len(batch.video), self.process.device) if ranked else None,
        )

    def _micro_batches(self, batch: Batch) -> list[tuple[Tensor, ...]]:
        """What the model takes, on its device, in `data.accumulate` micro-batches (the later ones may be empty)."""
        ids, mask = tokenize(self.tokenizer, batch.captions, self.config.model.words)
        if batch.video.is_pinned():
            ids, mask = ids.pin_memory(), mask.pin_memory()
        whole = [
            t.to(self.process.device, non_blocking=True) for t in (ids, mask, batch.video, batch.video_mask)
        ]
        return list(zip(*(t.tensor_split(self.config.data.accumulate) for t in whole), strict=True))

    @torch.no_grad()
    def _taught(
        self, micro_batches: list[tuple[Tensor, ...]]
    ) -> list[tuple[tuple[Tensor, ...], Encoded | None]]:
        """Each micro-batch, and how the average of the weights encodes it where that teaches."""
        if self.ema is None or not self.config.loss.teacher:
            return [(micro_batch, None) for micro_batch in micro_batches]
        with self.ema.swapped(self.model):
            return [(micro_batch, self._encode(micro_batch)) for micro_batch in micro_batches]

    def _encode(self, micro_batch: tuple[Any, ...]) -> Any:
        with torch.autocast(self.process.device.type, torch.bfloat16, enabled=self.bf16):
            return self.wrapped(*micro_batch, loss=self.config.loss)

    def update(self) -> Tensor:
        """Moves the weights along the gradient; the gradient's norm before clipping."""
        average_scalars(self.model, self.process, self.config.compute)
        norm = clip_gradients(self.model, self.config.optim.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.model.clamp_logit_scale()
        if self.ema is not None:
            self.ema.update(self.model, self.progress.step)
        self.progress = self.progress.stepped(self.process.world_size, self.config.data.batch)
        return norm

    def note(self, batch: Batch, losses: dict[str, Tensor], norm: Tensor) -> None:
        """Adds up what the ranks measured, stops where it must, and now and then says and tracks how it goes."""
        finite = torch.cat(self.finite) if self.finite else torch.ones(len(batch.video), dtype=torch.bool)
        self.step_metrics.add(self.progress.step, batch, self.throughput.wait, losses, norm, finite)
        self._settle(keep=1 if self.process.device.type == "cuda" else 0)

    def _settle(self, keep: int = 0) -> None:
        """Looks at the numbers of all steps but the last `keep`, whose kernels may still run."""
        for step, numbers in self.step_metrics.read(keep):
            self._stop_if_broken(step, numbers)
            if step % self.config.tracking.every_steps == 0:
                self._report(step)

    def _stop_if_broken(self, step: int, numbers: dict[str, float]) -> None:
        """Raises TrainingAborted on all ranks alike, for the numbers are those of all ranks."""
        limit = self.config.data.bad_samples
        if not math.isfinite(numbers["loss"]) or not math.isfinite(numbers["gradient_norm"]):
            clips = self.process.gather_messages(self.step_metrics.suspects(step))
            raise TrainingAborted(
                f"step {step}: loss {numbers['loss']}, gradient norm {numbers['gradient_norm']}; in the batch: "
                f"{'; '.join(clips)}; the last good checkpoint is {self.checkpoints.latest() or 'none'}: "
                f"look at those clips, or lower --set.optim.lr ({self.config.optim.lr})"
            )
        if self.step_metrics.unread > limit:
            damage = [
                f"{name} ({count}: {reason})" for name, (count, reason) in self.step_metrics.damage.items()
            ]
            of_all = self.process.gather_messages("; ".join(damage[:3]))
            raise TrainingAborted(
                f"{self.step_metrics.unread} samples could not be read, more than --set.data.bad-samples {limit}: "
                f"{'; '.join(of_all)}: run the same `hbi shard` again, which makes anew what is missing or damaged, "
                f"or raise the limit"
            )

    def _report(self, step: int) -> None:
        """One line, and the same numbers and more for the tracker."""
        seconds, left = self.throughput.read()
        means, clips, waited = self.step_metrics.take()
        if not self.process.first:
            return
        rate = clips / seconds
        work = rate * flops_per_clip(self.config.model) / (self.process.world_size * self.peak)
        self.hooks.log(
            f"step {step}/{self.steps}  epoch {self.progress.position.epoch + 1}/{self.config.optim.epochs}  "
            f"loss {means['loss']:.4f}  {rate:.1f} clips/s  {clock(left)} left"
        )
        self._track(
            {
                **{f"train/{name}": value for name, value in means.items()},
                **{f"lr/{group['name']}": group["lr"] for group in self.optimizer.param_groups},
                "logit_scale": float(self.model.logit_scale.detach().exp()),
                "speed/clips_per_second": rate,
                "speed/data_wait_share": waited / (seconds * self.process.world_size),
                "speed/flop_utilisation": work,
                "speed/memory_bytes": memory_bytes(self.process.device),
                "data/clips": clips,
                "data/unread_samples": self.step_metrics.unread,
                "data/uncaptioned_clips": self.step_metrics.uncaptioned,
            },
            step,
        )

    def _track(self, metrics: dict[str, float], step: int) -> None:
        """Now, and with the next checkpoint, that a run taken up from it has them too."""
        self.tracked.append((metrics, step))
        self.hooks.track(metrics, step)

    def checkpoint_is_due(self) -> bool:
        """By the number of steps, or because the machine is about to go (asked now and then: all ranks must agree)."""
        step = self.progress.step
        every = self.config.checkpoint.every_steps
        if every and step % every == 0:
            return True
        return step % self.config.tracking.every_steps == 0 and self.hooks.preempted()

    def save(self) -> None:
        """Keeps everything, once the latest losses are known to be finite."""
        self._settle()

        def write(folder: Path) -> None:
            about = {"data": self.digest, "tracked": self.tracked}
            write_checkpoint(folder, self.state, self.progress, self.tokenizer, self.config, about)

        with self.throughput.paused():
            try:
                self.checkpoints.save(write, self.progress)
            except ValueError as error:  # of the disk: all ranks have it
                raise TrainingAborted(str(error)) from error
        if self.progress.step > self.saved_step:  # of the same step, the evaluation may make a second one
            self.tracked = [(metrics, step) for metrics, step in self.tracked if step > self.saved_step]
            self.saved_step = self.progress.step

    def stop(self) -> None:
        """Keeps everything at this step, and raises TrainingStopped."""
        if self.saved_step < self.progress.step:
            self.save()
        raise TrainingStopped(
            f"stopped at step {self.progress.step}/{self.steps}, which {self.checkpoints.latest()} holds: "
            "run again to go on"
        )

    def evaluate(self) -> None:
        """Measures the served model on the split by which the best checkpoint is chosen, where it is due."""
        settings, epoch = self.config.evaluate, self.progress.position.epoch
        if not settings.every_epochs or (epoch % settings.every_epochs and not self.over()):
            return
        with self.throughput.paused(), self.state.served() as model:
            model.eval()
            metrics = self.hooks.evaluate(model, settings.select)
        self.model.train()
        self.progress = replace(self.progress, metrics=metrics)
        if self.process.first and metrics:
            told = tuple(f"/{name}" for name in (self.config.metric, *(METRICS[t] for t in self.config.task)))
            shown = [f"{name} {value:.1f}" for name, value in metrics.items() if name.endswith(told)]
            self.hooks.log("  ".join((f"epoch {epoch}", *shown)))
            self._track(metrics, self.progress.step)

    def _resume(self) -> str | None:
        """Takes up the latest checkpoint, if there is one, and says which."""
        latest = self.checkpoints.latest()
        if latest is not None:
            with fetched(latest) as folder:
                check_checkpoint(folder, latest, self.config, self.digest)
                self.changed = changed_schedule(folder, self.config)
                self.state.restore(folder)
                self.progress = read_progress(folder)
                if (
                    self.process.first
                ):  # a process that died may not have sent them; what is there is not doubled
                    for metrics, step in read_tracked(folder):
                        self._track(metrics, step)
            self.saved_step = self.progress.step
        return latest


@torch.no_grad()
def finite_clips(encoded: Encoded) -> Bool[Tensor, " batch"]:
    """Which clips the encoders, caption or video, made numbers of."""
    sides = (encoded.text["entity"].tokens, encoded.video["entity"].tokens)
    return torch.stack([side.isfinite().flatten(1).all(1) for side in sides]).all(0)


def has_bf16(device: torch.device) -> bool:
    """Whether the hardware computes in bfloat16 (torch emulates it elsewhere, slower than float32)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able = torch.cpu.get_capabilities()
    return bool(able.get("amx_bf16") or able.get("avx512_bf16"))
