"""Sets of neurons: which indices of which dimensions are the same neurons, from the labels of a trace.

Two neurons are of one *space* when they appear in exactly the same dimensions of the same tensors: the features of a
residual stream, the hidden units of one MLP, the channels inside one attention head's query. A dimension is made of
*parts*, each of them one space: a fused projection has queries, keys and values; the input of a convolution over
concatenated features has one part for each. Inside a space, grouped convolutions, rotary embeddings and tables with a
number for each head ask that neurons stay together in blocks: its *factors* are (blocks, neurons in a block).
"""

from dataclasses import dataclass

import numpy as np

from selection.trace import Traced


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
    """

    spaces: list
    parts: dict


def find_neurons(traced: Traced) -> Neurons:
    """Sort the labels of a trace into spaces and parts."""
    labels = traced.labels
    count = labels.count
    roots = {key: [labels.find(dim).numpy() for dim in dims] for key, dims in traced.dims.items()}
    position = np.zeros(count, bool)
    for some in labels.positions:
        position[labels.find(some).numpy()] = True

    uses = {}  # {labels along a dimension: the dimensions that have them}
    for key, dims in roots.items():
        for number, dim in enumerate(dims):
            uses.setdefault(dim.tobytes(), []).append((key, number))
    random = np.random.Generator(np.random.PCG64(0))
    signature = np.zeros(count, np.uint64)  # of a label: the sum of a random number for each dimension that has it
    for vector, dims in uses.items():
        signature[np.unique(np.frombuffer(vector, np.int64))] += random.integers(
            2**63, size=len(dims), dtype=np.uint64
        ).sum()
    signature[position] ^= np.uint64(1 << 63)

    rank, members, number_of = np.full(count, -1), {}, {}
    for vector in uses:
        dim = np.frombuffer(vector, np.int64)
        unique, first = np.unique(dim, return_index=True)
        unique = unique[np.argsort(first)]
        fresh = unique[rank[unique] < 0]
        for sign in np.unique(signature[fresh]).tolist():
            same = fresh[signature[fresh] == sign]
            rank[same] = np.arange(len(same))
            members[len(members)] = same
            number_of[sign] = len(members) - 1
    cuts = _cuts(traced, members, rank, signature, number_of, position)
    spaces = [
        _space(len(same), *cuts.get(number, ({}, False)), bool(position[same[0]])) for number, same in members.items()
    ]
    parts = {
        vector: _parts(np.frombuffer(vector, np.int64), rank, signature, number_of, spaces, position) for vector in uses
    }
    return Neurons(
        spaces,
        {
            key: tuple(parts[dim.tobytes()] if key in traced.met else None for dim in dims)
            for key, dims in roots.items()
        },
    )


def _parts(dim, rank, signature, number_of, spaces, position):
    """The parts of a dimension in the order of their first index; None if it holds positions only."""
    if position[dim].all():
        return None
    order = np.argsort(dim, kind="stable")
    if (signature[dim] == signature[dim[0]]).all() and (np.diff(dim[order]) > 0).all():  # one part, as most have
        space = number_of[int(signature[dim[0]])]
        return (Part(space, np.argsort(rank[dim]).reshape(spaces[space].factors)),)
    starts = np.flatnonzero(np.r_[True, dim[order][1:] != dim[order][:-1]])
    occurrence = np.empty(len(dim), np.int64)
    occurrence[order] = np.arange(len(dim)) - np.repeat(starts, np.diff(np.r_[starts, len(dim)]))
    groups = {}
    for index, which in enumerate(zip(signature[dim].tolist(), occurrence.tolist(), strict=True)):
        groups.setdefault(which, []).append(index)
    found = []
    for (sign, _), indices in groups.items():
        space = number_of[sign]
        places = np.empty(len(indices), np.int64)
        places[rank[dim[indices]]] = indices
        found.append(Part(space, places.reshape(spaces[space].factors)))
    return tuple(found)


def _cuts(traced, members, rank, signature, number_of, position):
    """{space: ({length of a block: (are the blocks fixed, is what is inside them fixed)}, is it tangled)}."""
    found = {}
    for link in traced.links:
        outer_fixed = link.labels is None
        if link.labels is not None:
            roots = traced.labels.find(link.labels).numpy()
            outer_fixed = bool(position[roots].any())
            if not (link.always or outer_fixed or signature[roots].any()):
                continue
        matrix = traced.labels.find(link.matrix).numpy()
        for sign in np.unique(signature[matrix]).tolist():
            if sign not in number_of:
                continue
            space = number_of[sign]
            size = len(members[space])
            inside = signature[matrix] == sign
            rows = matrix[inside.any(axis=1)]
            rows = rows[:, (signature[rows] == sign).all(axis=0)]
            cuts, tangled = found.get(space, ({}, False))
            length = _block_length(rank[rows], size)
            if length is None:
                tangled = True
            elif length[0] not in (0, size):
                blocks, outer = length
                old = cuts.get(blocks, (False, False))
                cuts[blocks] = (old[0] or outer_fixed and outer, old[1] or outer_fixed and not outer)
            elif outer_fixed and length[0] == size and not length[1]:
                cuts[size] = (False, True)
            found[space] = (cuts, tangled)
    return found


def _block_length(ranks, size):
    """(length of the blocks that rows of ranks make of a space, whether rows are blocks); None if they are none."""
    if ranks.size == 0:
        return None
    rows = np.unique(ranks, axis=0)
    rows = np.unique(rows, axis=1)
    n, m = rows.shape
    if n * m != size:
        return None
    if (np.sort(rows.flatten()) != np.arange(size)).any():
        return None
    if (np.sort(rows, axis=1) == np.arange(size).reshape(n, m)).all():
        return m, True
    if (np.sort(rows, axis=0) == np.arange(size).reshape(m, n).T).all():
        return n, False
    return None


def _space(size, cuts, tangled, position):
    lengths = sorted(cuts)
    chain = [*lengths] if lengths and lengths[-1] == size else [*lengths, size]
    factors, fixed, inner = [], [], 1
    for length in chain:
        if length % inner:
            return Space((size,), (position,), True)
        factors.append(length // inner)
        within = any(cuts[cut][1] and cut >= length for cut in cuts)
        beyond = any(cuts[cut][0] and cut < length for cut in cuts)
        fixed.append(position or within or beyond)
        inner = length
    return Space(tuple(reversed(factors)), tuple(reversed(fixed)), tangled)


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
            if len(large.factors) != len(small.factors):
                indices = _aligned(*indices)
            if indices is None:
                return f"{_words(large)} in the teacher, {_words(small)} in the student"
            pairs.append(tuple(indices) + ((large, small),))
        return pairs


def _aligned(large, small):
    """Indices with as many dimensions each: neurons in no blocks are one block; None if that does not fit."""
    depth = max(large.ndim, small.ndim)
    if 1 not in (large.ndim, small.ndim):
        return None
    large, small = (i if i.ndim == depth else i.reshape(*[1] * (depth - 1), -1) for i in (large, small))
    return (large, small) if all(t >= s for t, s in zip(large.shape, small.shape, strict=True)) else None


def _count(parts):
    return "positions" if parts is None else f"{len(parts)} part{'s' * (len(parts) > 1)}"


def _words(space):
    return "blocks of " + "x".join(map(str, space.factors)) if len(space.factors) > 1 else f"{space.size} neurons"
