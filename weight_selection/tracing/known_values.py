"""Known values: of small tensors that a forward pass makes from its inputs and from constants, without a weight.

Tensors on the meta device have no values, but a model may look at some: does the mask hide a token, how long is the
longest sequence? What depends on no weight is therefore computed on the CPU as well, beside the trace.
"""

import torch
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from weight_selection.tracing.labels import storage

MOST = 1 << 16  # elements of a tensor whose values are kept
UNKNOWN = object()
BY_VALUES = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}  # what comes out cannot be told without


class KnownValues:
    """Which tensors on the meta device have known values."""

    def __init__(self):
        self._known = {}  # id of a tensor: (the tensor, its values)

    def put(self, tensor: torch.Tensor, values: torch.Tensor) -> None:
        """Note the values of a tensor."""
        if values.numel() <= MOST:
            self._known[id(tensor)] = tensor, values

    def get(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """The values of a tensor, or None. A tensor on another device than meta has its own."""
        return self._known.get(id(tensor), (None, None))[1] if tensor.is_meta else tensor

    def compute(self, func, tensors: list, args: tuple, kwargs: dict):
        """What an operation of ``torch.ops`` gives for the values of its arguments, of which ``tensors`` are tensors.

        UNKNOWN if a value is not known, if it is drawn at random, or if the operation does not run on the meta device.
        """
        on_meta = any(tensor.is_meta for tensor in tensors) or kwargs.get("device") == torch.device("meta")
        known = not any(self.get(tensor) is None for tensor in tensors)
        if not on_meta or not known or torch.Tag.nondeterministic_seeded in func.tags:
            self._forget_written(func, args)
            return UNKNOWN
        args, kwargs = tree_map_only(torch.Tensor, self.get, (args, kwargs))
        return func(*args, **tree_map(_on_cpu, kwargs))

    def note(self, out, values) -> None:
        """Note the values that ``compute`` gave for the tensors that an operation gave on the meta device."""
        for tensor, value in zip(tree_leaves(out), tree_leaves(values), strict=True):
            if isinstance(tensor, torch.Tensor):
                self.put(tensor, value)

    def _forget_written(self, func, args):
        """An operation wrote unknown values into a tensor, and so into all that share its memory."""
        if func._schema.is_mutable and self._known:
            written = [
                value for argument, value in zip(func._schema.arguments, args, strict=False) if argument.is_write
            ]
            places = {storage(value) for value in written if isinstance(value, torch.Tensor)}
            self._known = {key: pair for key, pair in self._known.items() if storage(pair[0]) not in places}


def _on_cpu(option):
    return torch.device("cpu") if isinstance(option, torch.device) else option
