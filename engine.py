"""One epoch of training, and evaluation."""

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from distributed.program import RunError, Stopped
from distributed.stop_coordinator import StopCoordinator
from input_pipeline.bad_images import BadImages
from input_pipeline.loader import DeviceLoader
from models.distillation import Loss
from utils import Progress, print_main, seed_everything
from weight_selection.errors import printable

READ_INTERVAL = 50  # steps from one look at the figures of training to the next: each look waits for the device
MIN_LOSS_SCALE = 1.0  # below it, float16 overflows on gradients as they are, not on scaled ones


@dataclass
class TrainState:
    """All that a step of training needs.

    Attributes:
        model: the bare model, whose weights are saved.
        projector: trained beside the model for feature distillation, or None.
        forward: the model as it is called in training: with the projector if there is one, and wrapped in DDP when
            there are several processes.
        optimizer: over the parameters of both.
        scaler: loss scaler; disabled unless training in float16.
        ema: timm's ``ModelEmaV3`` of the model, or None.
        lr, weight_decay: value of every step of the run.
        steps: of an epoch.
        update_freq: micro-batches whose gradients make a step.
        mixup: timm's ``Mixup``, or None.
        criterion: ``distillation.Loss``, of (images, what ``forward`` gives for them, targets).
        autocast: dtype of mixed precision, or None for full precision.
        clip_grad: largest norm of the gradient, or None.
        device: where to compute.
        seed: of the run.
        rank, world_size: this process among all.
        consensus: of all processes.
    """

    model: nn.Module
    projector: nn.Module | None
    forward: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: nn.Module | None
    lr: np.ndarray
    weight_decay: np.ndarray
    steps: int
    update_freq: int
    mixup: Callable | None
    criterion: Loss
    autocast: torch.dtype | None
    clip_grad: float | None
    device: torch.device
    seed: int
    rank: int
    world_size: int
    consensus: StopCoordinator

    def set_schedule(self, step: int) -> None:
        """Give every parameter group its learning rate and weight decay of a step."""
        for group in self.optimizer.param_groups:
            group["lr"] = float(self.lr[step]) * group.get("lr_scale", 1.0)
            if group["weight_decay"] > 0:
                group["weight_decay"] = float(self.weight_decay[step])

    def backward(self, images, targets, last: bool) -> torch.Tensor:
        """Add the gradient of a micro-batch; returns its loss and the distillation's part, as a tensor.

        All is on the device.

        Processes exchange gradients only at the last micro-batch of a step.
        """
        if self.mixup is not None:
            images, targets = self.mixup(images, targets)
        wait = isinstance(self.forward, DistributedDataParallel) and not last
        with self.forward.no_sync() if wait else contextlib.nullcontext():
            with autocast(self.device, self.autocast):
                loss, distance = self.criterion(images, self.forward(images), targets)
            self.scaler.scale(loss / self.update_freq).backward()
        return torch.stack([loss.detach(), distance.detach()])

    def arrange(self, images: torch.Tensor, targets: torch.Tensor) -> None:
        """Let DDP sum in the first step of a resumed run as in all later ones.

        DDP arranges gradients for the exchange by the order in which those of its first step came, and with more than
        two processes the arrangement decides in which order floats are added up.
        """
        if isinstance(self.forward, DistributedDataParallel):
            self.rehearse(images, targets, together=True)

    def compile(self, images: torch.Tensor, targets: torch.Tensor, test_images: torch.Tensor) -> None:
        """Compile what training and the model's evaluation call, unless that fails in some process; then say so.

        Args:
            images, targets: of the shapes of training.
            test_images: of the shape of evaluation.
        """
        ddp = isinstance(self.forward, DistributedDataParallel)
        modules = {self.model, self.forward.module if ddp else self.forward}
        for module in modules:
            module.compile()
        reason = None
        try:
            self.rehearse(images, targets, together=False)
            with torch.no_grad(), autocast(self.device, self.autocast):
                self.model.eval()(test_images)
        except Exception as error:  # no compiler, no Triton, an operator without a kernel: each fails in its own way
            reason = f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"
        reasons = [reason for reason in self.consensus.gather_objects(reason) if reason is not None]
        if reasons:
            print_main(f"warning: --compile true: goes on without, as it failed ({printable(reasons[0])[:300]})")
            for module in modules:
                module._compiled_call_impl = None  # what Module.compile set; there is no public way back

    def rehearse(self, images: torch.Tensor, targets: torch.Tensor, together: bool) -> None:
        """Compute a gradient, with or without an exchange between processes, and forget it."""
        before = [buffer.clone() for buffer in self.forward.buffers()]
        self.forward.train()
        try:
            self.backward(images, targets, last=together)
        finally:
            self.optimizer.zero_grad(set_to_none=True)
            with torch.no_grad():
                for buffer, value in zip(self.forward.buffers(), before, strict=True):
                    buffer.copy_(value)

    def update(self) -> torch.Tensor:
        """Take a step; returns the norm of the gradient before clipping, on the device."""
        self.scaler.unscale_(self.optimizer)
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        norm = clip_grad_norm_(parameters, self.clip_grad or math.inf)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update(self.model)
        return norm


def autocast(device: torch.device, dtype: torch.dtype | None):
    """Mixed precision in ``dtype``, or full precision for None."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


class EpochMetrics:
    """Figures of an epoch in training, up to the last step that was read.

    Steps leave theirs on the device. ``read`` adds them up on the host, one by one in the order of steps and processes,
    so that the sums are the same wherever a run was interrupted, and the same in all processes.

    Args:
        trainer: the run.
        epoch: counted from 0.
        bad: takes the images that cannot be read.
        sums: of an epoch that was interrupted, as ``sums`` had them.
    """

    def __init__(self, trainer: TrainState, epoch: int, bad: BadImages, sums: dict | None = None):
        self.trainer, self.epoch, self.bad = trainer, epoch, bad
        self.sums = dict(sums or {"step": 0, "loss": 0.0, "distance": 0.0, "grad_norm": 0.0, "skipped": 0})
        self.pending = []

    @property
    def step(self) -> int:
        """Steps of the epoch that are done."""
        return self.sums["step"] + len(self.pending)

    def add(self, losses: torch.Tensor, norm: torch.Tensor) -> None:
        """Take a step's mean loss and distance in this process, and its norm; nothing waits."""
        self.pending.append(torch.cat([losses, norm[None]]))

    def learning_rate(self, step: int) -> float:
        """Of a step of this epoch, counted from 1."""
        return float(self.trainer.lr[self.epoch * self.trainer.steps + step - 1])

    def running_loss(self) -> float:
        """Mean over the epoch so far; of what has not been read, in this process only."""
        pending = sum(torch.stack(self.pending)[:, 0].tolist()) if self.pending else 0.0
        return (self.sums["loss"] + pending) / self.step

    def read(self) -> None:
        """Add up what is on the device. All processes must call it after the same step.

        Raises:
            RunError: the loss is not finite, or the gradient; or the loss scaler finds no scale; or another process
                says that the run cannot go on.
        """
        self.bad.share()
        self.trainer.consensus.settle()
        if not self.pending:
            return
        rows = torch.stack(self.pending).double().cpu()
        self.pending = []
        shares = self.trainer.consensus.gather(rows[:, :2].contiguous())
        for (loss, distance), norm in zip((sum(shares) / len(shares)).tolist(), rows[:, 2].tolist(), strict=True):
            self.sums["step"] += 1
            skipped = self.trainer.scaler.is_enabled() and not math.isfinite(norm)
            if not math.isfinite(loss) or not (skipped or math.isfinite(norm)):
                raise RunError(
                    f"loss is {loss} and the gradient's norm {norm} at step {self.sums['step']} of epoch {self.epoch}, "
                    f"at lr {self.learning_rate(self.sums['step']):.2e}; checkpoints are of before it; lower --lr, set "
                    "--clip_grad or drop --use_amp in another --output_dir, from --resume if you like"
                )
            self.sums["loss"] += loss
            self.sums["distance"] += distance
            self.sums["grad_norm"] += 0.0 if skipped else norm
            self.sums["skipped"] += skipped
        if skipped and self.trainer.scaler.get_scale() < MIN_LOSS_SCALE:
            raise RunError(
                f"loss scale is {self.trainer.scaler.get_scale():.3g} by step {self.step} of epoch {self.epoch}, and "
                "gradients still overflow float16; lower --lr, or use --amp_dtype bfloat16"
            )

    def means(self) -> dict:
        """loss, distance (of a distillation), lr and weight_decay (of the last step), grad_norm (of the steps that were
        taken), and in float16 skipped_steps and loss_scale."""
        step, trainer = self.sums["step"], self.trainer
        row = {"loss": self.sums["loss"] / step}
        if trainer.criterion.teacher is not None:
            row["distance"] = self.sums["distance"] / step
        row["lr"] = self.learning_rate(step)
        row["weight_decay"] = float(trainer.weight_decay[self.epoch * trainer.steps + step - 1])
        row["grad_norm"] = self.sums["grad_norm"] / max(1, step - self.sums["skipped"])
        if trainer.scaler.is_enabled():
            row |= {"skipped_steps": self.sums["skipped"], "loss_scale": trainer.scaler.get_scale()}
        return row


def train_one_epoch(trainer: TrainState, loader: DeviceLoader, figures: EpochMetrics, after_step: Callable) -> None:
    """Train through an epoch, or the rest of it.

    Args:
        trainer: the run.
        loader: this process's micro-batches, ``update_freq`` to a step, from the step that ``figures`` has reached.
        figures: of the epoch.
        after_step: is called after every step, with no arguments.

    Raises:
        RunError: the run cannot go on.
    """
    trainer.forward.train()
    start, first, epoch = time.monotonic(), figures.step, figures.epoch
    step_images = loader.batch_size * trainer.update_freq * trainer.world_size

    def describe():
        speed = (figures.step - first) * step_images / (time.monotonic() - start)
        lr = figures.learning_rate(figures.step)
        return f"loss {figures.running_loss():.4f} lr {lr:.2e} {speed:.0f} images/s"

    batches = iter(loader)
    with Progress(f"epoch {epoch}", trainer.steps, done=first) as progress:
        for step in range(first, trainer.steps):
            trainer.set_schedule(epoch * trainer.steps + step)
            losses = 0
            for part in range(trainer.update_freq):
                images, targets = next(batches)
                number = (step * trainer.update_freq + part) * trainer.world_size + trainer.rank
                seed_everything(trainer.seed, epoch, number, 1)  # the 1: not the numbers that image `number` gets
                losses += trainer.backward(images, targets, last=part == trainer.update_freq - 1)
            figures.add(losses / trainer.update_freq, trainer.update())
            progress.step(describe)
            if (step + 1) % READ_INTERVAL == 0 or step + 1 == trainer.steps:
                figures.read()
            after_step()


@torch.no_grad()
def evaluate(model: nn.Module, loader: DeviceLoader, trainer: TrainState, shared: bool = True) -> dict:
    """Cross-entropy and accuracy over a test set.

    Args:
        model: gives logits, (images, classes); on the trainer's device, or on the CPU and then in full precision.
        loader: of this process's share of the test set.
        trainer: the run, which may be asked to stop.
        shared: sum over processes; False when every process sees the whole set.

    Returns:
        loss, acc1 and acc5 (percent; top 5 is all classes when there are fewer), images (how many were counted).

    Raises:
        Stopped: by a signal.
        RunError: an image cannot be read.
    """
    model.eval()
    device = next(model.parameters()).device
    dtype = trainer.autocast if device == trainer.device else None
    totals = torch.zeros(4, dtype=torch.float64, device=device)
    batches, longest = iter(loader.on(device)), loader.sampler.most_batches(loader.batch_size)
    with Progress("test", longest, lines=0) as progress:
        for _ in range(longest):  # as often in every process, though the last batch may be missing in some
            batch = next(batches, None)
            if batch is not None:
                images, targets = batch
                with autocast(device, dtype):
                    logits = model(images)
                logits = logits.float()
                hits = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]
                loss = nn.functional.cross_entropy(logits, targets, reduction="sum")
                totals[:3] += torch.stack([loss.double(), hits[:, 0].sum(), hits.sum()])
                totals[3] += len(targets)
            progress.step(str)
            if number := trainer.consensus.poll():
                raise Stopped(number)
    trainer.consensus.settle()
    totals = totals.cpu()
    loss, top1, top5, count = sum(trainer.consensus.gather(totals) if shared else [totals]).tolist()
    return {"loss": loss / count, "acc1": 100 * top1 / count, "acc5": 100 * top5 / count, "images": int(count)}
