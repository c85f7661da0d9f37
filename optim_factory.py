"""Optimiser, parameter groups and schedules of the recipe (paper, Table 13)."""

import numpy as np
import torch
import torch.nn as nn
from timm.optim import create_optimizer_v2, get_optimizer_info, param_groups_weight_decay

import utils
from weight_selection.errors import InputError

FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)  # have a kernel on GPUs for all parameters at once


def create_optimizer(model: nn.Module, args, projector: nn.Module | None = None) -> torch.optim.Optimizer:
    """timm's optimiser over timm's parameter groups of the model, and of the projector of a distillation if any.

    No weight decay on 1-D tensors, biases and what the model names in ``no_weight_decay()`` (position embeddings,
    class tokens). With ``layer_decay`` < 1 a layer's learning rate is layer_decay to the number of layers above it,
    by the model's own ``group_matcher``; each group holds it as ``lr_scale``. In linear probing LARS adapts the rate of
    matrices, not of vectors, also without weight decay, as MAE's does (timm's own adapts neither then).

    Raises:
        InputError: unknown optimiser, or options it does not take.
    """
    try:
        info = get_optimizer_info(args.opt)
    except ValueError as error:
        raise InputError(f"--opt {args.opt}: timm has no such optimiser; try adamw, sgd, lamb, lars") from error
    kwargs = {"momentum": args.momentum} if info.has_momentum else {}
    if info.has_eps and args.opt_eps is not None:
        kwargs["eps"] = args.opt_eps
    if args.opt_betas is not None:
        if not info.has_betas or len(args.opt_betas) != info.num_betas:
            raise InputError(
                f"--opt_betas {args.opt_betas}: {args.opt} takes {info.num_betas if info.has_betas else 0}"
            )
        kwargs["betas"] = tuple(args.opt_betas)
    if next(model.parameters()).is_cuda and info.opt_class in FUSED:
        kwargs["fused"] = True  # it need not wait either to learn whether float16 overflowed
    try:
        optimizer = create_optimizer_v2(
            lars_groups(model) if args.linear_probe and args.opt == "lars" and args.weight_decay == 0 else model,
            opt=args.opt,
            lr=args.lr,
            weight_decay=args.weight_decay,
            layer_decay=args.layer_decay if args.layer_decay < 1 else None,
            **kwargs,
        )
    except ValueError as error:  # such as Nesterov's momentum of 0
        raise InputError(f"--opt {args.opt}: cannot be made with {utils.describe(kwargs)}: {error}") from error
    if projector is not None:
        for group in param_groups_weight_decay(projector, args.weight_decay):
            optimizer.add_param_group(group)
    return optimizer


def lars_groups(model: nn.Module) -> list:
    """Parameter groups for timm's LARS without weight decay: adapted matrices, and vectors."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for parameter in trained if parameter.ndim > 1], "always_adapt": True},
        {"params": [parameter for parameter in trained if parameter.ndim <= 1]},
    ]


def cosine_schedule(base: float, final: float, steps: int, warmup_steps: int = 0) -> np.ndarray:
    """One value per step: linear from 0 to ``base`` (both included) in the warm-up, then half a cosine to ``final``.

    Args:
        base: value at the end of the warm-up.
        final: value the cosine approaches at the end.
        steps: optimiser steps of the whole run.
        warmup_steps: how many of them are warm-up.

    Raises:
        InputError: the warm-up is longer than the run.
    """
    if warmup_steps > steps:
        raise InputError(f"--warmup_epochs/--warmup_steps: {warmup_steps} warm-up steps, but the run has only {steps}")
    angle = np.pi * np.arange(steps - warmup_steps) / max(1, steps - warmup_steps)
    return np.concatenate([np.linspace(0, base, warmup_steps), final + 0.5 * (base - final) * (1 + np.cos(angle))])
