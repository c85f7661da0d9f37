"""The down map Q of every neuron group: how the student's neurons are made from the teacher's."""

from collections.abc import Collection

import numpy as np
import torch
from torch import Tensor

from weight_selection.errors import InputError
from weight_selection.projection import equations
from weight_selection.projection.activation_stats import ActivationStats
from weight_selection.projection.symmetries import GREEDY, ROTATED, STRONGEST, Attention
from weight_selection.projection.traced_model import TracedModel, paired_groups
from weight_selection.rules import select_elements
from weight_selection.tracing.groups import aligned


class DownMaps:
    """For each of the student's groups Q, (d, D), or the indices of the teacher's neurons that it keeps, (d,).

    Attributes:
        of: {number of the student's group: Q}. Queries and keys are one group with two: {(number, 0 or 1): Q}.
        rotated: numbers of the student's groups that are rotated.
    """

    def __init__(self):
        self.of, self.rotated = {}, set()

    def get(self, group: int, nth: int) -> Tensor:
        """Q of the ``nth`` slice of a group in a tensor."""
        return self.of[group] if group in self.of else self.of[group, nth]


def choose_down_maps(entries: dict, student: TracedModel, stats: ActivationStats, rotate: bool) -> DownMaps:
    """Choose the down maps of all groups, each as ``Symmetries.treatment`` says.

    Args:
        entries: {student's key: its entry of the plan}.
        student: only its structure is used.
        stats: of the teacher.
        rotate: whether streams are rotated.

    Raises:
        InputError: the student's heads are larger than the teacher's.
    """
    teacher, maps = stats.teacher, DownMaps()
    for ours in student.symmetries.attentions.values():
        theirs = _attention_behind(ours, entries, teacher)
        if theirs is not None and {theirs.queries[0], theirs.keys[0], theirs.out} <= stats.moments.keys():
            _map_heads(maps, theirs, ours, student, stats)
    for our, their in paired_groups(entries).items():
        if our in maps.of or (our, 0) in maps.of:
            continue
        treatment, count = teacher.symmetries.treatment(their, rotate), student.size(our)
        seen = any(key in stats.moments for key in teacher.symmetries.takers(their))
        if teacher.size(their) == count:
            maps.of[our] = torch.arange(count, device=teacher.device)
        elif seen and treatment in (ROTATED, GREEDY):
            maps.of[our] = equations.greedy(*_covariance_and_weight(their, stats), count)
            if treatment == ROTATED:
                centred = teacher.symmetries.centred(their)
                maps.of[our] = equations.rotation(_normalised(their, stats), maps.of[our], centred)
                maps.rotated.add(our)
        elif seen and treatment == STRONGEST:
            maps.of[our] = _strongest(their, count, stats)
        else:  # UNIFORM; or no layer that takes these neurons was seen: it did not run, or its weight is computed
            maps.of[our] = _uniform(teacher, their, student, our)
    return maps


def random_down_maps(model: TracedModel, groups: Collection, streams: list, attentions: list) -> DownMaps:
    """Down maps from a model to itself. They rotate some streams and mix some heads at random, and keep the rest.

    Args:
        groups: numbers of all its groups.
        streams: numbers of those to rotate.
        attentions: those whose heads to mix.
    """
    generator = torch.Generator().manual_seed(0)
    maps = DownMaps()
    maps.of = {group: torch.arange(model.size(group), device=model.device) for group in groups}
    for group in streams:
        rotation = equations.random_rotation(model.size(group), generator, model.symmetries.centred(group))
        maps.of[group] = rotation.to(model.device)
        maps.rotated.add(group)
    for attention in attentions:
        for group in (attention.query_group, attention.value_group):
            width = model.size(group) // attention.heads
            stretch = torch.linspace(0.7, 1.4, width, dtype=torch.float64)[:, None]
            drawn = torch.randn(attention.heads, width, width, dtype=torch.float64, generator=generator)
            turns = torch.linalg.qr(drawn).Q
            one, other = (torch.block_diag(*(t * by for t in turns)).to(model.device) for by in (stretch, 1 / stretch))
            if group == attention.query_group:  # keys undo what stretches queries
                del maps.of[group]
                maps.of[group, 0], maps.of[group, 1] = one, other
            else:
                maps.of[group] = one
    return maps


# ---------------------------------------------------------------------------------------------------------
# Streams and hidden units


def _covariance_and_weight(group, stats):
    """Covariance of a stream's neurons and G of (3); every layer that takes them counts alike."""
    covariance = weight = 0.0
    for keys in _takers(group, stats):
        whole, outgoing = stats.moments[keys[0]].covariance, torch.cat([stats.outgoing(key) for key in keys], dim=1)
        for number, _, indices in stats.teacher.inputs(keys[0]):
            if number == group:
                covariance = covariance + equations.share(whole[indices][:, indices])
                weight = weight + equations.share(outgoing[indices] @ outgoing[indices].T)
    return covariance, weight


def _takers(group, stats):
    """Lists of keys of the dense layers that took a group. Layers of one attention with the same input share a list."""
    symmetries, found = stats.teacher.symmetries, {}
    for key in symmetries.takers(group):
        if key not in stats.moments:
            continue  # the layer did not run
        place = key
        for attention in symmetries.attentions.values():
            parts = {attention.queries[0], attention.keys[0], attention.values[0]}
            if key in parts and len({getattr(stats.moments.get(part), "count", None) for part in parts}) == 1:
                place = attention.name
        found.setdefault(place, []).append(key)
    return found.values()


def _normalised(group, stats):
    """C of (2): the mean of E[n n'] over the norms of a stream."""
    norms = stats.teacher.symmetries.norms(group)
    return sum(equations.share(stats.normalised[key].mean[:-1, :-1]) for key in norms)


def _strongest(group, count, stats):
    [key] = stats.teacher.symmetries.takers(group)
    indices = stats.teacher.input_indices(key, group)
    outgoing = stats.outgoing(key)[indices].square().sum(1)
    units = torch.arange(len(indices), device=indices.device)[:, None]
    return equations.strongest(stats.moments[key].variance[indices], outgoing, units, count)


def _uniform(teacher, their, student, our):
    """The neurons that plain selection keeps; where they come in blocks, blocks and neurons inside each."""
    shapes = teacher.block_shape(their), student.block_shape(our)
    large, small = aligned(*(np.arange(np.prod(shape)).reshape(shape) for shape in shapes))
    return select_elements("uniform", torch.from_numpy(large), small.shape).reshape(-1).to(teacher.device)


# ---------------------------------------------------------------------------------------------------------
# Heads


def check_heads(entries: dict, teacher: TracedModel, student: TracedModel) -> None:
    """Raise InputError if a student's heads are larger than the teacher's. No weights are needed.

    Args:
        entries: {student's key: its entry of the plan}, of the selected tensors.
    """
    for ours in student.symmetries.attentions.values():
        theirs = _attention_behind(ours, entries, teacher)
        if theirs is not None:
            _head_sizes(theirs, ours, teacher, student)


def _attention_behind(ours: Attention, entries, teacher):
    """The teacher's attention that one of the student's is made from; None if its heads may not be mixed."""
    teacher_key = entries[ours.queries[0]].teacher_key if ours.queries[0] in entries else None
    return next((theirs for theirs in teacher.symmetries.attentions.values() if theirs.queries[0] == teacher_key), None)


def _head_sizes(theirs, ours, teacher, student):
    """(teacher's, student's) dimensions of a head's queries and keys, and the same of its values."""
    sizes = [
        (teacher.size(their) // theirs.heads, student.size(our) // ours.heads)
        for their, our in ((theirs.query_group, ours.query_group), (theirs.value_group, ours.value_group))
    ]
    for large, small in sizes:
        if large != small and not theirs.free:
            raise InputError(
                f"{ours.name}: the teacher's heads have {large} dimensions, the student's {small}: rotary embeddings "
                "or norms of queries and keys fix their size; give the student as large heads (--student_kwargs "
                "num_heads=N), or select by another rule"
            )
        if large < small:
            raise InputError(
                f"{ours.name}: the teacher's heads have {large} dimensions, the student's {small}: heads cannot be "
                "merged; give the student more heads (--student_kwargs num_heads=N), or select by another rule"
            )
    return sizes


def _map_heads(maps, theirs, ours, student, stats):
    """Set the down maps of the queries, keys and values of one attention, by (5) and (6)."""
    (large, small), (wide, narrow) = _head_sizes(theirs, ours, stats.teacher, student)
    indices = stats.teacher.input_indices(theirs.out, theirs.value_group)
    context = stats.moments[theirs.out].covariance[indices][:, indices]
    out = stats.outgoing(theirs.out)[indices].T
    heads = torch.arange(theirs.heads * wide, device=out.device).view(theirs.heads, wide)
    origins = _head_origins(theirs.heads, ours.heads, context.diagonal(), out.square().sum(0), heads)
    kept = torch.tensor([head for head, _ in origins], device=out.device)
    for group in ours.per_head:
        maps.of[group] = kept
    if not theirs.free:
        for group, size in ((ours.query_group, large), (ours.value_group, wide)):
            maps.of[group] = (kept[:, None] * size + torch.arange(size, device=out.device)).flatten()
        return
    queries, keys = _output_moments(*theirs.queries, False, stats), _output_moments(*theirs.keys, True, stats)
    q, k = (out.new_zeros(ours.heads * small, theirs.heads * large) for _ in range(2))
    v = out.new_zeros(ours.heads * narrow, theirs.heads * wide)
    for number, (head, nth) in enumerate(origins):
        there, here = slice(head * large, (head + 1) * large), slice(number * small, (number + 1) * small)
        q[here, there], k[here, there] = equations.shared_products(queries[there, there], keys[there, there], small)
        there, here = slice(head * wide, (head + 1) * wide), slice(number * narrow, (number + 1) * narrow)
        rows = (nth * narrow + torch.arange(narrow, device=out.device)) % wide
        v[here, there] = equations.values(context[there, there], out[:, there], narrow)[rows]
    maps.of[ours.query_group, 0], maps.of[ours.query_group, 1], maps.of[ours.value_group] = q, k, v


def _output_moments(key, number, centred, stats):
    """Second moments of a slice of a dense layer's output (``centred``: its covariance), from those of its input."""
    symmetries, weights = stats.teacher.symmetries, stats.teacher.model.state_dict()
    rows = stats.teacher.outputs(key)[number][2]
    weight, moments = symmetries.by_outputs(key, weights[key]).double().flatten(1)[rows], stats.moments[key]
    if centred:
        return weight @ moments.covariance @ weight.T
    bias = weight.new_zeros(symmetries.by_outputs(key, weights[key]).shape[0])
    for name, outputs in symmetries.biases(key).items():
        bias[outputs] = weights[name].double()
    weight = torch.cat([weight, bias[rows, None]], dim=1)
    return weight @ moments.mean @ weight.T


def _head_origins(large, small, variance, outgoing, heads):
    """[(teacher's head, how many heads of the student come from it already)] for each of the student's heads.

    A student with fewer heads keeps those that give the stream most. With more heads, several share the values of one.
    """
    times, rest = divmod(small, large)
    strongest = equations.strongest(variance, outgoing, heads, rest).tolist()
    counts = [times + (head in strongest) for head in range(large)]
    return [(head, nth) for head, count in enumerate(counts) for nth in range(count)]
