"""The write Q of every set of neurons: which combinations of the teacher's become the student's."""

import numpy as np
import torch
from torch import Tensor

from weight_selection.errors import InputError
from weight_selection.projection import equations
from weight_selection.projection.activation_stats import Side, Survey
from weight_selection.projection.symmetries import GREEDY, ROTATED, STRONGEST, Attention
from weight_selection.rules import select_elements
from weight_selection.tracing.groups import aligned


class Writes:
    """Of each of a student's spaces, Q, (d, D), or the indices of the teacher's neurons that it keeps, (d,).

    Attributes:
        of: {number of the student's space: Q}; of queries and keys, which are of one space, {(number, 0 or 1): Q}.
        rotated: the numbers of the spaces that are rotated.
    """

    def __init__(self):
        self.of, self.rotated = {}, set()

    def get(self, space: int, nth: int) -> Tensor:
        """Q of the ``nth`` part of a space in a tensor."""
        return self.of[space] if space in self.of else self.of[space, nth]


def choose_writes(entries: dict, pairs: dict, teacher: Side, student: Side, survey: Survey, rotate: bool) -> Writes:
    """Choose the writes of all spaces, each as ``Structure.role`` says.

    Args:
        entries: {student's key: its entry of the plan}.
        pairs: {number of a student's space: number of the teacher's that it is made from}.
        survey: of the teacher.
        rotate: whether streams are rotated.

    Raises:
        InputError: the student's heads are larger than the teacher's.
    """
    writes = Writes()
    for ours in student.structure.attentions.values():
        theirs = _attention_behind(ours, entries, teacher)
        if theirs is not None and {theirs.queries[0], theirs.keys[0], theirs.out} <= survey.moments.keys():
            _refactor(writes, theirs, ours, teacher, student, survey)
    for our, their in pairs.items():
        if our in writes.of or (our, 0) in writes.of:
            continue
        role, count = teacher.structure.role(their, rotate), student.size(our)
        seen = any(key in survey.moments for key in teacher.structure.readers(their))
        if teacher.size(their) == count:
            writes.of[our] = torch.arange(count, device=teacher.device)
        elif seen and role in (ROTATED, GREEDY):
            writes.of[our] = equations.greedy(*_read(their, teacher, survey), count)
            if role == ROTATED:
                writes.of[our] = equations.rotation(_normalised(their, teacher, survey), writes.of[our])
                writes.rotated.add(our)
        elif seen and role == STRONGEST:
            writes.of[our] = _strongest(their, count, teacher, survey)
        else:  # also of weights that the model computes from others, and layers that did not run
            writes.of[our] = _uniform(teacher, their, student, our)
    return writes


def mixed_writes(spaces, streams: list, attentions: list, model: Side) -> Writes:
    """Writes of all of a model's neurons onto as many: streams rotated and heads mixed at random, all else as it is."""
    generator = torch.Generator().manual_seed(0)
    writes = Writes()
    writes.of = {space: torch.arange(model.size(space), device=model.device) for space in spaces}
    for space in streams:
        writes.of[space] = equations.random_rotation(model.size(space), generator).to(model.device)
        writes.rotated.add(space)
    for attention in attentions:
        for space in (attention.shared, attention.valued):
            width = model.size(space) // attention.heads
            stretch = torch.linspace(0.7, 1.4, width, dtype=torch.float64)[:, None]
            drawn = torch.randn(attention.heads, width, width, dtype=torch.float64, generator=generator)
            turns = torch.linalg.qr(drawn).Q
            one, other = (torch.block_diag(*(t * by for t in turns)).to(model.device) for by in (stretch, 1 / stretch))
            if space == attention.shared:
                del writes.of[space]
                writes.of[space, 0], writes.of[space, 1] = one, other
            else:
                writes.of[space] = one
    return writes


# ---------------------------------------------------------------------------------------------------------
# Streams and hidden units


def _read(space, teacher, survey):
    """Covariance and readers' weights of a stream; every reader counts alike."""
    covariance = weight = 0.0
    for key in teacher.structure.readers(space):
        if key not in survey.moments:
            continue  # a layer that did not run
        whole, seen = survey.moments[key].covariance, _seen(key, teacher, survey)
        for number, _, indices in teacher.parts(key, 1):
            if number == space:
                covariance = covariance + equations.share(whole[indices][:, indices])
                weight = weight + equations.share(seen[indices] @ seen[indices].T)
    return covariance, weight


def _normalised(space, teacher, survey):
    """C of a rotation: the mean of E[n n'] over norms."""
    return sum(equations.share(survey.normalised[key].mean[:-1, :-1]) for key in teacher.structure.norms(space))


def _seen(key, teacher, survey):
    """What a dense layer does with each of its inputs, float64 (inputs, rest)."""
    weights = teacher.model.state_dict()
    weight = weights[key].double()
    for scale, scaled in survey.scaled.items():
        if scaled == key:
            weight = weight * weights[scale].double().view(-1, *[1] * (weight.ndim - 1))
    return weight.transpose(0, 1).flatten(1)


def _strongest(space, count, teacher, survey):
    [key] = teacher.structure.readers(space)
    indices = next(indices for number, _, indices in teacher.parts(key, 1) if number == space)
    outgoing = _seen(key, teacher, survey)[indices].square().sum(1)
    units = torch.arange(len(indices), device=indices.device)[:, None]
    return equations.strongest(survey.moments[key].variance[indices], outgoing, units, count)


def _uniform(teacher, their, student, our):
    """As plain selection keeps neurons, in blocks where they come in blocks."""
    spaces = teacher.anatomy.neurons.spaces[their], student.anatomy.neurons.spaces[our]
    large, small = aligned(*(np.arange(space.size).reshape(space.factors) for space in spaces))
    return select_elements("uniform", torch.from_numpy(large), small.shape).reshape(-1).to(teacher.device)


# ---------------------------------------------------------------------------------------------------------
# Heads


def _attention_behind(ours: Attention, entries, teacher):
    """The teacher's attention that one of the student's is made from, if its heads are free too."""
    source = entries[ours.queries[0]].source if ours.queries[0] in entries else None
    return next((theirs for theirs in teacher.structure.attentions.values() if theirs.queries[0] == source), None)


def _refactor(writes, theirs, ours, teacher, student, survey):
    """Writes of the queries, keys and values of one attention."""
    (large, small), (wide, narrow) = _head_sizes(theirs, ours, teacher, student)
    queries = _of_inputs(*theirs.queries, False, teacher, survey)
    keys = _of_inputs(*theirs.keys, True, teacher, survey)
    indices = next(indices for space, _, indices in teacher.parts(theirs.out, 1) if space == theirs.valued)
    context = survey.moments[theirs.out].covariance[indices][:, indices]
    out = _seen(theirs.out, teacher, survey)[indices].T
    heads = torch.arange(theirs.heads * wide, device=out.device).view(theirs.heads, wide)
    copies = _copies(theirs.heads, ours.heads, context.diagonal(), out.square().sum(0), heads)
    q, k = (out.new_zeros(ours.heads * small, theirs.heads * large) for _ in range(2))
    v = out.new_zeros(ours.heads * narrow, theirs.heads * wide)
    for number, (head, nth) in enumerate(copies):
        there, here = slice(head * large, (head + 1) * large), slice(number * small, (number + 1) * small)
        q[here, there], k[here, there] = equations.shared_products(queries[there, there], keys[there, there], small)
        there, here = slice(head * wide, (head + 1) * wide), slice(number * narrow, (number + 1) * narrow)
        rows = (nth * narrow + torch.arange(narrow, device=out.device)) % wide
        v[here, there] = equations.values(context[there, there], out[:, there], narrow)[rows]
    writes.of[ours.shared, 0], writes.of[ours.shared, 1], writes.of[ours.valued] = q, k, v
    for space in ours.counted:
        writes.of[space] = torch.tensor([head for head, _ in copies], device=out.device)


def check_heads(entries: dict, teacher: Side, student: Side) -> None:
    """Raise InputError if a student's heads are larger than the teacher's; weights are not needed.

    Args:
        entries: {student's key: its entry of the plan}.
    """
    for ours in student.structure.attentions.values():
        theirs = _attention_behind(ours, entries, teacher)
        if theirs is not None:
            _head_sizes(theirs, ours, teacher, student)


def _head_sizes(theirs, ours, teacher, student):
    """((teacher's, student's) dimensions of a head's queries and keys, of its values)."""
    sizes = [
        (teacher.size(their) // theirs.heads, student.size(our) // ours.heads)
        for their, our in ((theirs.shared, ours.shared), (theirs.valued, ours.valued))
    ]
    for large, small in sizes:
        if large < small:
            raise InputError(
                f"{ours.name}: the teacher's heads have {large} dimensions, the student's {small}: heads cannot be "
                "merged; give the student more heads (--student_kwargs num_heads=N), or select by another rule"
            )
    return sizes


def _of_inputs(key, number, centred, teacher, survey):
    """Second moments of what a part of a dense layer gives, or their covariance, from those of what it takes."""
    rows, weights, moments = teacher.parts(key, 0)[number][2], teacher.model.state_dict(), survey.moments[key]
    weight = weights[key].double().flatten(1)[rows]
    if centred:
        return weight @ moments.covariance @ weight.T
    bias = weight.new_zeros(len(weights[key]))
    for name, some in teacher.structure.biases(key).items():
        bias[some] = weights[name].double()
    weight = torch.cat([weight, bias[rows, None]], dim=1)
    return weight @ moments.mean @ weight.T


def _copies(large, small, variance, outgoing, heads):
    """[(teacher's head, how many of the student's are made from it already)], in the order of the student's heads.

    Of fewer heads the student keeps those that give the stream most; more heads share the values of one.
    """
    times, rest = divmod(small, large)
    strongest = equations.strongest(variance, outgoing, heads, rest).tolist()
    counts = [times + (head in strongest) for head in range(large)]
    return [(head, nth) for head, count in enumerate(counts) for nth in range(count)]
