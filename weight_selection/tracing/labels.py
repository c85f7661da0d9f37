"""Labels: numbers that say which neurons are the same, and the tensors of them that travel beside activations.

Every neuron has an integer, its label. Beside an activation travels a tensor of labels of the same shape, an
``AxisLabels``. It is expanded (stride 0) along the dimensions that the label does not depend on: the features of an
image, (batch, channels, height, width), have one label per channel. An activation has one such tensor for every
independent axis of neurons. The hidden units of a token-mixing MLP, (batch, channels, units), have two.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

AxisLabels = torch.Tensor  # int64, of the shape of the activation that it describes


@dataclass(frozen=True)
class BlockConstraint:
    """One axis (heads) indexes blocks of another (heads x head_dim), so the blocks must stay whole.

    Attributes:
        labels: (n,), of the axis that indexes blocks; None if n different constants do.
        matrix: (n, m), for each of them the labels of its block.
        always: the blocks exist even if ``labels`` belong to no parameter, as in a grouped convolution.
    """

    labels: torch.Tensor | None
    matrix: torch.Tensor
    always: bool = False


class Labels:
    """Which labels mean the same neuron: a union-find over integers that works on whole tensors.

    Attributes:
        positions: tensors of labels that are positions (a kernel's width, a table's rows) and not neurons.
        constants: those of the positions that meet another number each which is no weight, such as a sinusoid.
        shared: tensors of labels of keys and values that several queries share.
        derived: bool, of the labels of no parameter: those of heads inside which a product sums.
    """

    def __init__(self):
        self.parent = torch.arange(1 << 16)
        self.count = 0
        self.positions = []
        self.constants = []
        self.shared = []
        self.derived = torch.zeros(1 << 16, dtype=torch.bool)

    def new(self, count: int, derived: bool = False) -> torch.Tensor:
        """``count`` labels that nobody has yet, (count,)."""
        first, self.count = self.count, self.count + count
        while self.count > len(self.parent):
            self.parent = torch.cat([self.parent, torch.arange(len(self.parent), 2 * len(self.parent))])
            self.derived = torch.cat([self.derived, torch.zeros_like(self.derived)])
        self.derived[first : self.count] = derived
        return torch.arange(first, self.count)

    def find(self, labels: torch.Tensor) -> torch.Tensor:
        """The representative of each label's class, of the same shape."""
        roots = self.parent[labels]
        while not torch.equal(roots, above := self.parent[roots]):
            roots = above
        return roots

    def roots(self, tensors: list) -> torch.Tensor:
        """Of every label, whether it represents the class of one of these, bool (count,)."""
        found = torch.zeros(self.count, dtype=torch.bool)
        for labels in tensors:
            found[self.find(labels)] = True
        return found

    def join(self, ours: torch.Tensor, theirs: torch.Tensor) -> None:
        """Declare that two labels at the same place mean the same neuron. Shapes are broadcast."""
        ours, theirs = torch.broadcast_tensors(ours, theirs)
        while True:
            ours, theirs = self.find(ours.flatten()), self.find(theirs.flatten())
            different = ours != theirs
            if not different.any():
                return
            low, high = torch.minimum(ours, theirs)[different], torch.maximum(ours, theirs)[different]
            self.parent.scatter_reduce_(0, high, low, "amin")


def along(dim: int, labels: torch.Tensor, shape: tuple) -> AxisLabels:
    """Labels (n,) of the neurons along one dimension, for a tensor of that shape."""
    return labels.view([-1 if other == dim else 1 for other in range(len(shape))]).expand(shape)


def moved(func: Callable, axis: torch.Tensor, args: tuple, kwargs: dict) -> torch.Tensor | list:
    """What an operation that moves elements makes of labels, which are often expanded and then cannot be viewed."""
    if func in (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default):
        return axis.reshape(*args)
    return func(axis, *args, **kwargs)


def varying(axis: AxisLabels) -> frozenset:
    """The dimensions along which labels differ."""
    return frozenset(
        dim for dim, (size, step) in enumerate(zip(axis.shape, axis.stride(), strict=True)) if size > 1 and step
    )


def core(axis: AxisLabels) -> torch.Tensor:
    """Labels without their repetitions: dimensions along which they do not differ get size 1."""
    for dim, (size, step) in enumerate(zip(axis.shape, axis.stride(), strict=True)):
        if size > 1 and not step:
            axis = axis.narrow(dim, 0, 1)
    return axis


def compact(axis: AxisLabels) -> AxisLabels:
    """The same labels, expanded along every dimension where they happen to be equal."""
    kept = core(axis)
    for dim, size in enumerate(kept.shape):
        if size > 1 and (first := kept.narrow(dim, 0, 1)).expand_as(kept).equal(kept):
            kept = first
    return kept.expand(axis.shape)


def fit(axis: AxisLabels, shape: tuple) -> AxisLabels:
    """Labels for a tensor of another shape; they may not depend on a dimension whose size differs."""
    return core(axis).expand(shape)


def storage(tensor: torch.Tensor) -> int:
    """The memory that a tensor shares with its views."""
    return tensor.untyped_storage()._cdata


def unique_rows(rows: torch.Tensor) -> tuple:
    """The different rows of (n, m), in the order of their first occurrence, and for each row which of them it is."""
    unique, places = torch.unique(rows, dim=0, return_inverse=True)
    first = torch.full((len(unique),), len(places)).scatter_reduce(0, places, torch.arange(len(places)), "amin")
    order = first.argsort()
    return unique[order], order.argsort()[places]
