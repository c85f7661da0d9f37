"""What a model costs: its parameters, and the multiply-adds of one example's forward pass."""

import torch
import torch.nn as nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from weight_selection.modules import run_forward, skeleton_of
from weight_selection.tracing.known_values import KnownValues


def parameter_count(model: nn.Module) -> int:
    """How many parameters a model has; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def multiply_adds(model: nn.Module, inputs: tuple | dict) -> int:
    """Multiply-adds of the matrix products and convolutions of a forward pass, for as many examples as the inputs have.

    They are counted without computing: the model may be on any device, also on the meta device.

    Args:
        inputs: arguments of the forward pass, or a dict of keyword arguments.
    """
    skeleton = skeleton_of(model).eval()
    known = KnownValues()
    inputs = tree_map_only(torch.Tensor, known.on_meta, inputs)
    with torch.no_grad(), _Answering(known), FlopCounterMode(display=False) as counter:
        run_forward(skeleton, inputs)
    return counter.get_total_flops() // 2


class _Answering(TorchDispatchMode):
    """Runs the operations under it on the meta device. A model may look at known values."""

    def __init__(self, known):
        super().__init__()
        self.known = known

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.known.run(func, args, kwargs or {}, lambda func, args, kwargs: func(*args, **kwargs))
