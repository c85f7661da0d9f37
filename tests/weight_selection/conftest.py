"""Weights of the small teachers, as tensors and as files, and what is selected from them."""

import functools

import pytest
import torch

import weight_selection.plan
import weight_selection.selection
from helpers import random_weights
from pairs import PAIRS
from weight_selection.apply import apply_plan
from weight_selection.plan import make_plan


@pytest.fixture(scope="session")
def weights():
    """{family: weights of its small teacher}."""
    return {name: random_weights(pair.models()[0]) for name, pair in PAIRS.items()}


@pytest.fixture(scope="session")
def files(weights, tmp_path_factory):
    """{family: file of its small teacher's weights}."""
    directory = tmp_path_factory.mktemp("teachers")
    for name, value in weights.items():
        torch.save(value, directory / f"{name}_teacher.pth")
    return {name: directory / f"{name}_teacher.pth" for name in weights}


@pytest.fixture(scope="session")
def selected(weights):
    """{family: what the release's rule selects for the small student}."""
    return {name: apply_plan(make_plan(*pair.models()), weights[name]) for name, pair in PAIRS.items()}


def description(module):
    """All that makes a model compute what it computes, but for the values of its tensors.

    Objects that do not say what they hold have their address in it, so that no other model has the same description.
    """
    tensors = module.state_dict(keep_vars=True)
    first = {id(tensor): key for key, tensor in reversed(tensors.items())}  # of tied tensors, the first key
    facts = [(key, first[id(t)], tuple(t.shape), t.dtype, type(t)) for key, t in tensors.items()]
    for name, part in module.named_modules(remove_duplicate=False):
        own = {key: value for key, value in vars(part).items() if key not in ("_parameters", "_buffers", "_modules")}
        facts += [name, type(part), tuple(part._parameters), tuple(part._buffers), tuple(part._modules), repr(own)]
    return tuple(facts)


@pytest.fixture(scope="session", autouse=True)
def each_model_is_traced_once():
    """Many tests give the same small models to the command or the function, which would trace them anew each time."""
    structure_of, known = weight_selection.plan.structure_of, {}

    @functools.wraps(structure_of)
    def remembered(model, name, example_inputs=None, classifier=None):
        if example_inputs is not None:
            return structure_of(model, name, example_inputs, classifier)
        key = description(model), classifier
        if key not in known:
            known[key] = structure_of(model, name, None, classifier)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        for module in (weight_selection.plan, weight_selection.selection):
            patch.setattr(module, "structure_of", remembered)
        yield
