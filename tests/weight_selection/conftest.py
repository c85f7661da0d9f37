"""Weights of the small teachers, as tensors and as files, and what is selected from them."""

import pytest
import torch

import weight_selection.plan
import weight_selection.selection
from helpers import random_weights
from pairs import PAIRS
from traces import structure_of
from weight_selection.apply import apply_plan
from weight_selection.plan import make_plan


@pytest.fixture(scope="session")
def weights():
    """{architecture: weights of its small teacher}."""
    return {name: random_weights(pair.models()[0]) for name, pair in PAIRS.items()}


@pytest.fixture(scope="session")
def files(weights, tmp_path_factory):
    """{architecture: file of its small teacher's weights}."""
    directory = tmp_path_factory.mktemp("teachers")
    for name, value in weights.items():
        torch.save(value, directory / f"{name}_teacher.pth")
    return {name: directory / f"{name}_teacher.pth" for name in weights}


@pytest.fixture(scope="session")
def selected(weights):
    """{architecture: what the release's rule selects for the small student}."""
    return {name: apply_plan(make_plan(*pair.models()), weights[name]) for name, pair in PAIRS.items()}


@pytest.fixture(scope="session", autouse=True)
def each_model_is_traced_once():
    """Many tests give the same small models to the command or the function, which would trace them anew each time."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (weight_selection.plan, weight_selection.selection):
            patch.setattr(module, "structure_of", structure_of)
        yield
