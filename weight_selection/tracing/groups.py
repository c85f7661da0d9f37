"""Groups: the labels of a trace, sorted into sets of neurons that are kept or dropped together.

Two neurons are of one group when they appear in exactly the same dimensions of the same tensors: the features of a
residual stream, the hidden units of one MLP, the channels inside the query of one attention. A dimension of a tensor is
made of slices, each of one group: a fused projection has a slice for queries, one for keys and one for values; the
input of a convolution over concatenated features has one for each of them. Inside a group, grouped convolutions, rotary
embeddings and tables with one number per head require that neurons stay together in blocks.
"""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import torch

from weight_selection.tracing.trace import Trace


@dataclass(frozen=True)
class NeuronGroup:
    """Neurons that every tensor keeps or drops together.

    Attributes:
        block_shape: sizes whose product is the number of neurons, such as (heads, head_dim); one size if there are no
            blocks.
        fixed: for each of these sizes, whether a student must have the same: positions, constants such as rotary
            frequencies.
        crossing_blocks: two constraints ask for blocks that cross each other.
        shared: several queries of an attention share these keys or values. The dimensions of what makes the queries,
            and of what takes their results, have a slice of the group for each.
    """

    block_shape: tuple
    fixed: tuple
    crossing_blocks: bool = False
    shared: bool = False

    @property
    def size(self) -> int:
        """The number of neurons."""
        return int(np.prod(self.block_shape))


@dataclass(frozen=True)
class GroupSlice:
    """The place of a group in a dimension of a tensor.

    Attributes:
        group: number of the group.
        indices: of its neurons along the dimension, int64, in the group's order and of its ``block_shape``.
    """

    group: int
    indices: np.ndarray


@dataclass(frozen=True)
class ModelGroups:
    """The groups of a model, and where they are in its tensors.

    Attributes:
        groups: list of ``NeuronGroup``.
        slices: {key: for each dimension a tuple of ``GroupSlice``, or None if the dimension holds positions}.
        constants: {(key, dimension): its slices}, of positions that meet another number each which is no weight, such
            as a sinusoid, or the rotary embedding of a single key head.
        unused: keys of tensors that the forward pass does not use; nothing is known about their dimensions.
        attentions: [(number of the group of queries and keys, number of the group of values, heads, keys of the tensors
            that only its keys come from)].
        multiplied: numbers of the groups that a product of two activations joins, or pairs with others.
        sums: {key of a matrix of weights: the dimension over which a product sums}.
    """

    groups: list
    slices: dict
    constants: dict
    unused: frozenset
    attentions: list
    multiplied: frozenset
    sums: dict

    def slices_of(self, key: str, dim: int) -> tuple | None:
        """The slices of a dimension, also if it holds constants."""
        return self.slices[key][dim] or self.constants.get((key, dim))

    def fewest_slices(self, number: int) -> int:
        """How many slices of a group are in the dimension that has fewest of them, and has some."""
        dims = (*(dim for dims in self.slices.values() for dim in dims if dim), *self.constants.values())
        return min(filter(None, (sum(part.group == number for part in dim) for dim in dims)))


def find_groups(trace: Trace) -> ModelGroups:
    """Sort the labels of a trace into groups and slices."""
    find = trace.labels.find
    joined = 1
    while joined:
        roots = {key: [find(dim).numpy() for dim in dims] for key, dims in trace.dims.items()}
        position = trace.labels.roots(trace.labels.positions).numpy()
        members, group, rank = _sort([dim for dims in roots.values() for dim in dims], position)
        joined = sum(_join_branches(trace, constraint, members, group) for constraint in trace.constraints)
    shared, constant = (trace.labels.roots(some).numpy() for some in (trace.labels.shared, trace.labels.constants))
    groups = []
    for some, blocks in zip(members, _blocks(trace, list(map(len, members)), group, rank, position), strict=True):
        groups.append(_group(len(some), blocks, bool(position[some].all()), bool(shared[some].all())))
    found = {dim.tobytes(): dim for key in trace.met for dim in roots[key]}
    found = {
        content: _slices(dim, group, rank, groups)
        for content, dim in found.items()
        if not position[dim].all() or constant[dim].all()
    }
    slices, constants = {}, {}
    for key, dims in roots.items():
        parts = [found.get(dim.tobytes()) if key in trace.met else None for dim in dims]
        fixed = [position[dim].all() for dim in dims]
        slices[key] = tuple(None if fixed[number] else part for number, part in enumerate(parts))
        constants |= {(key, number): part for number, part in enumerate(parts) if part and fixed[number]}
    attentions = _attentions(trace, group, rank, groups)
    multiplied = {int(number) for some in trace.multiplied for number in np.unique(group[find(some).numpy()])} - {-1}
    return ModelGroups(
        groups, slices, constants, frozenset(roots) - trace.met, attentions, frozenset(multiplied), trace.sums
    )


def _attentions(trace, group, rank, groups):
    """As of ``ModelGroups``, of the attentions whose heads are blocks of both groups."""
    found = []
    ranges = [(key, int(dim[0]), int(dim[-1])) for key, dims in trace.dims.items() for dim in dims if len(dim)]
    for *matrices, keys in trace.attentions:
        sides = []
        for matrix in matrices:
            rows = np.unique(trace.labels.find(matrix).numpy(), axis=0)
            number = int(group[rows[0, 0]])
            whole = number >= 0 and (group[rows] == number).all()
            length, by_rows = _block_length(rank[rows], groups[number].size) if whole else (None, False)
            if by_rows and length * len(rows) == groups[number].size:
                sides.append((number, len(rows)))
        if len(sides) == 2 and sides[0][1] == sides[1][1]:
            (queries, heads), (values, _) = sides
            given = [_tensors_with(ranges, queries_or_keys) for queries_or_keys in (matrices[0], keys)]
            found.append((queries, values, heads, given[1] - given[0]))
    return list(dict.fromkeys(found))


def _tensors_with(ranges, labels):
    """Keys of the tensors that some labels, not their classes, come from.

    Args:
        ranges: [(key, first label, last label)] of each dimension; its labels are consecutive.
    """
    low, high = int(labels.min()), int(labels.max())
    return frozenset(key for key, first, last in ranges if first <= low and high <= last)


def _sort(dims, position):
    """Sort labels into groups: (labels of each group in order, each label's group or -1, its place in the group)."""
    repeated = Counter(dim.tobytes() for dim in dims)
    vectors = {content: np.frombuffer(content, np.int64) for content in repeated}
    random = np.random.Generator(np.random.PCG64(0))
    signature = np.zeros(len(position), np.uint64)  # of a label: a random number for each time it is in a dimension
    for content, times in repeated.items():
        labels, counts = np.unique(vectors[content], return_counts=True)
        number = random.integers(2**62, size=times, dtype=np.uint64).sum()
        signature[labels] += number * counts.astype(np.uint64)
    signature[position] ^= np.uint64(1 << 63)  # positions and neurons are never of one group
    group, rank, members = np.full(len(position), -1), np.full(len(position), -1), []
    for vector in vectors.values():
        labels, first = np.unique(vector, return_index=True)
        labels = labels[np.argsort(first)]
        labels = labels[group[labels] < 0]
        for sign in np.unique(signature[labels]):
            some = labels[signature[labels] == sign]
            group[some], rank[some] = len(members), np.arange(len(some))
            members.append(some)
    return members, group, rank


def _join_branches(trace, constraint, members, group):
    """Join the branches over which a sum runs with the sum itself, if each is one whole group; True if that is new."""
    if constraint.labels is None:
        return False
    joined = False
    matrix = trace.labels.find(constraint.matrix).numpy()
    for column in np.unique(matrix, axis=1).T:
        number = group[column[0]]
        alone = number >= 0 and (group[column] == number).all()
        if alone and len(column) == len(members[number]) == len(np.unique(column)):  # all of the group, each once
            labels, branch = constraint.labels, torch.from_numpy(column)
            if not torch.equal(trace.labels.find(labels), branch):
                trace.labels.join(labels, branch)
                joined = True
    return joined


def _slices(dim, group, rank, groups):
    """The slices of a dimension, in the order of their first index."""
    order = np.argsort(dim, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(dim[order]) > 0])
    nth = np.empty(len(dim), np.int64)  # how often a label came before: queries and keys are the same neurons
    nth[order] = np.arange(len(dim)) - np.repeat(starts, np.diff(np.r_[starts, len(dim)]))
    which = np.stack([group[dim], nth])
    kinds, first, inverse = np.unique(which, axis=1, return_index=True, return_inverse=True)
    found = []
    for kind in np.argsort(first):
        indices = np.flatnonzero(inverse.reshape(-1) == kind)
        number = int(kinds[0, kind])
        places = indices[np.argsort(rank[dim[indices]])]
        found.append(GroupSlice(number, places.reshape(groups[number].block_shape)))
    return tuple(found)


@dataclass
class _Blocks:
    """Lengths of a group's blocks; of ``as_many`` a student must have as many blocks, of ``as_long`` blocks as long."""

    lengths: set = field(default_factory=set)
    as_many: set = field(default_factory=set)
    as_long: set = field(default_factory=set)
    crossing: bool = False


def _blocks(trace, sizes, group, rank, position):
    """A ``_Blocks`` for each group."""
    found = [_Blocks() for _ in sizes]
    for constraint in trace.constraints:
        fixed = constraint.labels is None
        matrix = trace.labels.find(constraint.matrix).numpy()
        if constraint.labels is not None:
            roots = trace.labels.find(constraint.labels).numpy()
            if (matrix == roots[:, None]).all():
                continue  # they are these neurons themselves, as of a key that all queries share
            fixed = bool(position[roots].any())
            if not (constraint.always or fixed or (group[roots] >= 0).any()):
                continue  # no parameter has a number for each of these heads
        for number in np.unique(group[matrix]).tolist():
            if number < 0:
                continue
            inside = group[matrix] == number
            rows = matrix[inside.any(axis=1)]
            rows = rows[:, (group[rows] == number).all(axis=0)]
            length, by_rows = _block_length(rank[rows], sizes[number])
            if length is None:
                found[number].crossing = True
            elif 1 < length < sizes[number] or (fixed and (length == 1 or not by_rows)):  # or a constant for each
                found[number].lengths.add(length)
                if fixed:
                    (found[number].as_many if by_rows else found[number].as_long).add(length)
    return found


def _block_length(ranks, size):
    """(length of the blocks that rows or columns of ranks make of a group, is it rows); (None, _) if neither."""
    rows = np.unique(np.unique(ranks, axis=0), axis=1)
    n, m = rows.shape
    if n * m == size:
        if (np.sort(rows, axis=1) == np.arange(size).reshape(n, m)).all():
            return m, True
        if (np.sort(rows, axis=0) == np.arange(size).reshape(m, n).T).all():
            return n, False
    return None, False


def _group(size, blocks, position, shared):
    """A group whose block shape follows from blocks inside blocks."""
    if position:
        return NeuronGroup((size,), (True,), False, shared)
    block_shape, fixed, inner = [], [], 1
    for length in sorted({*blocks.lengths, size}):
        if length % inner:
            return NeuronGroup((size,), (False,), True, shared)
        block_shape.append(length // inner)
        within, beyond = (cut >= length for cut in blocks.as_long), (cut < length for cut in blocks.as_many)
        fixed.append(any(within) or any(beyond))
        inner = length
    return NeuronGroup(tuple(reversed(block_shape)), tuple(reversed(fixed)), blocks.crossing, shared)


def aligned(large: np.ndarray, small: np.ndarray) -> tuple | None:
    """Indices of two groups with the same number of block sizes: neurons without blocks are one block.

    Returns:
        (large, small) of as many dimensions each, or None if the smaller does not fit into the larger.
    """
    if large.ndim == small.ndim:
        return large, small
    depth = max(large.ndim, small.ndim)
    if 1 not in (large.ndim, small.ndim):
        return None
    large, small = (i if i.ndim == depth else i.reshape(*[1] * (depth - 1), -1) for i in (large, small))
    return (large, small) if all(t >= s for t, s in zip(large.shape, small.shape, strict=True)) else None
