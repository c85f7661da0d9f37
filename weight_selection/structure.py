"""The structure of a model: what a trace, and the library that it is from, say of it."""

import inspect
import re
from dataclasses import dataclass, replace

import torch.nn as nn

from weight_selection.errors import InputError
from weight_selection.geometry import Geometry, find_geometry
from weight_selection.layers import Layers
from weight_selection.modules import tensors_of
from weight_selection.sources.architectures import Architecture
from weight_selection.sources.facts import Inputs, ModelFacts, facts_of
from weight_selection.tied import embedding_keys, tied_keys
from weight_selection.tracing.groups import ModelGroups, find_groups
from weight_selection.tracing.trace import RefusedInputs, trace
from weight_selection.tracing.tracer import Untraceable


@dataclass(frozen=True)
class ModelStructure:
    """What a plan needs to know of a model.

    Attributes:
        facts: what the model's library, or the user, says of it.
        shapes: {key: shape} of its state_dict.
        layers, neurons, geometry: which parts repeat, which neurons are the same, where positions are.
        parameters: keys that are parameters; the others are buffers.
        output_layers: {name of a linear layer or convolution that gives an output of the model, which no other layer
            takes: number of its outputs}.
        tables: keys of tensors whose rows are tokens, positions or outputs.
        tied: of ``tied_keys``.
    """

    facts: ModelFacts
    shapes: dict
    layers: Layers
    neurons: ModelGroups
    geometry: Geometry
    parameters: frozenset
    output_layers: dict
    tables: frozenset
    tied: dict

    @property
    def architecture(self) -> Architecture:
        """Its conventions."""
        return self.facts.architecture

    def starred_key(self, key: str) -> str:
        """A key without the base model's prefix, with a star in place of each layer's number."""
        return self.layers.starred_key(key).removeprefix(self.facts.prefix)

    def in_classifier(self, key: str) -> bool:
        """Whether a tensor belongs to the classifier."""
        return re.search(self.architecture.classifier, key) is not None

    def with_classifier(self, pattern: str) -> "ModelStructure":
        """The same structure, whose classifier's keys match a pattern."""
        return replace(self, facts=replace(self.facts, architecture=replace(self.architecture, classifier=pattern)))


def structure_of(
    model: nn.Module, name: str, example_inputs: Inputs = None, classifier: tuple | list | None = None
) -> ModelStructure:
    """Trace a model once and keep what a plan needs. Its weights are not touched: it may be on the meta device.

    Args:
        name: what to call the model in an error.
        example_inputs, classifier: as of ``facts_of``.

    Raises:
        InputError: inputs are needed and not known, or neurons cannot be followed through the model.
    """
    facts = facts_of(model, example_inputs, classifier)
    kind = type(model).__name__
    if facts.inputs is None:
        first = next(iter(inspect.signature(model.forward).parameters), "nothing")
        raise InputError(
            f"{name}: a {kind} does not say what inputs it takes; give example_inputs, which its forward takes "
            f"({first} first), such as torch.zeros(1, 3, 224, 224) for images"
        )
    try:
        traced = trace(model, facts.inputs)
    except Untraceable as reason:
        remedy = ""
        if isinstance(reason, RefusedInputs):
            remedy = "; give example_inputs (student_inputs) that its forward takes"
        elif example_inputs is not None and facts_of(model).inputs is not None:
            remedy = "; leave example_inputs out, as its library says what inputs it takes"
        raise InputError(f"{name}: weight selection cannot take a {kind} apart: {reason}{remedy}") from reason
    shapes = {key: tuple(value.shape) for key, value in tensors_of(model).items()}
    output_layers = {
        name: size
        for name, size in traced.output_layers.items()
        if isinstance(model.get_submodule(name), nn.Linear) or not _is_taken(traced, *_outputs(model, name))
    }
    heads = _output_rows(traced, model, output_layers if facts.token_heads is None else facts.token_heads)
    return ModelStructure(
        facts,
        shapes,
        Layers(model, shapes, traced.heights, facts.layer_patterns, facts.attention_kinds),
        find_groups(traced),
        find_geometry(model, facts.first_convolutions, facts.grid, facts.position_embeddings),
        frozenset(key for key, _ in model.named_parameters(remove_duplicate=False)),
        output_layers,
        embedding_keys(model) | heads,
        tied_keys(model),
    )


def _output_rows(traced, model, names):
    """Note that the outputs of these layers are tokens or classes, not neurons; returns their weights' keys.

    A layer whose outputs another layer takes gives features.
    """
    outputs = [_outputs(model, name) for name in names]
    heads = [(key, dim) for key, dim in outputs if key in traced.dims and not _is_taken(traced, key, dim)]
    traced.labels.positions += [traced.dims[key][dim] for key, dim in heads]
    return frozenset(key for key, _ in heads)


def _outputs(model, name):
    """(key of a layer's weight, its dimension of outputs)."""
    return f"{name}.weight", int(getattr(model.get_submodule(name), "transposed", False))


def _is_taken(traced, key, dim):
    """Whether another tensor has the neurons of this dimension of a weight: it takes or gives them too."""
    if key not in traced.dims:
        return False
    rows = traced.labels.roots([traced.dims[key][dim]])
    return any(
        rows[traced.labels.find(labels)].any()
        for other, dims in traced.dims.items()
        for number, labels in enumerate(dims)
        if len(dims) > 1 and (other, number) != (key, dim)
    )
