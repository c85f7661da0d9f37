"""What projection may do with each neuron group, from the model's structure alone.

A residual stream has no preferred coordinates, and may be rotated, if only layer normalisations, dense layers and sums
touch it. Inside an attention head, queries and keys may be mixed, and so may values. All other neurons are kept or
dropped one by one. Neurons that come in blocks, and neurons that no dense layer takes, are kept as in plain selection.
"""

from dataclasses import dataclass

import torch.nn as nn

from weight_selection.tracing.groups import ModelGroups

# What is done with a group of neurons.
ROTATED = "rotated"  # rotated, then cut: a residual stream
GREEDY = "greedy"  # coordinates chosen by what the next layers can restore of the others: any other stream
STRONGEST = "strongest"  # the strongest hidden units
HEADS = "heads"  # mixed inside each head: queries and keys, values
UNIFORM = "uniform"  # as in plain selection

HEAD_COUNTS = ("num_heads", "heads")  # the attribute of an attention module that holds its number of heads


@dataclass(frozen=True)
class Attention:
    """An attention module in which only the products inside a head fix the coordinates.

    Attributes:
        name, heads: of the module, and its number of heads.
        queries, keys, values: (key of the weight that gives them, number of their slice along its outputs).
        query_group, value_group: numbers of the neuron groups of queries and keys (one group), and of values.
        out: key of the weight that takes the heads' outputs.
        per_head: numbers of the groups that have one neuron for each head.
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


def weight_of(key: str) -> str:
    """The key of a module's weight, from the key of its weight or its bias."""
    return f"{key.rpartition('.')[0]}.weight"


def bias_of(key: str) -> str:
    """The key of a module's bias, from the key of its weight or its bias."""
    return f"{key.rpartition('.')[0]}.bias"


class Symmetries:
    """Where the neurons of a model are used, and what may therefore be done with them.

    Args:
        model: it may be on the meta device.
        neurons: its neuron groups.

    Attributes:
        modules: {name: module}.
        dense: {key of the weight: linear layer or convolution that sums over all its inputs}.
        uses: {number of a neuron group: [(key, dimension, number of the slice)]}.
        attentions: {name of the module: ``Attention``}, of the attentions whose heads may be mixed.
    """

    def __init__(self, model: nn.Module, neurons: ModelGroups):
        self.neurons = neurons
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.dense = {
            f"{name}.weight".lstrip("."): module
            for name, module in self.modules.items()
            if isinstance(module, (nn.Linear, nn.Conv2d)) and getattr(module, "groups", 1) == 1
        }
        self.uses = {}
        for key, dims in neurons.slices.items():
            for dim, slices in enumerate(dims):
                for number, part in enumerate(slices or ()):
                    self.uses.setdefault(part.group, []).append((key, dim, number))
        self._inside = set()  # groups that only one attention module uses
        self.attentions = {}
        self._find_attentions()

    def slices(self, key: str, dim: int) -> tuple:
        """The slices of a dimension of a tensor; none if it holds positions."""
        return self.neurons.slices[key][dim] or ()

    def readers(self, group: int) -> list:
        """Keys of the dense layers that take these neurons."""
        return list(dict.fromkeys(key for key, dim, _ in self.uses[group] if key in self.dense and dim == 1))

    def norms(self, group: int) -> list:
        """Keys of the gains of the layer normalisations over these neurons."""
        return [key for key, _, _ in self.uses[group] if key.endswith("weight") and self.is_norm(key)]

    def is_norm(self, key: str) -> bool:
        """Whether a tensor is the gain or the shift of a layer normalisation."""
        return isinstance(self._module_of(key), nn.LayerNorm)

    def is_of_dense(self, key: str) -> bool:
        """Whether a tensor is the weight or the bias of a linear layer or a convolution."""
        return isinstance(self._module_of(key), (nn.Linear, nn.Conv2d))

    def biases(self, key: str) -> dict:
        """{key of a bias of this dense layer: the outputs that it is added to}; empty if the layer has no bias.

        Some fused layers have biases for queries and values, but none for keys. What a bias would add to the keys is
        then lost. Softmax ignores it, exactly so unless keys are normalised or rotated.
        """
        if bias_of(key) in self.neurons.slices:
            return {bias_of(key): slice(None)}
        module, third = key.removesuffix("qkv.weight"), len(self.dense[key].weight) // 3
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
            elif key in self.dense and dim == 1 and not self.biases(key):
                return f"{key} has no bias to take over what the layer normalisation before it shifts"
            elif isinstance(module, (nn.Linear, nn.Conv2d)):
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
        counts = {}
        for name, module in self.modules.items():
            given = (getattr(module, attribute, None) for attribute in HEAD_COUNTS)
            count = next((value for value in given if isinstance(value, int)), None)
            if count is not None:
                counts[name] = count
        for name, heads in counts.items():
            if any(other.startswith(f"{name}.") for other in counts):
                continue  # the innermost module has the heads
            inside = {g for g, uses in self.uses.items() if all(key.startswith(f"{name}.") for key, _, _ in uses)}
            self._inside |= inside
            attention = self._find_attention(name, heads, inside)
            if attention is not None:
                self.attentions[name] = attention

    def _find_attention(self, name, heads, inside):
        """The ``Attention`` of a module, from the groups that only it uses; None if its heads may not be mixed."""
        products, values, per_head = [], [], []
        for group in sorted(inside):
            size = self.neurons.groups[group].size
            uses = [use for use in self.uses[group] if use[0] in self.dense]
            dims = [dim for _, dim, _ in uses]
            if size == heads:
                per_head.append(group)
            elif size % heads or not all(self._is_bias(key) for key, _, _ in self.uses[group] if key not in self.dense):
                return None
            elif dims == [0, 0]:  # two dense layers, or slices of one, give queries and keys
                products.append((group, uses))
            elif dims == [0, 1]:  # one gives the values, another takes the heads' outputs
                values.append((group, uses))
            else:
                return None
        if len(products) != 1 or len(values) != 1:
            return None
        (query_group, (queries, keys)), (value_group, (given, out)) = products[0], values[0]
        if any(fixed for group in (query_group, value_group) for fixed in self.neurons.groups[group].fixed[1:]):
            return None  # rotary embeddings, or other constants inside a head
        if len(self.neurons.groups[query_group].block_shape) > 1 and not per_head:
            return None  # the heads meet a table outside of the module, which all blocks share
        places = [(key, number) for key, _, number in (queries, keys, given)]
        return Attention(name, heads, *places, query_group, value_group, out[0], tuple(per_head))

    def _is_bias(self, key):
        return key.endswith("bias") and not self.is_norm(key)
