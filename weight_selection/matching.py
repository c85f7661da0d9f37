"""Matching: which of the teacher's neuron groups each of the student's comes from, and which neurons it keeps."""

from dataclasses import dataclass, field

import numpy as np

from weight_selection.errors import InputError
from weight_selection.options import CONSISTENT, SelectionOptions
from weight_selection.rules import kept_indices
from weight_selection.tracing.groups import ModelGroups, NeuronGroup, aligned


@dataclass(frozen=True)
class SlicePair:
    """A slice of a student's dimension and the teacher's slice that it comes from.

    Attributes:
        group, teacher_group: numbers of the neuron groups.
        teacher, student: indices along the dimension, int64, of the group's block shape in each model.
    """

    group: int
    teacher_group: int
    teacher: np.ndarray
    student: np.ndarray


@dataclass
class PlannedGroup:
    """One neuron group of the student, and the neurons of the teacher's group that it keeps.

    Attributes:
        teacher, student: the two groups.
        kept: (neurons of the student,) places in the teacher's group, int64; None if the rule chooses per tensor.
        keys: the student's tensors that hold the group, in order.
    """

    teacher: NeuronGroup
    student: NeuronGroup
    kept: np.ndarray | None
    keys: list = field(default_factory=list)


class Matching:
    """Finds the teacher's group of each of the student's groups, and the neurons that are kept of it.

    Attributes:
        groups: {number of the student's group: ``PlannedGroup``}, of all that has been compared so far.
        teacher_groups: {number of the student's group: number of the teacher's group that it comes from}, of the same.
    """

    def __init__(self, teacher: ModelGroups, student: ModelGroups, options: SelectionOptions):
        self.teacher, self.student, self.options = teacher, student, options
        self.groups, self.teacher_groups = {}, {}

    def pairs(self, key: str, teacher_key: str, dim: int, t: int, s: int) -> list:
        """The ``SlicePair`` of a dimension, which has size ``t`` in the teacher and ``s`` in the student.

        Raises:
            InputError: the teacher has fewer of some neurons, or they are built in another way.
        """
        where = f"{key}, dimension {dim}: teacher's size {t}"
        ours, theirs = self.student.slices_of(key, dim), self.teacher.slices_of(teacher_key, dim)
        if len(ours) != len(theirs):
            theirs = self._of_chosen_layers(ours, self._of_chosen_queries(ours, theirs))
        if len(ours) != len(theirs):
            sizes = f"made of {_parts(theirs)} in the teacher, of {_parts(ours)} in the student"
            raise _refusal(where, t, s, sizes + self._key_heads())
        pairs = []
        for their, our in zip(theirs, ours, strict=True):
            large, small = self.teacher.groups[their.group], self.student.groups[our.group]
            first = self.groups[our.group].teacher if our.group in self.groups else large
            if first.block_shape != large.block_shape:  # groups of equal sizes keep the same neurons
                origins = f"these neurons come from {_words(first)}, here from {_words(large)}"
                raise _refusal(where, t, s, f"elsewhere in the student {origins}")
            indices = aligned(their.indices, our.indices)
            if indices is None:
                sizes = f"{_words(large)} in the teacher, {_words(small)} in the student"
                raise _refusal(where, t, s, sizes + self._key_heads())
            pairs.append(SlicePair(our.group, their.group, *indices))
        for pair in pairs:
            large, small = self.teacher.groups[pair.teacher_group], self.student.groups[pair.group]
            _check_blocks(pair, large, small, where, t, s, self._key_heads())
            if pair.group not in self.groups:
                kept = self._kept(pair.teacher.shape, pair.student.shape)
                self.groups[pair.group] = PlannedGroup(large, small, kept)
                self.teacher_groups[pair.group] = pair.teacher_group
            keys = self.groups[pair.group].keys
            if key not in keys[-1:]:
                keys.append(key)
        return pairs

    def heads(self) -> list:
        """As of ``Plan``, of the groups that have been compared."""
        theirs, ours = (
            {group: heads for *groups, heads, _ in model.attentions for group in groups}
            for model in (self.teacher, self.student)
        )
        found = []
        for number in ours.keys() & self.groups.keys():
            large, small = self.groups[number].teacher, self.groups[number].student
            t, s = theirs.get(self.teacher_groups[number]), ours[number]
            if t and len(large.block_shape) == len(small.block_shape) == 1:
                found.append((t, large.size // t, s, small.size // s))
        return list(dict.fromkeys(found))

    def _key_heads(self):
        """What to do about a student that is built in another way, if several of its queries share a key."""
        if not any(group.shared for group in self.student.groups):
            return ""
        return (
            "; give the student as many queries for each key as the teacher has, or fewer if these have a tensor of "
            "their own (--student_kwargs num_key_value_heads=N)"
        )

    def _of_chosen_layers(self, ours, theirs):
        """The teacher's slices that the student's come from, if layers with features of their own were dropped.

        A dense block concatenates what its layers give: where it is taken in, each layer has a slice.
        """
        numbers = [self.teacher_groups.get(our.group) for our in ours]
        slices = {their.group: their for their in theirs}
        distinct = len(set(numbers)) == len(ours) and len(slices) == len(theirs)
        if self.options.projects or not distinct or not slices.keys() >= set(numbers):
            return theirs
        return tuple(slices[number] for number in numbers)

    def _of_chosen_queries(self, ours, theirs):
        """The teacher's slices of as many queries for each key as the student has.

        Slices of one query stand together: two of a group, if rotary embeddings turn its neurons in pairs.
        """
        groups = [list(dict.fromkeys(part.group for part in parts)) for parts in (ours, theirs)]
        if len(groups[0]) != len(groups[1]):
            return theirs
        chosen = {}  # {number of the student's group: the slices that it comes from}
        for our, their in zip(*groups, strict=True):
            parts, count = [part for part in theirs if part.group == their], sum(part.group == our for part in ours)
            kept = self._kept_slices(our, their, len(parts), count)
            if kept is None:
                return theirs
            chosen[our] = iter([parts[place] for place in kept])
        return tuple(next(chosen[part.group]) for part in ours)

    def _kept_slices(self, our, their, many, few):
        """Which of ``many`` slices of a teacher's group ``few`` of a student's group come from; None if none do."""
        if many == few:
            return range(many)
        each = self.teacher.fewest_slices(their)
        fits = many > few and few % each == 0 and each == self.student.fewest_slices(our)
        if not fits or not self.teacher.groups[their].shared:
            return None
        rule = self.options.element_selection if self.options.element_selection in CONSISTENT else "uniform"
        queries = kept_indices(rule, many // each, few // each, self.options.seed).tolist()
        return [query * each + place for query in queries for place in range(each)]

    def _kept(self, large, small):
        """Places in the teacher's group: for each block size the rule's indices, and all their combinations."""
        if self.options.element_selection not in CONSISTENT:
            return None
        rule, seed = self.options.element_selection, self.options.seed
        kept = [kept_indices(rule, t, s, seed).numpy() for t, s in zip(large, small, strict=True)]
        return np.ravel_multi_index(np.ix_(*kept), large).reshape(-1)


def _check_blocks(pair, large, small, where, t, s, remedy):
    """Refuse a student that has more of some neurons, or fewer where their number is fixed."""
    theirs, ours = pair.teacher, pair.student
    if theirs.shape == ours.shape:
        return
    if theirs.size < ours.size:
        sizes = f"a part of it has {theirs.size} neurons in the teacher, {ours.size} in the student"
        raise _refusal(where, t, s, f"{sizes}; a teacher must be at least as wide{remedy}")
    if small.crossing_blocks or large.crossing_blocks:
        raise InputError(
            f"{where}, student's {s}: its neurons come in blocks that cross each other; give both the same size"
        )
    for number, (n, m) in enumerate(zip(theirs.shape, ours.shape, strict=True)):
        sizes = f"{where} = {shape_words(theirs.shape)}, student's {s} = {shape_words(ours.shape)}"
        if n < m:
            raise InputError(f"{sizes}: a teacher must be at least as large in both")
        if n != m and len(large.fixed) == theirs.ndim and large.fixed[number]:
            if theirs.ndim == 1:
                reason = (
                    "the forward pass combines these with numbers that are no weights, such as sinusoids of positions; "
                    "keep these in a persistent buffer (register_buffer), which is selected too, or give the student "
                    "the teacher's size"
                )
                raise _refusal(where, t, s, reason)
            raise InputError(
                f"{sizes}: {n} and {m} are positions, constants or image channels, not neurons, and must be the same"
            )


def _refusal(where, t, s, reason):
    """The error for a dimension that cannot be matched; if the student is wider, there is no need of a reason."""
    wider = f"{where} < student's {s}: a teacher must be at least as wide"
    return InputError(wider if t < s else f"{where}, student's {s}: {reason}")


def shape_words(shape: tuple) -> str:
    """A shape in words: 6x64."""
    return "x".join(map(str, shape))


def _parts(slices):
    return f"{len(slices)} part{'s' * (len(slices) > 1)}"


def _words(group):
    return f"blocks of {shape_words(group.block_shape)}" if len(group.block_shape) > 1 else f"{group.size} neurons"
