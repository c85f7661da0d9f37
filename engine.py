"""One epoch of training, and one evaluation."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from distributed.program import RunError
from distributed.stop_coordinator import StopCoordinator
from input_pipeline.loader import BadImages, DeviceLoader
from models.distillation import Loss
from utils import Progress, seed_everything

SYNCHRONIZE_INTERVAL = 50  # steps between two waits for the device, which bring the metrics to the host
MIN_LOSS_SCALE = 1.0  # below it, even gradients that are not scaled up overflow float16


@dataclass
class TrainState:
    """The model in training, and everything else that a step needs."""

    model: nn.Module  # the bare model, whose weights are saved
    projector: nn.Module | None  # the MLP that feature distillation trains beside the model
    ddp_model: nn.Module  # what a step calls: model and projector, which DDP wraps when there are several processes
    optimizer: torch.optim.Optimizer  # updates the parameters of model and projector
    scaler: torch.amp.GradScaler  # scales the loss; disabled unless training in float16
    ema: nn.Module | None  # timm's ``ModelEmaV3`` of the model
    lr_schedule: np.ndarray  # one value for every step of the run
    weight_decay_schedule: np.ndarray  # the same
    steps_per_epoch: int  # optimiser steps in an epoch
    update_freq: int  # micro-batches whose gradients are summed for a step
    mixup: Callable | None  # timm's ``Mixup``
    criterion: Loss  # computes the loss from (images, outputs of ``ddp_model``, targets)
    amp_dtype: torch.dtype | None  # of mixed precision; None for full precision
    clip_grad: float | None  # largest norm of the gradient; None for any
    device: torch.device  # where the model is
    seed: int  # the run's
    rank: int  # the number of this process
    world_size: int  # how many processes there are
    stop_coordinator: StopCoordinator  # tells all processes when to stop

    def set_schedule(self, step: int) -> None:
        """Set the learning rate and weight decay of every parameter group for a step of the run."""
        for group in self.optimizer.param_groups:
            group["lr"] = float(self.lr_schedule[step]) * group.get("lr_scale", 1.0)
            if group["weight_decay"] > 0:
                group["weight_decay"] = float(self.weight_decay_schedule[step])

    def backward(self, images: torch.Tensor, targets: torch.Tensor, exchange: bool) -> torch.Tensor:
        """Add the gradient of a micro-batch, (images, 3, size, size) and (images,), to the parameters' gradients.

        The processes ``exchange`` their gradients only at the last micro-batch of a step. Returns (3,) on the device:
        the loss, the distillation distance in it, and the share of the images that are classified right. With mixup an
        image has no one class, and the share is 0.
        """
        if self.mixup is not None:
            images, targets = self.mixup(images, targets)
        keep_local = isinstance(self.ddp_model, DistributedDataParallel) and not exchange
        with self.ddp_model.no_sync() if keep_local else contextlib.nullcontext():
            with autocast(self.device, self.amp_dtype):
                outputs = self.ddp_model(images)
                loss, distance = self.criterion(images, outputs, targets)
            self.scaler.scale(loss / self.update_freq).backward()
        right = torch.zeros_like(distance)
        if self.mixup is None:
            logits = outputs[0] if isinstance(outputs, tuple) else outputs
            right = (logits.argmax(1) == targets).float().mean()
        return torch.stack([loss.detach(), distance.detach(), right])

    def update(self) -> torch.Tensor:
        """Take an optimiser step; returns the norm of the gradient before clipping, on the device."""
        self.scaler.unscale_(self.optimizer)
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        norm = clip_grad_norm_(parameters, self.clip_grad or math.inf)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update(self.model)
        return norm


def autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """The context of mixed precision in ``dtype``; for None, of full precision."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


@dataclass
class EpochSums:
    """Sums over the steps of an epoch, as a checkpoint holds them when it is written within the epoch."""

    step: int = 0  # steps that are in the sums
    loss: float = 0.0  # sum over these steps of the mean over the processes
    distance: float = 0.0  # the same of the distillation distance
    grad_norm: float = 0.0  # sum over the steps that were taken
    skipped: int = 0  # steps that the loss scaler skipped
    # Sum of the shares of images classified right. None with mixup, and when the epoch was begun by a version that did
    # not compute it.
    class_acc: float | None = 0.0
    # In a checkpoint only: {name: tensor} for each process, the buffers of its moving average.
    statistics: list = field(default_factory=list)


class EpochMetrics:
    """Metrics of an epoch of training.

    A step leaves its metrics on the device. ``synchronize`` adds them up on the host, one by one in the order of steps
    and processes. So the sums are the same wherever a run was interrupted, and the same in all processes. ``epoch``
    counts from 0; ``sums`` are of the steps that were done before an interruption. ``on_step`` gets the number in the
    run, counted from 0, and the metrics of the steps after which the metrics come to the host anyway.
    """

    def __init__(
        self,
        state: TrainState,
        epoch: int,
        bad_images: BadImages,
        sums: EpochSums | None = None,
        on_step: Callable[[int, dict[str, float]], None] | None = None,
    ):
        self.state, self.epoch, self.bad_images, self.on_step = state, epoch, bad_images, on_step
        self.sums = replace(sums) if sums is not None else EpochSums()
        if state.mixup is not None:
            self.sums.class_acc = None
        self.pending = []

    @property
    def step(self) -> int:
        """Number of steps of the epoch that are done."""
        return self.sums.step + len(self.pending)

    def add(self, losses: torch.Tensor, norm: torch.Tensor) -> None:
        """Note what ``TrainState.backward`` and ``update`` returned for a step, without waiting for the device."""
        self.pending.append(torch.cat([losses, norm[None]]))

    def is_due(self, step: int) -> bool:
        """Whether ``synchronize`` must be called after this step, counted from 1."""
        return step % SYNCHRONIZE_INTERVAL == 0 or step == self.state.steps_per_epoch

    def learning_rate(self, step: int) -> float:
        """The learning rate of a step of this epoch, counted from 1. No group of parameters has a larger one."""
        return float(self.state.lr_schedule[self._index(step)])

    def _index(self, step):
        """The number in the run, counted from 0, of a step of this epoch, counted from 1."""
        return self.epoch * self.state.steps_per_epoch + step - 1

    def running_loss(self) -> float:
        """Mean loss of the epoch so far; steps since the last ``synchronize`` count with this process's loss only."""
        pending = sum(torch.stack(self.pending)[:, 0].tolist()) if self.pending else 0.0
        return (self.sums.loss + pending) / self.step

    def synchronize(self) -> None:
        """Wait for the device and the other processes, and add up the steps. All must call it after the same step.

        Raises:
            RunError: loss or gradient is not finite, the loss scaler finds no scale, or another process cannot go on.
        """
        self.bad_images.share()
        self.state.stop_coordinator.settle()
        if not self.pending:
            return
        rows = torch.stack(self.pending).double().cpu()
        self.pending = []
        shares = self.state.stop_coordinator.gather_objects(rows[:, :3])
        scaler = self.state.scaler
        for losses, norm in zip((sum(shares) / len(shares)).tolist(), rows[:, 3].tolist(), strict=True):
            loss, distance, right = losses
            self.sums.step += 1
            skipped = scaler.is_enabled() and not math.isfinite(norm)
            if not math.isfinite(loss) or not (skipped or math.isfinite(norm)):
                raise RunError(
                    f"loss is {loss} and the gradient's norm {norm} at step {self.sums.step} of epoch {self.epoch}, "
                    f"at lr {self.learning_rate(self.sums.step):.2e}; checkpoints are of before it; lower --lr, set "
                    "--clip_grad or drop --use_amp in another --output_dir, from --resume if you like"
                )
            self.sums.loss += loss
            self.sums.distance += distance
            self.sums.grad_norm += 0.0 if skipped else norm
            self.sums.skipped += skipped
            if self.sums.class_acc is not None:
                self.sums.class_acc += right
            if self.on_step is not None and self.is_due(self.sums.step):
                self.on_step(self._index(self.sums.step), self._row(loss, distance, right, norm))
        if skipped and scaler.get_scale() < MIN_LOSS_SCALE:
            raise RunError(
                f"loss scale is {scaler.get_scale():.3g} by step {self.step} of epoch {self.epoch}, and "
                "gradients still overflow float16; lower --lr, or use --amp_dtype bfloat16"
            )

    def means(self) -> dict[str, float]:
        """The metrics of the epoch.

        Returns:
            loss; without mixup class_acc, the share of images classified right; distance, in a distillation; lr, the
            smallest rate of a group of parameters (min_lr) and weight_decay of the last step; grad_norm, over the steps
            that were taken; in float16 also skipped_steps and loss_scale.
        """
        sums, scaler = self.sums, self.state.scaler
        norm = sums.grad_norm / max(1, sums.step - sums.skipped)
        row = self._row(sums.loss / sums.step, sums.distance / sums.step, (sums.class_acc or 0) / sums.step, norm)
        if scaler.is_enabled():
            row |= {"skipped_steps": sums.skipped, "loss_scale": scaler.get_scale()}
        return row

    def _row(self, loss, distance, class_acc, grad_norm):
        """Metrics by their names, with the rates of the last step."""
        state, lr = self.state, self.learning_rate(self.sums.step)
        row = {"loss": loss}
        if self.sums.class_acc is not None:
            row["class_acc"] = class_acc
        if state.criterion.teacher is not None:
            row["distance"] = distance
        scales = (group.get("lr_scale", 1.0) for group in state.optimizer.param_groups)
        weight_decay = float(state.weight_decay_schedule[self._index(self.sums.step)])
        return row | {"lr": lr, "min_lr": lr * min(scales), "weight_decay": weight_decay, "grad_norm": grad_norm}


def train_one_epoch(state: TrainState, loader: DeviceLoader, metrics: EpochMetrics) -> Iterator[None]:
    """Train through the steps of an epoch that ``metrics`` lacks, and yield after every step.

    ``loader`` gives this process's micro-batches from the first of these steps on, ``update_freq`` of them a step.

    Raises:
        RunError: the run cannot go on.
    """
    state.ddp_model.train()
    start, first, epoch = time.monotonic(), metrics.step, metrics.epoch
    images_per_step = loader.batch_size * state.update_freq * state.world_size

    def describe():
        speed = (metrics.step - first) * images_per_step / (time.monotonic() - start)
        lr = metrics.learning_rate(metrics.step)
        return f"loss {metrics.running_loss():.4f} lr {lr:.2e} {speed:.0f} images/s"

    batches = iter(loader)
    with Progress(f"epoch {epoch}", state.steps_per_epoch, done=first) as progress:
        for step in range(first, state.steps_per_epoch):
            state.set_schedule(epoch * state.steps_per_epoch + step)
            losses = 0
            for part in range(state.update_freq):
                images, targets = next(batches)
                number = (step * state.update_freq + part) * state.world_size + state.rank
                seed_everything(state.seed, epoch, number, 1)  # the 1 tells it apart from the seed of image `number`
                losses += state.backward(images, targets, exchange=part == state.update_freq - 1)
            metrics.add(losses / state.update_freq, state.update())
            progress.step(describe)
            if metrics.is_due(step + 1):
                metrics.synchronize()
            yield


@torch.no_grad()
def predict(
    model: nn.Module, loader: DeviceLoader, amp_dtype: torch.dtype | None
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield a model's logits, float32 (images, classes), and the labels (images,) of each batch, on its device."""
    model.eval()
    device = next(model.parameters()).device
    for images, labels in replace(loader, device=device):
        with autocast(device, amp_dtype):
            logits = model(images)
        yield logits.float(), labels


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: DeviceLoader,
    state: TrainState,
    shared: bool = True,
    note: Callable[[torch.Tensor, torch.Tensor], None] | None = None,
) -> dict[str, float]:
    """Compute cross-entropy and accuracy over a test set.

    Args:
        model: gives logits (images, classes). On another device than the state's, which is the CPU, it computes in
            full precision.
        loader: this process's share of the test set, or the whole set if it is not ``shared`` out.
        state: names device, precision and the other processes.
        note: is called with logits, float32 (images, classes), and targets (images,) of each of the loader's batches.

    Returns:
        loss; acc1 and acc5 in percent (with fewer than five classes, acc5 counts all of them); images, their number.

    Raises:
        Stopped: a signal asks the run to stop.
        RunError: an image cannot be read.
    """
    device = next(model.parameters()).device
    dtype = state.amp_dtype if device == state.device else None
    totals = torch.zeros(4, dtype=torch.float64, device=device)
    batches, longest = predict(model, loader, dtype), loader.sampler.most_batches(loader.batch_size)
    with Progress("test", longest, lines=0) as progress:
        for _ in range(longest):  # the same number in every process, though some may lack the last batch
            if (batch := next(batches, None)) is not None:
                logits, targets = batch
                hits = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]
                loss = nn.functional.cross_entropy(logits, targets, reduction="sum")
                totals[:3] += torch.stack([loss.double(), hits[:, 0].sum(), hits.sum()])
                totals[3] += len(targets)
                if note is not None:
                    note(logits, targets)
            progress.step(str)
            state.stop_coordinator.poll()
    state.stop_coordinator.settle()
    totals = totals.cpu()
    loss, top1, top5, count = sum(state.stop_coordinator.gather_objects(totals) if shared else [totals]).tolist()
    return {"loss": loss / count, "acc1": 100 * top1 / count, "acc5": 100 * top5 / count, "images": int(count)}
