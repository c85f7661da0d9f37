"""Traces that tests share: of models that differ in nothing but the values of their tensors, one is traced."""

import functools
from unittest import mock

from weight_selection import structure as original
from weight_selection.tracing.trace import Trace, trace

trace_anew = original.structure_of
KNOWN = {}  # {description of a model, classifier: its structure}
TRACES = {}  # {id of a structure: the structure, the trace that it was made from}


@functools.wraps(trace_anew)
def structure_of(model, name, example_inputs=None, classifier=None):
    """As the plan's, but of models that need no example inputs each is traced once."""
    key = None if example_inputs is not None else (description(model), classifier)
    if key is None or key not in KNOWN:
        traces = []
        with mock.patch.object(original, "trace", lambda *args: traces.append(trace(*args)) or traces[0]):
            structure = trace_anew(model, name, example_inputs, classifier)
        TRACES[id(structure)] = structure, traces[0]
        if key is None:
            return structure
        KNOWN[key] = structure
    return KNOWN[key]


def trace_of(structure) -> Trace:
    """The trace that ``structure_of`` made a structure from."""
    return TRACES[id(structure)][1]


def description(module):
    """All that decides what neurons a model has: all but the values and types of its tensors, and its mode.

    Objects that do not say what they hold have their address in it, so that no other model has the same description.
    """
    tensors = module.state_dict(keep_vars=True)
    first = {id(tensor): key for key, tensor in reversed(tensors.items())}  # of tied tensors, the first key
    facts = [(key, first[id(tensor)], tuple(tensor.shape), type(tensor)) for key, tensor in tensors.items()]
    left_out = ("_parameters", "_buffers", "_modules", "training")
    for name, part in module.named_modules(remove_duplicate=False):
        own = {key: value for key, value in vars(part).items() if key not in left_out}
        facts += [name, type(part), tuple(part._parameters), tuple(part._buffers), tuple(part._modules), repr(own)]
    return tuple(facts)
