"""Copies of models."""

import copy
from collections import OrderedDict

import torch.nn as nn


def copy_of(model: nn.Module, memo: dict | None = None) -> nn.Module:
    """``copy.deepcopy(model, memo)`` in half the time.

    Each module has a dozen dicts for hooks, most of them empty, and to copy one takes deepcopy as long as a tensor.
    """
    memo = {} if memo is None else memo
    for module in model.modules():
        for value in vars(module).values():
            if type(value) is OrderedDict and not value:
                memo[id(value)] = OrderedDict()
    return copy.deepcopy(model, memo)
