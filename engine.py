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

from distillation import Loss
from utils import Progress, RunError, all_reduce_sum, seed_everything

CHECK_INTERVAL = 50  # steps from one look at whether the loss is finite to the next: each look waits for the device


@dataclass
class Trainer:
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
        update_freq: micro-batches whose gradients make a step.
        mixup: timm's ``Mixup``, or None.
        criterion: ``distillation.Loss``, of (images, what ``forward`` gives for them, targets).
        autocast: dtype of mixed precision, or None for full precision.
        clip_grad: largest norm of the gradient, or None.
        device: where to compute.
        seed: of the run.
        rank, world_size: this process among all.
    """

    model: nn.Module
    projector: nn.Module | None
    forward: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: nn.Module | None
    lr: np.ndarray
    weight_decay: np.ndarray
    update_freq: int
    mixup: Callable | None
    criterion: Loss
    autocast: torch.dtype | None
    clip_grad: float | None
    device: torch.device
    seed: int
    rank: int
    world_size: int

    def set_schedule(self, step: int) -> None:
        """Give every parameter group its learning rate and weight decay of a step."""
        for group in self.optimizer.param_groups:
            group["lr"] = float(self.lr[step]) * group.get("lr_scale", 1.0)
            if group["weight_decay"] > 0:
                group["weight_decay"] = float(self.weight_decay[step])

    def backward(self, images, targets, last: bool) -> torch.Tensor:
        """Add the gradient of a micro-batch; returns its loss and the distillation's part, as a tensor on the device.

        Processes exchange gradients only at the last micro-batch of a step.
        """
        images = images.to(self.device, non_blocking=True)
        targets = targets.to(self.device, non_blocking=True)
        if self.mixup is not None:
            images, targets = self.mixup(images, targets)
        wait = isinstance(self.forward, DistributedDataParallel) and not last
        with self.forward.no_sync() if wait else contextlib.nullcontext():
            with autocast(self.device, self.autocast):
                loss, distance = self.criterion(images, self.forward(images), targets)
            self.scaler.scale(loss / self.update_freq).backward()
        return torch.stack([loss.detach(), distance.detach()])

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


def train_one_epoch(trainer: Trainer, loader, epoch: int) -> dict:
    """Train for one epoch.

    Args:
        trainer: the run.
        loader: this process's micro-batches, ``update_freq`` to a step.
        epoch: counted from 0.

    Returns:
        loss (mean over the epoch and all processes), distance (the distillation's in it, likewise), lr and
        weight_decay (of the last step), grad_norm (mean), images_per_second (all processes).

    Raises:
        RunError: the loss is not finite.
    """
    trainer.forward.train()
    steps = len(loader) // trainer.update_freq
    loss_sum = torch.zeros(2, device=trainer.device)
    norm_sum = torch.zeros((), device=trainer.device)
    start, images = time.monotonic(), 0

    def describe():
        mean = loss_sum[0].item() / (done * trainer.update_freq)
        speed = images * trainer.world_size / (time.monotonic() - start)
        return f"loss {mean:.4f} lr {trainer.lr[epoch * steps + done - 1]:.2e} {speed:.0f} images/s"

    batches = iter(loader)
    with Progress(f"epoch {epoch}", steps) as progress:
        for done in range(1, steps + 1):
            trainer.set_schedule(epoch * steps + done - 1)
            for part in range(trainer.update_freq):
                batch = next(batches)
                number = ((done - 1) * trainer.update_freq + part) * trainer.world_size + trainer.rank
                seed_everything(trainer.seed, epoch, number, 1)  # the 1: not the numbers that image `number` gets
                loss_sum += trainer.backward(*batch, last=part == trainer.update_freq - 1)
                images += len(batch[0])
            norm_sum += trainer.update().nan_to_num(0, 0, 0)  # not finite where the loss scaler skips a step
            progress.step(describe)
            if done % CHECK_INTERVAL == 0 or done == steps:
                summed = all_reduce_sum(loss_sum.clone()) / (done * trainer.update_freq * trainer.world_size)
                loss, distance = summed.tolist()
                if not math.isfinite(loss):
                    lr = trainer.lr[epoch * steps + done - 1]
                    raise RunError(
                        f"loss is {loss} by step {done} of epoch {epoch}, at lr {lr:.2e}; lower --lr, or drop --use_amp"
                    )
    last = (epoch + 1) * steps - 1
    return {
        "loss": loss,
        **({"distance": distance} if trainer.criterion.teacher is not None else {}),
        "lr": float(trainer.lr[last]),
        "weight_decay": float(trainer.weight_decay[last]),
        "grad_norm": norm_sum.item() / steps,
        "images_per_second": images * trainer.world_size / (time.monotonic() - start),
    }


@torch.no_grad()
def evaluate(model: nn.Module, loader, device: torch.device, dtype: torch.dtype | None, shared: bool = True) -> dict:
    """Cross-entropy and accuracy over a test set.

    Args:
        model: gives logits, (images, classes).
        loader: (images, labels) of this process's share of the test set.
        device: where to compute.
        dtype: of mixed precision, or None.
        shared: sum over processes; False when every process sees the whole set.

    Returns:
        loss, acc1 and acc5 (percent; top 5 is all classes when there are fewer), images (how many were counted).
    """
    model.eval()
    totals = torch.zeros(4, dtype=torch.float64, device=device)
    with Progress("test", len(loader), lines=0) as progress:
        for images, targets in loader:
            images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
            with autocast(device, dtype):
                logits = model(images)
            logits = logits.float()
            hits = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]
            loss = nn.functional.cross_entropy(logits, targets, reduction="sum")
            totals += torch.stack(
                [loss.double(), hits[:, 0].sum(), hits.sum(), torch.tensor(len(targets), device=device)]
            )
            progress.step(str)
    if shared:
        all_reduce_sum(totals)
    loss, top1, top5, count = totals.tolist()
    return {"loss": loss / count, "acc1": 100 * top1 / count, "acc5": 100 * top5 / count, "images": int(count)}
