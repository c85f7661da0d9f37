"""The trace: one forward pass in which labels travel, and which finds out which neurons of which tensors are the same.

Every index along every dimension of every parameter gets a label. The model runs once on the meta device, where no
number is computed. Beside each activation travel the labels of its neurons. Each operation gives its output labels by
the rules in operations.py, and where tensors meet, their labels become the same.
"""

import re
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from weight_selection.errors import first_line
from weight_selection.modules import run_forward, skeleton_of, tensors_of
from weight_selection.tracing.known_values import KnownValues
from weight_selection.tracing.labels import Labels, storage
from weight_selection.tracing.meta_results import MetaResults
from weight_selection.tracing.operations import follow
from weight_selection.tracing.tracer import Tracer, Untraceable

# In PyTorch's complaints that a tensor has no values.
NO_VALUES = r"meta (device type )?tensor|'Meta' backend|Meta kernel|register_meta"
ASKS_IF_CAUSAL = {nn.TransformerEncoder: "is_causal", nn.TransformerDecoder: "tgt_is_causal"}  # a module's option


class RefusedInputs(Untraceable):
    """The forward pass itself fails on the inputs that it was given."""


@dataclass(frozen=True)
class Trace:
    """What one forward pass tells of a model.

    Attributes:
        dims: {key: labels of each dimension}, of every tensor in the state_dict.
        labels, constraints, attentions, multiplied: as of ``Tracer``; of attentions, those with values.
        heights, met, sums: as of ``Tracer``, by the keys of the tensors.
        output_layers: {name of a linear layer or convolution that gives an output of the model: number of its outputs}.
    """

    dims: dict
    labels: Labels
    constraints: list
    heights: dict
    met: frozenset
    output_layers: dict
    attentions: list
    multiplied: list
    sums: dict


def trace(model: nn.Module, inputs: tuple | dict) -> Trace:
    """Follow the neurons of a model through a forward pass. Its weights are neither read nor changed.

    Args:
        model: on any device, also on the meta device.
        inputs: example inputs of the forward pass, its arguments or its keyword arguments. They are moved to the meta
            device, and numbers to float32 as the model. The channels of images, (batch, channels, height, width), are
            no neurons.

    Raises:
        Untraceable: the model does something that neurons cannot be followed through.
        RefusedInputs: its forward pass fails on the inputs.
    """
    for key, value in tensors_of(model).items():
        if is_lazy(value):
            raise Untraceable(f"{key} has no shape yet; run the model once on example inputs")
        if not isinstance(value, torch.Tensor):
            raise Untraceable(f"{key} is no tensor, as in quantised models; give the model as it was before")
    skeleton = skeleton_of(model).float().eval()
    tracer, known, modules = Tracer(), KnownValues(), _Modules(skeleton)
    inputs = tree_map_only(torch.Tensor, lambda tensor: known.on_meta(_in_single(tensor)), inputs)
    for images in filter(_is_images, tree_leaves(inputs)):
        tracer.label_channels(images)
    state = tensors_of(skeleton, keep_vars=True)
    labelled = {}  # a tied tensor has one set of labels
    for value in state.values():
        if id(value) not in labelled:
            labelled[id(value)] = tracer.label(value)
    try:
        with torch.no_grad(), _Following(tracer, known):
            output = run_forward(skeleton, inputs)
    except Untraceable as reason:
        raise Untraceable(modules.where() + str(reason)) from reason
    except (RuntimeError, AssertionError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
        reason = " ".join(first_line(error).split())
        if re.search(NO_VALUES, reason):
            message = f"its forward pass looks at the values of tensors, which a trace does not have ({reason})"
            raise Untraceable(modules.where() + message) from error
        raise RefusedInputs(f"{modules.where()}its forward pass of {_shapes(inputs)} fails ({reason})") from error
    _share_single_keys(tracer)
    _fix_choices(tracer)
    return Trace(
        dims={key: labelled[id(value)] for key, value in state.items()},
        labels=tracer.labels,
        constraints=tracer.constraints,
        heights={key: tracer.heights[id(value)] for key, value in state.items() if id(value) in tracer.heights},
        met=frozenset(key for key, value in state.items() if id(value) in tracer.met),
        output_layers=modules.giving(output, tracer.resized),
        attentions=[found for found in tracer.attentions if found[1] is not None],
        multiplied=tracer.multiplied,
        sums={key: tracer.sums[id(value)] for key, value in state.items() if id(value) in tracer.sums},
    )


def _share_single_keys(tracer):
    """Where all queries of an attention share one key, their neurons are the same, as where it has several keys."""
    find = tracer.labels.find
    own = {find(queries).numpy().tobytes() for queries, _, keys in tracer.attentions if len(keys) == len(queries)}
    for queries, values, keys in tracer.attentions:
        if values is not None and len(keys) == 1 and find(queries).numpy().tobytes() not in own:
            tracer.labels.join(queries, keys)
            tracer.labels.shared.append(keys.flatten())


def _fix_choices(tracer):
    """Where we do not see what the largest numbers choose, they are positions: a student must have as many."""
    seen = tracer.labels.roots(tracer.picked)
    tracer.positions(*(axis for axis in tracer.compared if not seen[tracer.labels.find(axis)].all()))


def _in_single(tensor):
    return tensor.float() if tensor.is_floating_point() else tensor


def _is_images(value):
    return isinstance(value, torch.Tensor) and value.ndim == 4 and value.is_floating_point()


def _shapes(inputs):
    """The inputs in words, for errors: (1, 3, 224, 224) images, or what was given."""
    named = inputs.items() if isinstance(inputs, dict) else (("", value) for value in inputs)
    words = [f"{name} {tuple(value.shape)}".strip() for name, value in named if isinstance(value, torch.Tensor)]
    return f"{words[0]} images" if len(words) == 1 and any(map(_is_images, tree_leaves(inputs))) else ", ".join(words)


class _Following(TorchDispatchMode):
    """Runs the operations under it, and lets the rules follow the labels through each."""

    def __init__(self, tracer, known):
        super().__init__()
        self.tracer, self.known, self.results = tracer, known, MetaResults()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = self.known.run(func, args, kwargs or {}, self.results.run)
        follow(self.tracer, func, out, args, kwargs or {})
        return out


class _Modules:
    """Notes which module runs, for errors, and what linear layers and convolutions give: some give the outputs.

    Args:
        model: it keeps the hooks.
    """

    def __init__(self, model):
        self.running = []  # names of the modules whose forward has begun and not ended
        self.given = []  # (output, name, number of outputs) of a linear layer or convolution
        for name, module in model.named_modules():
            if not isinstance(module, torch.jit.ScriptModule):  # which takes no hooks
                module.register_forward_pre_hook(lambda *_, name=name: self.running.append(name))
                module.register_forward_hook(partial(self._end, name))
            if type(module) in ASKS_IF_CAUSAL:
                module.register_forward_pre_hook(_is_not_causal, with_kwargs=True)

    def _end(self, name, module, args, output):
        self.running.pop()
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd) and isinstance(output, torch.Tensor):
            size = module.out_features if isinstance(module, nn.Linear) else module.out_channels
            self.given.append((output, name, size))

    def where(self) -> str:
        """The innermost module in which the forward pass stopped, as the beginning of an error."""
        return f"in {self.running[-1]}: " if self.running and self.running[-1] else ""

    def giving(self, output, resized) -> dict:
        """{name of the layer: number of its outputs}, of the tensors in the model's output, also if it resizes them."""
        storages = {storage(tensor) for tensor in tree_leaves(output) if isinstance(tensor, torch.Tensor)}
        while before := {resized[place] for place in storages & resized.keys()} - storages:
            storages |= before
        return {name: size for given, name, size in self.given if storage(given) in storages}


def _is_not_causal(module, args, kwargs):
    """Tell a transformer of PyTorch to take its mask as it is, and not to look at values whether the mask is causal."""
    option = ASKS_IF_CAUSAL[type(module)]
    return args, {**kwargs, option: kwargs.get(option) or False}
