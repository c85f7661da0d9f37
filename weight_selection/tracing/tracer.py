"""The tracer: it keeps the labels of a forward pass, and decides what becomes of them where tensors meet.

- Where two tensors meet in a sum or a product, their labels become the same.
- A dimension that meets no neuron, such as a kernel's width or a table of positions, holds positions.
- Where an axis meets one of fewer dimensions, this one indexes blocks of it: a number for each head, say.
"""

from collections.abc import Collection, Set

import torch

from weight_selection.tracing.labels import BlockConstraint, Labels, along, compact, core, storage, unique_rows, varying
from weight_selection.tracing.repetitions import Repetitions


class Untraceable(Exception):
    """The tracer cannot follow neurons through something in a forward pass; the message says through what."""


class Tracer:
    """What is known of the tensors in a forward pass.

    Attributes:
        labels: which labels mean the same neuron.
        constraints: the ``BlockConstraint`` found, in order of execution.
        heights: {id of a convolution's weight: height of its output}.
        met: ids of the tensors that took part in an operation.
        attentions: of each attention the labels of queries, of values and of keys, each (heads, head_dim).
        multiplied: tensors of labels of neurons that a product of two activations joins, or pairs with others.
        sums: {id of a matrix of weights: the dimension over which a product sums}.
        views: {id of a parameter's view: (the view, the parameter or None if it is only a part, is it transposed)}.
        resized: {storage of a tensor: storage of the images that it was interpolated or pooled from}.
        uniform: {storage of a tensor that has one value everywhere: the tensor}.
        differing: {storage of a tensor without labels: (it, the dimensions along which its values differ)}.
        places: {storage of integers that say which neurons of an axis are largest: (they, labels (n,) of the axis)}.
        compared, picked: labels (n,) of the axes of which the largest numbers were taken, and of those of them by whose
            places something was picked, such as experts.
        assembled: {storage of a new tensor that is written part by part: (the tensor, the labels of its elements)}.
        repetitions: where else tensors without labels have equal values.
    """

    def __init__(self):
        self.labels = Labels()
        self.constraints, self.attentions, self.multiplied = [], [], []
        self.heights, self.sums, self.views, self.resized = {}, {}, {}, {}
        self.compared, self.picked, self.met = [], [], set()
        self.uniform, self.differing, self.places, self.assembled = {}, {}, {}, {}
        self.repetitions = Repetitions(self.differs)
        self._axes = {}  # id of a tensor: (the tensor, which keeps the id its own, its list of AxisLabels)

    def get(self, tensor: object) -> list:
        """The ``AxisLabels`` of a tensor, one for each independent axis of neurons; none of what is no tensor."""
        return self._axes.get(id(tensor), (None, []))[1]

    def put(self, tensor: torch.Tensor, axes: list) -> None:
        """Give a tensor its ``AxisLabels``; those that do not vary say nothing."""
        self._axes[id(tensor)] = tensor, [axis for axis in map(compact, axes) if varying(axis)]

    def put_part(self, part: torch.Tensor, axes: list) -> None:
        """Give a part of a new tensor its labels; elements that nothing was written to are neurons of no parameter."""
        place = storage(part)
        whole, labels = self.assembled.get(place, (self.uniform.get(place), None))
        if whole is None or len(axes) != 1 or not whole.is_contiguous():
            raise Untraceable("a part of a tensor is written over")
        labels = self.labels.new(whole.numel()) if labels is None else labels.clone()  # those in use stay as they are
        labels.as_strided(part.shape, part.stride(), part.storage_offset()).copy_(self.labels.find(axes[0]))
        self.assembled[place] = whole, labels
        self.put(whole, [labels.view(whole.shape)])

    def label(self, tensor: torch.Tensor) -> tuple:
        """Give every dimension of a parameter new labels; returns them, (size,) for each dimension."""
        labels = tuple(map(self.labels.new, tensor.shape))
        self.put(tensor, [along(dim, new, tensor.shape) for dim, new in enumerate(labels)])
        self.views[id(tensor)] = tensor, tensor, False
        return labels

    def label_channels(self, images: torch.Tensor) -> None:
        """Give the channels of images, (batch, channels, height, width), new labels. They are no neurons."""
        channels = along(1, self.labels.new(images.shape[1]), images.shape)
        self.put(images, [channels])
        self.positions(channels)

    def positions(self, *axes: torch.Tensor) -> None:
        """Note that these are positions and not neurons."""
        self.labels.positions += [core(axis).flatten() for axis in axes]

    def is_derived(self, axis: torch.Tensor) -> bool:
        """Whether labels are of heads inside which a product sums, and of no parameter."""
        return bool(self.labels.derived[axis[(0,) * axis.ndim]])

    def is_uniform(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is known to have one value everywhere."""
        return storage(tensor) in self.uniform

    def differs(self, tensor: torch.Tensor) -> frozenset:
        """The dimensions along which the values of a tensor may differ."""
        if self.is_uniform(tensor):
            return frozenset()
        known, dims = self.differing.get(storage(tensor), (None, None))
        return dims if known is tensor else varying(tensor)  # an expanded dimension holds one value

    def meet(self, tensors: list, shape: tuple) -> list:
        """Labels of an element-wise combination of tensors that broadcast to ``shape``."""
        result, filled = [], frozenset()
        tensors = sorted(tensors, key=lambda tensor: not self.get(tensor))  # constants meet labels, not the reverse
        for tensor in tensors:
            if self.is_uniform(tensor):
                continue
            lead = len(shape) - tensor.ndim
            full = frozenset(dim + lead for dim in self.differs(tensor))
            axes = [core(axis)[(None,) * lead].expand(shape) for axis in self.get(tensor)]
            if tensor is tensors[0] or not filled and not result:
                result, filled = axes, full
            else:
                told = [axis for axis in result if axes or self._tells_apart(tensor, full, axis)]
                untold = [axis for axis in result if not any(axis is other for other in told)]
                result = self.match(told, axes, filled, full) + untold
                filled |= full
        return result

    def _tells_apart(self, constants, full, axis):
        """Whether constants, whose values may differ along the dimensions ``full``, are others for some neurons."""
        return not varying(axis) & full or not self.repetitions.same_for_all(axis, constants)

    def match(self, ours: list, theirs: list, our_full: Set = frozenset(), their_full: Set = frozenset()) -> list:
        """Labels of a combination of two tensors of one shape, from the labels of both.

        Args:
            our_full, their_full: dimensions along which the values of each differ, whether it has labels there or not.
        """
        kept, theirs = [], list(theirs)
        for axis in ours:
            dims = varying(axis)
            twin = next((other for other in theirs if varying(other) == dims), None)
            if twin is None:
                kept += self._unmatched(axis, theirs, their_full)
                continue
            theirs = [other for other in theirs if other is not twin]
            self.labels.join(core(axis), core(twin))
            kept.append(twin if self.is_derived(axis) and not self.is_derived(twin) else axis)
        for axis in theirs:
            kept += self._unmatched(axis, ours, our_full)
        solid = [axis for axis in kept if not self.is_derived(axis)]
        return [k for k in kept if not self.is_derived(k) or not any(varying(k) < varying(s) for s in solid)]

    def _unmatched(self, axis, others, full):
        """The labels that an axis keeps after it met a tensor without an axis along the same dimensions."""
        dims, parts = varying(axis), [varying(other) for other in others]
        for other, part in zip(others, parts, strict=True):
            if part < dims:
                self.constrain(axis, part, other)
        if any(dims < part for part in parts):  # the other axis gets the constraint
            return []
        met = (dims & full).difference(*parts)
        if met and met == dims:
            self.positions(axis)
            if others:
                return []
            self.labels.constants.append(core(axis).flatten())
            return [axis]
        if met:
            self.constrain(axis, met)
        return [axis]

    def constrain(self, axis: torch.Tensor, dims: Collection, other: torch.Tensor | None = None) -> None:
        """Record that ``other``, or a constant, varies along some dimensions of an axis only, and so indexes blocks."""
        matrix = as_rows(axis, dims)
        labels = None if other is None else as_rows(other, dims).flatten()
        if len(matrix) > 4096 or (labels is not None and len(labels) != len(matrix)):
            raise Untraceable("neurons are spread over positions")
        if other is not None and self.is_derived(other):
            self.note_shared(matrix)
        self.constraints.append(BlockConstraint(labels, matrix))

    def heads(self, axis: torch.Tensor, dims: Collection) -> list:
        """Labels of the heads that remain when a sum runs over ``dims``: a list of one axis, or empty for one head."""
        rest = varying(axis) - set(dims)
        if not rest:
            return []
        matrix, places = unique_rows(as_rows(axis, rest))
        if len(matrix) == 1:
            return []
        heads = self.labels.new(len(matrix), derived=True)
        self.constraints.append(BlockConstraint(heads, matrix))
        shape = [size if dim in rest else 1 for dim, size in enumerate(axis.shape)]
        return [heads[places].view(shape).expand(axis.shape)]

    def note_shared(self, labels: torch.Tensor) -> None:
        """Note labels (heads, ..., head_dim) that are the same for several heads."""
        rows = labels.flatten(0, -2) if labels.ndim > 1 else labels[None]
        ordered = rows.sort(dim=0).values
        self.labels.shared.append(rows[:, (ordered[1:] == ordered[:-1]).any(dim=0)])


def as_rows(axis: torch.Tensor, dims: Collection) -> torch.Tensor:
    """Labels as a matrix that has a row for each place along ``dims``, without repetitions."""
    order = sorted(dims) + [dim for dim in range(axis.ndim) if dim not in dims]
    return core(axis).permute(order).flatten(len(dims)).flatten(0, len(dims) - 1)
