"""Repetitions: where a tensor without labels is known to have equal values.

A mask of positions is repeated for the heads of an attention. All heads then meet the same values, which say nothing
of how many heads there must be. We follow elements through the operations that make such a tensor: where two elements
have the same numbers, they have the same value.
"""

from collections.abc import Callable
from functools import partial

import torch

from weight_selection.tracing.labels import AxisLabels, core, moved, storage, varying

MOST = 100  # operations that are followed, each as often as its result is used


class Repetitions:
    """How tensors without labels were made from others.

    Args:
        differs: gives the dimensions along which the values of a tensor may differ.
    """

    def __init__(self, differs: Callable):
        self._differs = differs
        self._made = {}  # storage: {id of a tensor in it: (the tensor, number of operations, gives its numbers)}

    def note_move(self, func, out, x: torch.Tensor, *args, **kwargs) -> None:
        """Note that an operation moved the elements of ``x``; it gave a tensor, or several."""
        _, count, numbers = self._entry(x)
        for place, tensor in enumerate(out if isinstance(out, (tuple, list)) else [out]):
            self._note(tensor, count, partial(_moved, numbers, place, func, args, kwargs))

    def note_elementwise(self, out: torch.Tensor, tensors: list) -> None:
        """Note that every element of a tensor, perhaps one of them, follows from those of others at the same place."""
        _, counts, numbers = zip(*map(self._entry, tensors), strict=True)
        if any(out is tensor for tensor in tensors):
            self.forget(out)
        self._note(out, sum(counts), partial(_combined, numbers, out.shape))

    def forget(self, tensor: torch.Tensor) -> None:
        """An operation wrote into the memory of this tensor."""
        self._made.pop(storage(tensor), None)

    def same_for_all(self, axis: AxisLabels, tensor: torch.Tensor) -> bool:
        """Whether a tensor, which broadcasts to the shape of labels, has the same values for every label."""
        dims = sorted(varying(axis))
        rest = [dim for dim in range(axis.ndim) if dim not in dims]
        labels = core(axis).flatten()
        count, order = len(labels.unique()), labels.argsort(stable=True)
        for numbers in _combined([self._entry(tensor)[2]], axis.shape):
            lines = core(numbers).expand([n if dim in dims else -1 for dim, n in enumerate(axis.shape)])
            lines = lines.permute(dims + rest).reshape(len(labels), -1)[order]
            if len(labels) % count or (lines.view(count, -1) != lines.view(count, -1)[:1]).any():
                return False
        return True

    def _note(self, out, count, numbers):
        if count < MOST:
            self._made.setdefault(storage(out), {})[id(out)] = out, count + 1, numbers

    def _entry(self, tensor):
        found = self._made.get(storage(tensor), {}).get(id(tensor))
        known = found is not None and found[0] is tensor
        return found if known else (tensor, 0, partial(_new, tensor.shape, self._differs(tensor)))


# Each function ``numbers`` gives integer tensors of a tensor's shape. Where all of them are the same, so is the value.


def _new(shape, dims):
    size = [n if dim in dims else 1 for dim, n in enumerate(shape)]
    return [torch.arange(torch.Size(size).numel()).view(size).expand(shape)]


def _moved(numbers, place, func, args, kwargs):
    all_moved = [moved(func, one, args, kwargs) for one in numbers()]
    return [one if isinstance(one, torch.Tensor) else one[place] for one in all_moved]


def _combined(several, shape):
    return [one.expand(shape) for numbers in several for one in numbers()]
