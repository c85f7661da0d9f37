"""Copies of models."""

import copy
from collections import OrderedDict
from itertools import chain

import torch
import torch.nn as nn
from torch.utils._pytree import tree_leaves

from weight_selection.errors import InputError


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
            f"a {type(model).__name__} cannot be copied ({str(error).splitlines()[0]}); give one without what Python's "
            "copy.deepcopy does not take"
        ) from error


def computed(model: nn.Module) -> list[torch.Tensor]:
    """Tensors of a computation that modules keep, such as the last features. PyTorch does not copy these."""
    plain = vars(nn.Module())  # parameters, modules, hooks, …
    own = [value for module in model.modules() for name, value in vars(module).items() if name not in plain]
    kept = chain(model.buffers(), tree_leaves(own))
    return [value for value in kept if isinstance(value, torch.Tensor) and not value.is_leaf]
