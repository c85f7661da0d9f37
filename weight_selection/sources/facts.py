"""What a model answers about itself: its example inputs, its classifier, the numbering of its layers.

Each library that we know has a module here that answers for its models (``model_facts``). It is imported only when such
a model is met, so that no library needs another one.
"""

from dataclasses import dataclass, field, replace
from importlib import import_module

import torch
import torch.nn as nn
from torch.optim.swa_utils import AveragedModel

from weight_selection.errors import InputError
from weight_selection.sources.architectures import Architecture, found_components, keys_inside

# Package of a model's class -> the module that answers for its models.
LIBRARIES = {"timm": "timm_models", "torchvision": "torchvision_models", "transformers": "transformers_models"}
PARTS = ("timm.layers.", "timm.utils.")  # classes there are no models
WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)  # what they wrap is their ``module``
Inputs = torch.Tensor | tuple | list | dict | None  # that a user gives; None: the library knows them
TIMMS_AVERAGES = "timm.utils.model_ema"  # where timm's classes of the same kind are


@dataclass(frozen=True)
class ModelFacts:
    """What the path from a request to the weights must know of a model, beside its modules.

    Attributes:
        architecture: its conventions.
        inputs: example inputs of its forward pass: a tuple of arguments or a dict of keyword arguments, with a batch of
            one, perhaps on the meta device. None if they are not known.
        layer_patterns: regular expressions of keys, [(pattern, does its number count layers)]. The last bracket of a
            pattern holds the number.
        attention_kinds: {name of a module: a word for its kind of attention, such as "sliding_attention"}, where the
            layers of an architecture may differ in it and their tensors do not show it.
        first_convolutions: {key of the weight: convolution}, of those that take the image.
        grid: (height, width) of the grid of patches that position embeddings are of, or None.
        token_heads: names of linear layers whose outputs are tokens, as a language model's head. None: of all linear
            layers that give an output of the model, whose outputs are taken to be tokens or classes.
        position_embeddings: keys of these: (1, tokens, channels) or (tokens, channels), prefix tokens first, or
            (1, height, width, channels).
        normalization: (mean, std) by channel of the images that its weights were trained on; None: it does not say.
        prefix: what stands before the keys of the base model, such as "vit." in a Hugging Face model with a head.
        spare: pattern of keys that are of use to one task only, such as a pooler; a student for another has none.
    """

    architecture: Architecture
    inputs: tuple | dict | None = None
    layer_patterns: list = field(default_factory=list)
    attention_kinds: dict = field(default_factory=dict)
    first_convolutions: dict = field(default_factory=dict)
    grid: tuple | None = None
    token_heads: tuple | None = ()
    position_embeddings: tuple = ()
    normalization: tuple | None = None
    prefix: str = ""
    spare: str | None = None


def facts_of(model: nn.Module, example_inputs: Inputs = None, classifier: tuple | list | None = None) -> ModelFacts:
    """What a model answers, or what the user says in its place.

    Args:
        model: unwrapped, on any device.
        example_inputs: a tensor, a tuple or a dict of tensors that the forward takes.
        classifier: names of the modules that belong to the task, if the model is not to be asked.

    Raises:
        InputError: inputs of the wrong type.
    """
    package = library_of(model)
    if package is None:
        facts = facts_of_any(model)
    else:
        facts = import_module(f"weight_selection.sources.{LIBRARIES[package]}").model_facts(model)
    if example_inputs is not None:
        facts = replace(facts, inputs=_checked_inputs(example_inputs))
    if classifier:
        architecture = replace(facts.architecture, classifier=keys_inside(classifier), head_norm=None)
        facts = replace(facts, architecture=architecture)
    return facts


def facts_of_any(model: nn.Module) -> ModelFacts:
    """What is known of a module that no library answers for."""
    architecture = Architecture(type(model).__name__.lower(), None, found_components(model, ()))
    return ModelFacts(architecture, token_heads=None)


def first_convolution(model: nn.Module) -> tuple:
    """(name, convolution) of a model's first convolution of images, or (None, None)."""
    convolutions = ((name, module) for name, module in model.named_modules() if isinstance(module, nn.Conv2d))
    return next(convolutions, (None, None))


def library_of(model: nn.Module) -> str | None:
    """The package that a model's class, or a class that it extends, comes from: one of ``LIBRARIES``, or None."""
    modules = (cls.__module__ for cls in type(model).__mro__)
    packages = (module.partition(".")[0] for module in modules if not module.startswith(PARTS))
    return next((package for package in packages if package in LIBRARIES), None)


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside torch.compile, DataParallel, DistributedDataParallel, and moving averages of torch and timm."""
    while True:
        if isinstance(model, WRAPPERS) or type(model).__module__ == TIMMS_AVERAGES:
            model = model.module
        elif hasattr(model, "_orig_mod"):  # torch.compile's wrapper
            model = model._orig_mod
        else:
            return model


def _checked_inputs(inputs):
    if isinstance(inputs, torch.Tensor):
        return (inputs,)
    if isinstance(inputs, (list, tuple)) and inputs:
        return tuple(inputs)
    if isinstance(inputs, dict) and inputs:
        return dict(inputs)
    raise InputError(f"example_inputs of {type(inputs).__name__}: give a tensor, or a tuple or a dict of tensors")


def check_classifier(model: nn.Module, names: tuple | list) -> None:
    """Raise InputError unless these are names of a model's modules."""
    if isinstance(names, str) or not isinstance(names, (tuple, list)):
        raise InputError(f"--classifier {names!r:.80}: give a tuple of names of modules")
    modules = dict(model.named_modules())
    for name in names:
        if name not in modules:
            raise InputError(f"--classifier {name}: the student has no such module; its named_modules() lists them")
