"""Optimiser, parameter groups and schedules of the recipe (paper, Table 13)."""

from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
from timm.optim import create_optimizer_v2, get_optimizer_info, param_groups_weight_decay

from utils import describe
from weight_selection.errors import InputError

FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)  # these can update all parameters in one GPU kernel


def create_optimizer(
    model: nn.Module, args: SimpleNamespace, projector: nn.Module | None = None
) -> torch.optim.Optimizer:
    """timm's optimiser over timm's parameter groups of a model, and of the projector if a distillation has one.

    Weight decay spares 1-D tensors, biases, and the tensors in the model's ``no_weight_decay()`` (position embeddings,
    class tokens). With ``layer_decay`` < 1, the learning rate of a layer is scaled by layer_decay ** (number of layers
    above it); the model's ``group_matcher`` numbers the layers, and each group holds the factor as ``lr_scale``. In
    linear probing without weight decay, LARS adapts the rate of matrices and not of vectors, as MAE's LARS does;
    timm's LARS would adapt neither. Parameters that require no gradient are left out.

    Raises:
        InputError: unknown optimiser, or one that does not take the options.
    """
    try:
        info = get_optimizer_info(args.opt)
    except ValueError as error:
        raise InputError(f"--opt {args.opt}: timm has no such optimiser; try adamw, sgd, lamb, lars") from error
    if info.second_order:
        raise InputError(f"--opt {args.opt}: needs second derivatives, which main.py does not compute; try adamw")
    kwargs = {"momentum": args.momentum} if info.has_momentum else {}
    if info.has_eps and args.opt_eps is not None:
        kwargs["eps"] = args.opt_eps
    if args.opt_betas is not None:
        betas = info.num_betas if info.has_betas else 0
        if len(args.opt_betas) != betas:
            raise InputError(f"--opt_betas {args.opt_betas}: {args.opt} takes {betas}; give as many, or leave it out")
        kwargs["betas"] = tuple(args.opt_betas)
    if next(model.parameters()).is_cuda and info.opt_class in FUSED:
        kwargs["fused"] = True  # it also need not wait for the device to learn whether float16 overflowed
    parameters = lars_groups(model) if args.linear_probe and args.opt == "lars" and args.weight_decay == 0 else model
    rates = {"lr": args.lr, "weight_decay": args.weight_decay}
    if args.layer_decay < 1:
        rates["layer_decay"] = args.layer_decay
    try:
        optimizer = create_optimizer_v2(parameters, args.opt, **rates, **kwargs)
    except (ValueError, AssertionError) as error:  # such as Nesterov's momentum of 0, or no GPU
        raise InputError(f"--opt {args.opt}: cannot be made with {describe(kwargs)}: {error}") from error
    if projector is not None:
        for group in param_groups_weight_decay(projector, args.weight_decay):
            optimizer.add_param_group(group)
    return optimizer


def lars_groups(model: nn.Module) -> list:
    """Parameter groups for timm's LARS without weight decay: it adapts the rate of the first (matrices) only."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for parameter in trained if parameter.ndim > 1], "always_adapt": True},
        {"params": [parameter for parameter in trained if parameter.ndim <= 1]},
    ]


def cosine_schedule(base: float, final: float, total_steps: int, warmup_steps: int = 0) -> np.ndarray:
    """A value for each step, (total_steps,): in the warm-up linear from 0 to ``base``, then half a cosine to ``final``.

    Args:
        base: value of the last warm-up step, and of the first step after it.
        final: value that the cosine approaches, but does not reach, at the end.
        total_steps: optimiser steps of the run.
        warmup_steps: how many of them are warm-up.

    Raises:
        InputError: the warm-up is longer than the run.
    """
    if warmup_steps > total_steps:
        raise InputError(
            f"--warmup_epochs/--warmup_steps: {warmup_steps} warm-up steps, but the run has only {total_steps}"
        )
    angle = np.pi * np.arange(total_steps - warmup_steps) / max(1, total_steps - warmup_steps)
    return np.concatenate([np.linspace(0, base, warmup_steps), final + 0.5 * (base - final) * (1 + np.cos(angle))])
