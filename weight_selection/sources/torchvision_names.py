"""torchvision's models by name, and the weights that are published under it; none are fetched for a plan."""

import difflib
import inspect
import re

import torch
import torch.nn as nn
from torchvision import models

from weight_selection.errors import InputError
from weight_selection.files import StrPath
from weight_selection.sources.directories import files_of
from weight_selection.sources.hub import fetch
from weight_selection.sources.names import split_name
from weight_selection.sources.teachers import Opened, mismatch, open_teacher, refuse_quantised
from weight_selection.sources.weight_files import Weights, stored_in

# Names in published files that torchvision's own loading changes: DenseNet's, and those of the MLP of a ViT.
OLD_NAMES = (
    (re.compile(r"(denselayer\d+\.(?:norm|conv))\.(\d)\."), r"\1\2."),
    (re.compile(r"\.mlp\.linear_1\."), ".mlp.0."),
    (re.compile(r"\.mlp\.linear_2\."), ".mlp.3."),
)
WEIGHTS = ("weights", "weights_backbone")  # arguments of builders that download something


def create_model(name: str, *, option: str = "--model", device: str | torch.device = "cpu", **kwargs) -> nn.Module:
    """A model with its random initialisation, of as many classes as the weights in its name; ``names.create_model``.

    Args:
        **kwargs: arguments of torchvision's builder.
    """
    builder, weights = _builder(name, option)
    for key in (*WEIGHTS, "progress"):
        if key in kwargs:
            raise InputError(f"{option} {name}: leave out {key}; name weights as torchvision:NAME.WEIGHTS")
    if weights is not None and "." in name and "num_classes" not in kwargs:
        kwargs = {"num_classes": len(weights.meta["categories"]), **kwargs}
    try:
        return _built(builder, device, kwargs)
    except (TypeError, ValueError, AssertionError, RuntimeError, LookupError, ArithmeticError, AttributeError) as error:
        given = " ".join(f"{key}={value}" for key, value in kwargs.items())
        raise InputError(f"{option} {name}: torchvision cannot build it with {given}: {error}") from error


def _built(builder, device, kwargs):
    untrained = {name: None for name in WEIGHTS if name in inspect.signature(builder).parameters}
    try:
        with torch.device(device):
            return builder(**untrained, **kwargs)
    except NotImplementedError:  # RegNet computes its widths with tensors, which have no values on the meta device
        return builder(**untrained, **kwargs).to(device)


def arguments_of(name: str, kwargs: dict, option: str) -> dict:
    """The arguments of a model's class that have defaults, and those that are given; as ``names.arguments_of``."""
    cls = type(create_model(name, option=option, device="meta", **kwargs))
    parameters = inspect.signature(cls).parameters.values()
    return {one.name: one.default for one in parameters if one.default is not one.empty} | kwargs


def open_published(name: str, model: nn.Module, kwargs: dict, option: str, remedy: str, include_head: bool) -> Opened:
    """The weights in a name, or torchvision's default ones; as ``names.open_published``."""
    where = f"{option} {name}"
    weights = _builder(name, option)[1]
    if weights is None:
        raise InputError(f"{where}: torchvision has no weights for it; {remedy}")
    file = fetch(weights.url, where, remedy)
    opened, unused = _open(file, model, f"{where}:")
    model_name = split_name(name)[1].partition(".")[0]
    return Opened(opened, f"{model_name}.{weights.name}", weights.url, [file], unused)


def open_weights(path: StrPath, model: nn.Module, option: str) -> Opened:
    """The weights of a file or directory, also with the names in torchvision's older files; ``names.open_weights``."""
    weights, unused = _open(path, model, option)
    return Opened(weights, type(model).__name__, str(path), files_of(path, option), unused)


def _open(path, model, option):
    """({the model's key: tensor}, the file's names of all else)."""
    renamed = {_todays_name(key): value for key, value in stored_in(files_of(path, option), option).items()}
    if mismatch(renamed, model):
        return open_teacher(path, model, option)  # says what does not fit
    refuse_quantised(renamed, model, f"{option} {path}")
    expected = model.state_dict()
    unused = [key for key in renamed if key not in expected]
    return Weights({key: value for key, value in renamed.items() if key in expected}), unused


def _todays_name(key):
    for old, new in OLD_NAMES:
        key = old.sub(new, key)
    return key


def _builder(name: str, option: str) -> tuple:
    """torchvision's function that builds a model, and the weights in the name or the default ones; None if it has none.

    Raises:
        InputError: an unknown model or unknown weights, with near matches.
    """
    model, dot, chosen = split_name(name)[1].partition(".")
    if model not in models.list_models():
        near = difflib.get_close_matches(model, models.list_models(), 4, 0.5)
        hint = f"did you mean {', '.join(near)}?" if near else "torchvision.models.list_models() names them all"
        raise InputError(f"{option} {name}: torchvision has no such model; {hint}")
    known = models.get_model_weights(model)
    if dot and chosen not in known.__members__:
        choices = ", ".join(known.__members__) or "none"
        raise InputError(f"{option} {name}: {model} has no weights {chosen}; it has {choices}")
    return models.get_model_builder(model), known[chosen or "DEFAULT"] if len(known) else None
