"""Known values: of small tensors that a forward pass makes from its inputs and from constants, without a weight.

Tensors on the meta device have no values, but a model may look at some: does the mask hide a token, how long is the
longest sequence? What depends on no weight is therefore computed on the CPU as well, beside the trace.
"""

from collections.abc import Callable, Iterable
from functools import partial
from itertools import chain

import torch
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from weight_selection.tracing.labels import storage

MOST = 1 << 16  # elements of a tensor whose values are kept
BY_VALUES = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}  # what comes out cannot be told without


class KnownValues:
    """Which tensors on the meta device have known values."""

    def __init__(self):
        self._known = {}  # id of a tensor: (the tensor, its values)

    def on_meta(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor's like on the meta device; its values, if it has some, are noted."""
        like = tensor.detach().to("meta")
        if not tensor.is_meta and tensor.numel() <= MOST:
            self._known[id(like)] = like, tensor.detach().cpu().clone()  # the model may write into it
        return like

    def run(self, func: Callable, args: tuple, kwargs: dict, run: Callable) -> object:
        """What an operation of ``torch.ops`` gives: a number, if one is asked for that is known, or tensors.

        Args:
            run: (func, args, kwargs) -> what the operation gives on the meta device.
        """
        if not self._can_compute(func, args, kwargs):
            self._forget_written(func, args)
            return run(func, args, kwargs)
        if not BY_VALUES.isdisjoint(func.tags):
            values = self._compute(func, args, kwargs)
            out = tree_map_only(torch.Tensor, partial(torch.empty_like, device="meta"), values)
        else:
            out = run(func, args, kwargs)
            if any(tensor.numel() > MOST for tensor in tree_leaves(out) if isinstance(tensor, torch.Tensor)):
                self._forget_written(func, args)
                return out
            values = self._compute(func, args, kwargs)
        for tensor, value in zip(tree_leaves(out), tree_leaves(values), strict=True):
            if isinstance(tensor, torch.Tensor):
                self._known[id(tensor)] = tensor, value
        return out

    def _get(self, tensor):
        """The values of a tensor, or None. A tensor on another device than meta has its own."""
        return self._known.get(id(tensor), (None, None))[1] if tensor.is_meta else tensor

    def _can_compute(self, func, args, kwargs):
        """Whether an operation runs on the meta device, and its values are known and not drawn at random."""
        tensors = tensors_among(chain(args, kwargs.values()))
        on_meta = any(tensor.is_meta for tensor in tensors) or kwargs.get("device") == torch.device("meta")
        known = all(self._get(tensor) is not None for tensor in tensors)
        return on_meta and known and torch.Tag.nondeterministic_seeded not in func.tags

    def _compute(self, func, args, kwargs):
        args, kwargs = tree_map_only(torch.Tensor, self._get, (args, kwargs))
        return func(*args, **tree_map(_on_cpu, kwargs))

    def _forget_written(self, func, args):
        """An operation wrote unknown values into a tensor, and so into all that share its memory."""
        if func._schema.is_mutable and self._known:
            written = [
                value for argument, value in zip(func._schema.arguments, args, strict=False) if argument.is_write
            ]
            places = {storage(value) for value in written if isinstance(value, torch.Tensor)}
            self._known = {key: pair for key, pair in self._known.items() if storage(pair[0]) not in places}


def tensors_among(arguments: Iterable) -> list:
    """The tensors among arguments, also in lists."""
    items = chain(*(value if isinstance(value, (list, tuple)) else (value,) for value in arguments))
    return [item for item in items if isinstance(item, torch.Tensor)]


def _on_cpu(option):
    return torch.device("cpu") if isinstance(option, torch.device) else option
