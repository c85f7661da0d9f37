"""Labels of neurons, and tensors of them that go beside activations.

Labels are integers in the shape of the tensor that they describe, broadcast (stride 0) along the dimensions that they
do not depend on: of an image's features (batch, channels, height, width) they depend on the channels. A tensor has as
many such *layers* of labels as it has independent axes of neurons: hidden units of a token-mixing layer (batch,
channels, units) have two.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Link:
    """An axis that meets only a part of the structure of another: heads against heads * head_dim.

    Attributes:
        labels: (n,) of the axis; None for n different constants.
        matrix: (n, m), the labels that are met together with each.
        always: the neurons come in n (or m) blocks even if ``labels`` is nobody's dimension: grouped convolutions.
    """

    labels: torch.Tensor | None
    matrix: torch.Tensor
    always: bool = False


class Labels:
    """Equivalence classes of labels (a union-find over integers, in whole tensors at a time)."""

    def __init__(self):
        self.parent = torch.arange(1 << 16)
        self.count = 0
        self.positions = []  # labels of what are positions, not neurons
        self.derived = torch.zeros(1 << 16, dtype=torch.bool)  # of no parameter: of heads inside which a product sums

    def new(self, count: int, derived: bool = False) -> torch.Tensor:
        """Labels that are nobody else's, (count,)."""
        first, self.count = self.count, self.count + count
        while self.count > len(self.parent):
            self.parent = torch.cat([self.parent, torch.arange(len(self.parent), 2 * len(self.parent))])
            self.derived = torch.cat([self.derived, torch.zeros_like(self.derived)])
        self.derived[first : self.count] = derived
        return torch.arange(first, self.count)

    def find(self, labels: torch.Tensor) -> torch.Tensor:
        """The representative of each label's class."""
        roots = self.parent[labels]
        while not torch.equal(roots, above := self.parent[roots]):
            roots = above
        return roots

    def join(self, ours: torch.Tensor, theirs: torch.Tensor) -> None:
        """Make one of every two labels at the same place; shapes are broadcast."""
        ours, theirs = torch.broadcast_tensors(ours, theirs)
        while True:
            ours, theirs = self.find(ours.flatten()), self.find(theirs.flatten())
            different = ours != theirs
            if not different.any():
                return
            low, high = torch.minimum(ours, theirs)[different], torch.maximum(ours, theirs)[different]
            self.parent.scatter_reduce_(0, high, low, "amin")


def varying(layer) -> frozenset:
    """The dimensions that labels depend on."""
    return frozenset(
        dim for dim, (size, step) in enumerate(zip(layer.shape, layer.stride(), strict=True)) if size > 1 and step
    )


def core(layer):
    """Labels without the repetitions along the dimensions that they do not depend on, which have size 1."""
    for dim, (size, step) in enumerate(zip(layer.shape, layer.stride(), strict=True)):
        if size > 1 and not step:
            layer = layer.narrow(dim, 0, 1)
    return layer


def compact(layer):
    """The same labels, stored once along every dimension that they do not depend on."""
    kept = core(layer)
    for dim, size in enumerate(kept.shape):
        if size > 1 and (first := kept.narrow(dim, 0, 1)).expand_as(kept).equal(kept):
            kept = first
    return kept.expand(layer.shape)


def fit(layer, shape):
    """Labels for a tensor of another shape of as many dimensions, where they depend on none that differs."""
    return core(layer).expand(shape)


def unique_rows(rows):
    """Different rows in the order of their first occurrence, and which of them each row is."""
    unique, places = torch.unique(rows, dim=0, return_inverse=True)
    first = torch.full((len(unique),), len(places)).scatter_reduce(0, places, torch.arange(len(places)), "amin")
    order = first.argsort()
    return unique[order], order.argsort()[places]
