"""Sets of neurons: which indices of which dimensions are the same neurons, from the labels of a trace.

Two neurons are of one *space* when they appear in exactly the same dimensions of the same tensors: the features of a
residual stream, the hidden units of one MLP, the channels inside one attention head's query. A dimension is made of
*parts*, each of them one space: a fused projection has queries, keys and values; the input of a convolution over
concatenated features has one part for each. Inside a space, grouped convolutions, rotary embeddings and tables with a
number for each head ask that neurons stay together in blocks: its *factors* are (blocks, neurons in a block).
"""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import torch

from weight_selection.tracing.tracer import Traced


@dataclass(frozen=True)
class Space:
    """A set of neurons.

    Attributes:
        factors: sizes whose product is the number of neurons; more than one where they come in blocks.
        fixed: for each factor, whether a student must have as many: positions, constants such as rotary frequencies.
        tangled: blocks that cross each other.
    """

    factors: tuple
    fixed: tuple
    tangled: bool = False

    @property
    def size(self):
        return int(np.prod(self.factors))


@dataclass(frozen=True)
class Part:
    """A part of a dimension.

    Attributes:
        space: number of its space.
        indices: where its neurons are in the dimension, in the order of the space and the shape of its factors.
    """

    space: int
    indices: np.ndarray


@dataclass(frozen=True)
class Neurons:
    """The neurons of a model.

    Attributes:
        spaces: list of ``Space``.
        parts: {key: for each dimension its parts, or None for positions}.
        unused: keys of tensors that the forward pass does not use, of which nothing is known.
    """

    spaces: list
    parts: dict
    unused: frozenset


def find_neurons(traced: Traced) -> Neurons:
    """Sort the labels of a trace into spaces and parts."""
    find = traced.labels.find
    joined = 1
    while joined:
        roots = {key: [find(dim).numpy() for dim in dims] for key, dims in traced.dims.items()}
        position = np.zeros(traced.labels.count, bool)
        for some in traced.labels.positions:
            position[find(some).numpy()] = True
        members, space, rank = _sort([dim for dims in roots.values() for dim in dims], position)
        joined = sum(_join_branches(traced, link, members, space) for link in traced.links)
    blocks = _blocks(traced, [len(some) for some in members], space, rank, position)
    spaces = [_space(len(some), blocks[number], bool(position[some].all())) for number, some in enumerate(members)]
    known = {}
    parts = {}
    for key, dims in roots.items():
        for dim in dims:
            if dim.tobytes() not in known:
                known[dim.tobytes()] = None if position[dim].all() else _parts(dim, space, rank, spaces)
        parts[key] = tuple(known[dim.tobytes()] if key in traced.met else None for dim in dims)
    return Neurons(spaces, parts, frozenset(roots) - traced.met)


def _sort(dims, position):
    """Spaces: (labels of each, in their order; number of the space of each label or -1; place of each label in it)."""
    repeated = Counter(dim.tobytes() for dim in dims)
    vectors = {content: np.frombuffer(content, np.int64) for content in repeated}
    random = np.random.Generator(np.random.PCG64(0))
    signature = np.zeros(len(position), np.uint64)  # of a label: the sum of a random number for each dimension it is in
    for content, times in repeated.items():
        signature[np.unique(vectors[content])] += random.integers(2**62, size=times, dtype=np.uint64).sum()
    signature[position] ^= np.uint64(1 << 63)  # positions and neurons are never of one space
    space, rank, members = np.full(len(position), -1), np.full(len(position), -1), []
    for vector in vectors.values():
        labels, first = np.unique(vector, return_index=True)
        labels = labels[np.argsort(first)]
        labels = labels[space[labels] < 0]
        for sign in np.unique(signature[labels]):
            some = labels[signature[labels] == sign]
            space[some], rank[some] = len(members), np.arange(len(some))
            members.append(some)
    return members, space, rank


def _join_branches(traced, link, members, space):
    """Where a sum runs over branches of one space each, all of them and the sum are the same neurons; True if new."""
    if link.labels is None:
        return False
    joined = False
    matrix = traced.labels.find(link.matrix).numpy()
    for column in np.unique(matrix, axis=1).T:
        number = space[column[0]]
        alone = number >= 0 and (space[column] == number).all()
        if alone and len(column) == len(members[number]) == len(np.unique(column)):  # all of the space, once
            labels, branch = link.labels, torch.from_numpy(column)
            if not torch.equal(traced.labels.find(labels), branch):
                traced.labels.join(labels, branch)
                joined = True
    return joined


def _parts(dim, space, rank, spaces):
    """The parts of a dimension in the order of their first index."""
    order = np.argsort(dim, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(dim[order]) > 0])
    nth = np.empty(len(dim), np.int64)  # how often the label came before: queries and keys are the same neurons
    nth[order] = np.arange(len(dim)) - np.repeat(starts, np.diff(np.r_[starts, len(dim)]))
    which = np.stack([space[dim], nth])
    kinds, first, inverse = np.unique(which, axis=1, return_index=True, return_inverse=True)
    found = []
    for kind in np.argsort(first):
        indices = np.flatnonzero(inverse.reshape(-1) == kind)
        number = int(kinds[0, kind])
        places = indices[np.argsort(rank[dim[indices]])]
        found.append(Part(number, places.reshape(spaces[number].factors)))
    return tuple(found)


@dataclass
class _Blocks:
    """What links say of a space: {length of a block: (must the blocks be as many, must a block be as long)}."""

    lengths: dict = field(default_factory=dict)
    tangled: bool = False

    def add(self, length, many, long):
        old = self.lengths.get(length, (False, False))
        self.lengths[length] = old[0] or many, old[1] or long


def _blocks(traced, sizes, space, rank, position):
    """A ``_Blocks`` for each space."""
    found = [_Blocks() for _ in sizes]
    for link in traced.links:
        fixed = link.labels is None
        if link.labels is not None:
            roots = traced.labels.find(link.labels).numpy()
            fixed = bool(position[roots].any())
            if not (link.always or fixed or (space[roots] >= 0).any()):
                continue  # heads that meet nobody
        matrix = traced.labels.find(link.matrix).numpy()
        for number in np.unique(space[matrix]).tolist():
            if number < 0:
                continue
            inside = space[matrix] == number
            rows = matrix[inside.any(axis=1)]
            rows = rows[:, (space[rows] == number).all(axis=0)]
            length, outer = _block_length(rank[rows], sizes[number])
            if length is None:
                found[number].tangled = True
            elif 1 < length < sizes[number] or (length == 1 and fixed):
                found[number].add(length, fixed and outer, fixed and not outer)
            elif fixed and not outer:  # every neuron has its own constant
                found[number].add(length, False, True)
    return found


def _block_length(ranks, size):
    """(length of the blocks that rows or else columns of ranks make of a space, is it rows); (None, _) if neither."""
    rows = np.unique(np.unique(ranks, axis=0), axis=1)
    n, m = rows.shape
    if n * m == size:
        if (np.sort(rows, axis=1) == np.arange(size).reshape(n, m)).all():
            return m, True
        if (np.sort(rows, axis=0) == np.arange(size).reshape(m, n).T).all():
            return n, False
    return None, False


def _space(size, blocks, position):
    """A space of the factors that blocks inside blocks make."""
    lengths = sorted({*blocks.lengths, size})
    factors, fixed, inner = [], [], 1
    for length in lengths:
        if length % inner:
            return Space((size,), (position,), tangled=True)
        factors.append(length // inner)
        within = any(long for cut, (_, long) in blocks.lengths.items() if cut >= length)
        beyond = any(many for cut, (many, _) in blocks.lengths.items() if cut < length)
        fixed.append(position or within or beyond)
        inner = length
    return Space(tuple(reversed(factors)), tuple(reversed(fixed)), blocks.tangled)


class Matching:
    """Which of the teacher's spaces each of the student's is made from.

    Args:
        teacher, student: their neurons.
    """

    def __init__(self, teacher: Neurons, student: Neurons):
        self.teacher, self.student = teacher, student
        self.spaces = {}

    def parts(self, source: str, key: str, dim: int) -> list:
        """[(teacher's part, student's part)] of a dimension, or a string that says why there are none.

        Args:
            source, key: of the teacher's and the student's tensor.
            dim: number of the dimension.
        """
        ours, theirs = self.student.parts[key][dim], self.teacher.parts[source][dim]
        if ours is None or theirs is None or len(ours) != len(theirs):
            return f"made of {_count(theirs)} in the teacher, of {_count(ours)} in the student"
        pairs = []
        for their, our in zip(theirs, ours, strict=True):
            large, small = self.teacher.spaces[their.space], self.student.spaces[our.space]
            first = self.teacher.spaces[self.spaces.setdefault(our.space, their.space)]
            if first.factors != large.factors:  # the same sizes keep the same neurons, where a plain stack lost layers
                return f"elsewhere in the student these neurons come from {_words(first)}, here from {_words(large)}"
            indices = [their.indices, our.indices]
            indices = aligned(*indices)
            if indices is None:
                return f"{_words(large)} in the teacher, {_words(small)} in the student"
            pairs.append(tuple(indices) + ((large, small),))
        return pairs


def aligned(large: np.ndarray, small: np.ndarray) -> tuple | None:
    """Indices with as many dimensions each: neurons in no blocks are one block; None if that does not fit."""
    if large.ndim == small.ndim:
        return large, small
    depth = max(large.ndim, small.ndim)
    if 1 not in (large.ndim, small.ndim):
        return None
    large, small = (i if i.ndim == depth else i.reshape(*[1] * (depth - 1), -1) for i in (large, small))
    return (large, small) if all(t >= s for t, s in zip(large.shape, small.shape, strict=True)) else None


def _count(parts):
    return "positions" if parts is None else f"{len(parts)} part{'s' * (len(parts) > 1)}"


def _words(space):
    return "blocks of " + "x".join(map(str, space.factors)) if len(space.factors) > 1 else f"{space.size} neurons"
