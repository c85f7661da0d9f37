"""A tap on a running model: it shows what dense layers, layer normalisations and LayerScales take and give."""

from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

DENSE = {F.linear, F.conv2d, torch.conv2d}
PRODUCTS = {"mul", "mul_", "__mul__", "__rmul__"}


class ActivationTap(TorchFunctionMode):
    """While it is active (``with ActivationTap(...):``), it calls the given functions as the model's layers run.

    A layer whose weight the model computes from parameters (weight standardisation) has no key and is not shown.

    Args:
        model: the model that is going to run.
        dense: ``(key of the weight, input, output) -> output``, called after every linear layer and convolution. The
            model goes on with the output that it returns.
        norm: the same, called after every ``layer_norm`` with the key of its gain.
        scaled: ``(key of a parameter, other factor)``, called before every product with a parameter.
    """

    def __init__(self, model: nn.Module, dense: Callable, norm: Callable | None = None, scaled: Callable | None = None):
        super().__init__()
        self.keys = {id(parameter): key for key, parameter in model.named_parameters()}
        self.dense, self.norm, self.scaled = dense, norm, scaled

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in DENSE:
            key = self.keys.get(id(args[1] if len(args) > 1 else kwargs["weight"]))
            if key is not None:
                return self.dense(key, args[0], func(*args, **kwargs))
        elif func is F.layer_norm and self.norm is not None:
            key = self.keys.get(id(args[2] if len(args) > 2 else kwargs.get("weight")))
            if key is not None:
                return self.norm(key, args[0], func(*args, **kwargs))
        elif self.scaled is not None and getattr(func, "__name__", "") in PRODUCTS:
            factors = (*args, *kwargs.values())[:2]
            for one, other in (factors, factors[::-1]):
                if id(one) in self.keys:
                    self.scaled(self.keys[id(one)], other)
        return func(*args, **kwargs)


def vectors(x: torch.Tensor, weight_ndim: int) -> torch.Tensor:
    """The input or output of a dense layer as rows, (n, channels). Of a convolution the channels are dimension 1."""
    x = x.movedim(1, -1) if weight_ndim > 2 else x
    return x.reshape(-1, x.shape[-1])
