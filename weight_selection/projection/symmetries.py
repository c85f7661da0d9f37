"""What projection may do with each neuron group, from the model's structure alone.

A residual stream has no preferred coordinates, and may be rotated, if only layer normalisations, dense layers and sums
touch it. Inside an attention head, queries and keys may be mixed, and so may values, unless rotary embeddings or norms
of queries and keys fix them; then heads are kept or dropped whole. All other neurons are kept or dropped one by one.
Neurons that come in blocks, and neurons that no dense layer takes, are kept as in plain selection.
"""

from dataclasses import dataclass
from itertools import takewhile

import torch
import torch.nn as nn

from weight_selection.tracing.groups import ModelGroups

# What is done with a group of neurons.
ROTATED = "rotated"  # rotated, then cut: a residual stream
GREEDY = "greedy"  # coordinates chosen by what the next layers can restore of the others: any other stream
STRONGEST = "strongest"  # the strongest hidden units
HEADS = "heads"  # mixed inside each head, or whole heads kept: queries and keys, values
UNIFORM = "uniform"  # as in plain selection


@dataclass(frozen=True)
class Attention:
    """An attention in which only the products inside a head fix the coordinates.

    Attributes:
        name, heads: of the module that holds its tensors, and its number of heads.
        queries, keys, values: (key of the weight that gives them, number of their slice along its outputs).
        query_group, value_group: numbers of the neuron groups of queries and keys (one group), and of values.
        out: key of the weight that takes the heads' outputs.
        per_head: numbers of the groups that have one neuron for each head.
        free: neurons may be mixed inside a head. If not, heads are kept or dropped whole.
    """

    name: str
    heads: int
    queries: tuple
    keys: tuple
    values: tuple
    query_group: int
    value_group: int
    out: str
    per_head: tuple
    free: bool


def weight_of(key: str) -> str:
    """The key of a module's weight, from the key of its weight or its bias."""
    return key if key.endswith("weight") else f"{key.removesuffix('bias')}weight"


def bias_of(key: str) -> str:
    """The key of a module's bias, from the key of its weight or its bias."""
    return key if key.endswith("bias") else f"{key.removesuffix('weight')}bias"


class Symmetries:
    """Where the neurons of a model are used, and what may therefore be done with them.

    Args:
        model: it may be on the meta device.
        neurons: its neuron groups.

    Attributes:
        modules: {name: module}.
        dense: {key of the weight: dimension of the inputs}, of the linear layers, convolutions and other products with
            a weight that sum over all their inputs. The outputs are along the other one of dimensions 0 and 1.
        uses: {number of a neuron group: [(key, dimension, number of the slice)]}.
        attentions: {name of the module: ``Attention``}, of the attentions whose heads may be mixed or chosen.
    """

    def __init__(self, model: nn.Module, neurons: ModelGroups):
        self.neurons = neurons
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self._sizes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
        self.dense = {key: dim for key, dim in neurons.sums.items() if key.endswith("weight")}
        for name, module in self.modules.items():
            if isinstance(module, (nn.Linear, nn.Conv2d)) and getattr(module, "groups", 1) == 1:
                self.dense[f"{name}.weight".lstrip(".")] = 1
        self.uses = {}
        for key, dims in neurons.slices.items():
            for dim, slices in enumerate(dims):
                for number, part in enumerate(slices or ()):
                    self.uses.setdefault(part.group, []).append((key, dim, number))
        self._inside = set(neurons.multiplied)  # groups that only one attention uses
        self.attentions = {}
        self._find_attentions()

    def slices(self, key: str, dim: int) -> tuple:
        """The slices of a dimension of a tensor; none if it holds positions."""
        return self.neurons.slices[key][dim] or ()

    def output_dim(self, key: str) -> int:
        """The dimension of the outputs in the weight of a linear layer or convolution, dense or not."""
        return 1 - self.dense.get(key, 1)

    def by_outputs(self, key: str, weight: torch.Tensor) -> torch.Tensor:
        """A dense layer's weight as (outputs, inputs, ...), a view."""
        return weight if self.output_dim(key) == 0 else weight.T

    def readers(self, group: int) -> list:
        """Keys of the dense layers that take these neurons."""
        return list(dict.fromkeys(key for key, dim, _ in self.uses[group] if self.dense.get(key) == dim))

    def norms(self, group: int) -> list:
        """Keys of the gains of the layer normalisations over these neurons."""
        return [key for key, _, _ in self.uses[group] if key.endswith("weight") and self.is_norm(key)]

    def is_norm(self, key: str) -> bool:
        """Whether a tensor is the gain or the shift of a layer normalisation."""
        return isinstance(self._module_of(key), nn.LayerNorm)

    def is_of_dense(self, key: str) -> bool:
        """Whether a tensor is the weight or the bias of a linear layer or a convolution."""
        return weight_of(key) in self.dense or isinstance(self._module_of(key), (nn.Linear, nn.Conv2d))

    def biases(self, key: str) -> dict:
        """{key of a bias of this dense layer: the outputs that it is added to}; empty if the layer has no bias.

        Some fused layers have biases for queries and values, but none for keys. What a bias would add to the keys is
        then lost. Softmax ignores it, exactly so unless keys are normalised or rotated.
        """
        if bias_of(key) in self.neurons.slices:
            return {bias_of(key): slice(None)}
        module, third = key.removesuffix("qkv.weight"), self._sizes[key][0] // 3
        apart = {f"{module}q_bias": slice(third), f"{module}v_bias": slice(2 * third, None)}
        return apart if key.endswith("qkv.weight") and apart.keys() <= self.neurons.slices.keys() else {}

    def treatment(self, group: int, rotate: bool) -> str:
        """What to do with a neuron group: one of the constants above. ``rotate``: streams that can be are rotated."""
        if any(group in (attention.query_group, attention.value_group) for attention in self.attentions.values()):
            return HEADS
        readers = self.readers(group)
        if group in self._inside or len(self.neurons.groups[group].block_shape) > 1 or not readers:
            return UNIFORM
        if len(readers) == 1 and not self.norms(group):
            return STRONGEST
        return ROTATED if rotate and self.why_not_rotatable(group) is None else GREEDY

    def rotated(self, rotate: bool = True) -> list:
        """Numbers of the neuron groups that are rotated."""
        return [group for group in self.uses if self.treatment(group, rotate) == ROTATED]

    def why_not_rotatable(self, group: int) -> str | None:
        """The reason why a stream's coordinates cannot be rotated; None if they can."""
        if not self.norms(group):
            return "no layer normalisation reads it"
        for key, dim, _ in self.uses[group]:
            module = self._module_of(key)
            if isinstance(module, nn.LayerNorm):
                if len(self.neurons.slices[key][dim]) > 1:
                    return f"{key} normalises it together with others"
            elif self.dense.get(key) == dim and not self.biases(key):
                return f"{key} has no bias to take over what the layer normalisation before it shifts"
            elif self.is_of_dense(key):
                if key.endswith("weight") and key not in self.dense:
                    return f"{key} works on single coordinates"
            elif next(module.children(), None) is None and not key.endswith("gamma"):
                return f"{key} works on single coordinates"
        return None

    def why_none_rotatable(self) -> str:
        """The reason why the stream that most layers take cannot be rotated."""
        return self.why_not_rotatable(sorted(self.uses, key=lambda group: len(self.readers(group)))[-1])

    def leave_heads(self, kind: type) -> None:
        """From now on mix no heads in attention modules of this class."""
        self.attentions = {
            name: attention for name, attention in self.attentions.items() if type(self.modules[name]) is not kind
        }

    def _module_of(self, key):
        return self.modules[key.rpartition(".")[0]]

    def _find_attentions(self):
        for found in self.neurons.attentions:
            keys = {key for group in found[:2] for key, _, _ in self.uses[group]}
            levels = zip(*(key.split(".")[:-1] for key in keys), strict=False)
            name = ".".join(level[0] for level in takewhile(lambda level: len(set(level)) == 1, levels))
            within = [g for g, uses in self.uses.items() if all(key.startswith(f"{name}.") for key, *_ in uses)]
            inside = {*found[:2], *within}
            self._inside |= inside
            attention = self._find_attention(name, found, inside)
            if attention is not None:
                self.attentions[name] = attention

    def _find_attention(self, name, found, inside):
        """The ``Attention`` of a module, from the groups that only it uses; None if nothing is known of its heads."""
        query_group, value_group, heads = found
        others = sorted(inside - {query_group, value_group})
        per_head = [g for g in others if self.neurons.groups[g].size == heads and not self.norms(g)]
        queries, values = ([use for use in self.uses[group] if use[0] in self.dense] for group in found[:2])
        taken = [use for use in values if self.dense[use[0]] == use[1]]
        given = [use for use in values if use not in taken]
        if len({key for key, *_ in taken}) != 1 or not given or len(queries) < 2:
            return None
        shapes = [self.neurons.groups[group] for group in found[:2]]
        bound = any(any(shape.fixed[1:]) or shape.fixed[-1] for shape in shapes)  # rotary embeddings, other constants
        used = [use for group in found[:2] for use in self.uses[group]]
        free = (
            not bound
            and len(others) == len(per_head)
            and [self.dense[key] == dim for key, dim, _ in queries] == [False, False]
            and len(given) == len(taken) == 1
            and all(key in self.dense or self._is_bias(key) for key, *_ in used)
        )
        normed = any(self.neurons.groups[group].size * heads == shapes[0].size for group in others)
        if not (free or bound or normed):
            return None
        if free and len(shapes[0].block_shape) > 1 and not per_head:
            return None  # the heads meet a table outside of the module, which all blocks share
        places = [(key, number) for key, _, number in (queries[0], queries[-1], given[0])]
        return Attention(name, heads, *places, query_group, value_group, taken[0][0], tuple(per_head), free)

    def _is_bias(self, key):
        return key.endswith("bias") and not self.is_norm(key)
