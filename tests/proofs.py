"""Proofs that a selection is consistent, for models of any library.

A student hidden in a larger teacher: the teacher computes what the student does, and selection gives the student back.
"""

from functools import cache

import numpy as np
import torch
import torch.nn as nn

from architectures import lively, models, reads
from helpers import assert_same
from traces import structure_of, trace_of
from weight_selection.apply import apply_plan
from weight_selection.modules import copy_of, run_forward
from weight_selection.options import SelectionOptions
from weight_selection.plan import plan_selection
from weight_selection.tied import tied_keys


def structures(teacher, student, inputs=None, student_inputs=None):
    """What plans need to know of both; ``inputs`` as of ``select_weights``."""
    theirs = structure_of(teacher, "teacher", inputs)
    return theirs, structure_of(student, "student", inputs if student_inputs is None else student_inputs)


@cache
def structures_of_pair(name):
    """Of a pair of ``architectures.MODELS``, traced once for all test files."""
    return structures(*models(name))


def plan_all(both, method):
    """The plan of two structures, classifier included."""
    return plan_selection(*both, SelectionOptions(classifier=(), element_selection=method))


def hidden(plan, teacher, student, chain=False, reads=reads):
    """A teacher's state_dict that computes what the student does.

    Layers that the plan drops are zero: a residual branch of zeros is the identity. Neurons that it drops are copies of
    those that it keeps, so that a normalisation sees the statistics of the student's, and nobody reads them.

    Args:
        chain: the layers are no residual branches; those that go are the identity.
        reads: (model, key) -> the dimension along which a tensor sums over neurons, or None.
    """
    state = {key: torch.zeros_like(value) for key, value in teacher.state_dict().items()}
    if chain:
        identity = {2: nn.init.eye_, 4: nn.init.dirac_}
        state = {key: identity.get(value.ndim, nn.Identity())(value) for key, value in state.items()}
    weights = student.state_dict()
    for entry in plan.selected.values():
        value = weights[entry.key]
        for dim, size in enumerate(entry.teacher_shape):
            pairs = entry.slices.get(dim)
            origin, alive = (np.arange(size), np.ones(size, bool)) if pairs is None else np.zeros((2, size), int)
            for pair in pairs or ():
                theirs, ours = pair.teacher, pair.student
                axes = [np.arange(t) for t in theirs.shape]
                origin[theirs] = ours[np.ix_(*(axis % s for axis, s in zip(axes, ours.shape, strict=True)))]
                alive[theirs] = np.all(
                    np.meshgrid(*(axis < s for axis, s in zip(axes, ours.shape, strict=True)), indexing="ij"), axis=0
                )
            value = value.index_select(dim, torch.from_numpy(origin))
            if dim == reads(teacher, entry.teacher_key):
                value = value * torch.from_numpy(alive).view([-1 if d == dim else 1 for d in range(value.ndim)])
        state[entry.teacher_key] = value
    return state | {key: state[first] for key, first in tied_keys(teacher).items()}


def check_hidden(teacher, student, both, inputs, chain=False, reads=reads, output=lambda given: given, factor=1):
    """A teacher that hides the student computes the same in float64, and selection gives the student back.

    Args:
        teacher, student: of random weights; they are left as they are.
        both: their structures.
        inputs: of the student, its arguments (a tuple) or its keyword arguments (a dict), in float64.
        chain, reads: as of ``hidden``.
        output: takes out of what a model gives the tensor that is compared.
        factor: times the student's output is the teacher's, where selection alone would have to rescale.
    """
    teacher, student = copy_of(teacher), lively(copy_of(student))
    plan = plan_all(both, "consecutive")
    teacher.double().eval().load_state_dict(hidden(plan, teacher, student, chain, reads))
    with torch.no_grad():
        expected = output(run_forward(student, inputs))
        assert expected.std() > 1e-3, "this student computes nothing"
        torch.testing.assert_close(output(run_forward(teacher, inputs)), factor * expected, rtol=1e-9, atol=1e-9)
    state = student.state_dict()
    assert_same(apply_plan(plan, teacher.state_dict()), {key: state[key] for key in plan.selected})


def check_consistent(teacher, both):
    """All that meets in a sum or a product keeps the same neurons, by every rule that keeps the same in all tensors.

    Args:
        both: of ``structures``.
    """
    traces = [trace_of(structure) for structure in both]
    for method in ("uniform", "random"):
        check_neurons(plan_all(both, method), teacher, *traces)


def check_neurons(plan, teacher, large, small):
    """Select from a teacher whose elements are their own places, and compare with what meets in a forward pass."""
    shapes = {key: value.shape for key, value in teacher.state_dict().items()}
    places = {key: torch.arange(shape.numel(), dtype=torch.float64).view(shape) for key, shape in shapes.items()}
    chosen = apply_plan(plan, places)
    kept = {}  # {neuron of the student: neuron of the teacher}
    for entry in plan.selected.values():
        assert entry.resampling is None
        indices = torch.unravel_index(chosen[entry.key].long(), entry.teacher_shape)
        for dim, size in enumerate(entry.shape):
            lines = indices[dim].movedim(dim, 0).reshape(size, -1)
            assert (lines == lines[:, :1]).all(), f"{entry.key}: another choice in every row"
            assert len(lines[:, 0].unique()) == size, f"{entry.key}: an element twice"
            ours = small.labels.find(small.dims[entry.key][dim]).tolist()
            theirs = large.labels.find(large.dims[entry.teacher_key][dim][lines[:, 0]]).tolist()
            for our, their in zip(ours, theirs, strict=True):
                assert kept.setdefault(our, their) == their, (
                    f"{entry.key}, dimension {dim}: other neurons than elsewhere"
                )
