"""What is done with any module: run it, list its tensors, copy it."""

import contextlib
import copy
from collections import OrderedDict
from collections.abc import Iterator
from itertools import chain, takewhile
from typing import Any

import torch
import torch.nn as nn
from torch.nn.modules.module import _EXTRA_STATE_KEY_SUFFIX as EXTRA_STATE
from torch.utils._pytree import tree_leaves

from weight_selection.errors import InputError, first_line


def run_forward(model: nn.Module, inputs: tuple | dict) -> Any:
    """What a model gives for inputs: a tuple of arguments, or a dict of keyword arguments."""
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within the block a model is in evaluation mode; afterwards each of its modules is in the mode that it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def tensors_of(model: nn.Module, **options) -> dict:
    """A model's state_dict without what its modules add beside tensors (``get_extra_state``)."""
    return {key: value for key, value in model.state_dict(**options).items() if key.rpartition(".")[2] != EXTRA_STATE}


def module_around(names: list) -> str:
    """The innermost module that holds all of some, each given by the parts of its name; empty for the whole model."""
    levels = takewhile(lambda level: len(set(level)) == 1, zip(*names, strict=False))
    return ".".join(level[0] for level in levels)


def skeleton_of(model: nn.Module) -> nn.Module:
    """A copy on the meta device, which shares no weight and takes no memory.

    Where its config lets a model choose, the copy computes attention and experts from matrix products: fused kernels do
    not run on the meta device, masks for them are made by looking at values, and so are batches of tokens for experts.

    Raises:
        InputError: as ``copy_of``.
    """
    memo = {}
    for tensor in chain(model.parameters(), model.buffers(), computed(model)):
        bare = tensor.detach().to("meta")
        memo[id(tensor)] = nn.Parameter(bare, requires_grad=False) if isinstance(tensor, nn.Parameter) else bare
    skeleton = copy_of(model, memo)
    for module in skeleton.modules():
        config = getattr(module, "config", None)  # of Hugging Face
        if hasattr(config, "_attn_implementation"):
            config._attn_implementation = "eager"
        if hasattr(config, "_experts_implementation"):
            config._experts_implementation = "batched_mm"
    return skeleton


def copy_of(model: nn.Module, memo: dict | None = None) -> nn.Module:
    """``copy.deepcopy(model, memo)`` in half the time, also if modules keep tensors of a computation.

    Each module has a dozen dicts for hooks, most of them empty, and to copy one takes deepcopy as long as a tensor.

    Raises:
        InputError: the model holds what Python does not copy, such as a lock.
    """
    memo = {} if memo is None else memo
    for module in model.modules():
        for value in vars(module).values():
            if type(value) is OrderedDict and not value:
                memo[id(value)] = OrderedDict()
    for tensor in computed(model):
        if id(tensor) not in memo:
            memo[id(tensor)] = tensor.detach().clone()
    try:
        return copy.deepcopy(model, memo)
    except (TypeError, RuntimeError) as error:
        raise InputError(
            f"a {type(model).__name__} cannot be copied ({first_line(error)}); give one without what Python's "
            "copy.deepcopy does not take"
        ) from error


def computed(model: nn.Module) -> list[torch.Tensor]:
    """Tensors of a computation that modules keep, such as the last features. PyTorch does not copy these."""
    plain = vars(nn.Module())  # parameters, modules, hooks, …
    own = [value for module in model.modules() for name, value in vars(module).items() if name not in plain]
    kept = chain(model.buffers(), tree_leaves(own))
    return [value for value in kept if isinstance(value, torch.Tensor) and not value.is_leaf]
