"""What projection may do with each neuron group, from the model's structure alone.

A residual stream has no preferred coordinates, and may be rotated, if only layer normalisations, dense layers and sums
touch it. Inside an attention head, queries and keys may be mixed, and so may values, unless rotary embeddings or norms
of queries and keys fix them; then heads are kept or dropped whole. All other neurons are kept or dropped one by one.
Neurons that come in blocks, and neurons that no dense layer takes, are kept as in plain selection.
"""

from collections import Counter
from dataclasses import dataclass

import torch
import torch.nn as nn

from weight_selection.modules import module_around, skeleton_of, tensors_of
from weight_selection.tied import tied_keys
from weight_selection.tracing.groups import ModelGroups

LAYER_NORM, RMS_NORM, SCALE = "layer norm", "RMS norm", "scale"  # kinds of modules with a number for each neuron

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
        tied: keys of tensors that have several keys.
        uses: {number of a neuron group: [(key, dimension, number of the slice)]}.
        attentions: {name of the module: ``Attention``}, of the attentions whose heads may be mixed or chosen.
    """

    def __init__(self, model: nn.Module, neurons: ModelGroups):
        self.neurons = neurons
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self._sizes = {key: tuple(value.shape) for key, value in tensors_of(model).items()}
        self.dense = {key: dim for key, dim in neurons.sums.items() if key.endswith("weight")}
        for name, module in self.modules.items():
            if isinstance(module, (nn.Linear, nn.Conv2d)) and getattr(module, "groups", 1) == 1:
                self.dense[f"{name}.weight".lstrip(".")] = 1
        self.uses = {}
        for key, dims in neurons.slices.items():
            for dim in range(len(dims)):
                for number, part in enumerate(self.slices(key, dim)):
                    self.uses.setdefault(part.group, []).append((key, dim, number))
        tied = tied_keys(model)
        self.tied = {*tied, *tied.values()}
        self._kinds = {}
        self._inside = set()  # groups that only one attention uses
        self.attentions = {}
        self._find_attentions()

    def module_of(self, key: str) -> nn.Module:
        """The module that holds a tensor."""
        return self.modules[key.rpartition(".")[0]]

    def slices(self, key: str, dim: int) -> tuple:
        """The slices of a dimension of a tensor; none if it holds positions that are no constants."""
        return self.neurons.slices_of(key, dim) or ()

    def output_dim(self, key: str) -> int:
        """The dimension of the outputs in the weight of a linear layer or convolution, dense or not."""
        return 1 - self.dense.get(key, 1)

    def by_outputs(self, key: str, weight: torch.Tensor) -> torch.Tensor:
        """A dense layer's weight as (outputs, inputs, ...), a view."""
        return weight if self.output_dim(key) == 0 else weight.T

    def takers(self, group: int) -> list:
        """Keys of the dense layers that take these neurons."""
        return list(dict.fromkeys(key for key, dim, _ in self.uses[group] if self.dense.get(key) == dim))

    def norms(self, group: int) -> list:
        """Keys of the gains of the normalisations over these neurons."""
        return [key for key, _, _ in self.uses[group] if key.endswith("weight") and self.is_norm(key)]

    def is_norm(self, key: str) -> bool:
        """Whether a tensor is the gain or the shift of a normalisation."""
        return self.kind(key) in (LAYER_NORM, RMS_NORM)

    def kind(self, key: str) -> str | None:
        """What a tensor's module does, if it has a number for each neuron: LAYER_NORM, RMS_NORM or SCALE."""
        name = key.rpartition(".")[0]
        if name not in self._kinds:
            self._kinds[name] = _kind(self.modules[name])
        return self._kinds[name]

    def centred(self, group: int) -> bool:
        """Whether the normalisations over these neurons take their mean away."""
        return all(self.kind(key) == LAYER_NORM for key in self.norms(group))

    def is_of_dense(self, key: str) -> bool:
        """Whether a tensor is the weight or the bias of a linear layer or a convolution."""
        return weight_of(key) in self.dense or isinstance(self.module_of(key), (nn.Linear, nn.Conv2d))

    def biases(self, key: str) -> dict:
        """{key of a bias of this dense layer: the outputs that it is added to}; empty if the layer has no bias.

        Some fused layers have biases for queries and values, but none for keys. What a bias would add to the keys is
        then lost. Softmax ignores it, exactly so unless keys are normalised or rotated.
        """
        if bias_of(key) in self.neurons.slices:
            return {bias_of(key): slice(None)}
        if not key.endswith("qkv.weight"):
            return {}
        module, third = key.removesuffix("qkv.weight"), self._sizes[key][0] // 3
        apart = {f"{module}q_bias": slice(third), f"{module}v_bias": slice(2 * third, None)}
        return apart if apart.keys() <= self.neurons.slices.keys() else {}

    def without_bias(self, key: str) -> torch.Tensor:
        """Outputs of a dense layer that have no bias although a constant would matter to them; integers (n,).

        These are all outputs without a bias, except keys: softmax ignores their constants, unless keys are normalised
        or rotated.
        """
        missing = self._unbiased(key)
        for attention in self.attentions.values():
            if attention.free and attention.keys[0] == key:
                indices = self.slices(key, self.output_dim(key))[attention.keys[1]].indices
                missing[torch.from_numpy(indices.reshape(-1))] = False
        return missing.nonzero().flatten()

    def drops_constants(self, key: str) -> bool:
        """Whether a layer gives keys without a bias, which lose the constants that a bias would add to them."""
        return len(self.without_bias(key)) < int(self._unbiased(key).sum())

    def _unbiased(self, key):
        unbiased = torch.ones(self._sizes[key][self.output_dim(key)], dtype=torch.bool)
        for outputs in self.biases(key).values():
            unbiased[outputs] = False
        return unbiased

    def treatment(self, group: int, rotate: bool) -> str:
        """What to do with a neuron group: one of the constants above. ``rotate``: rotate the streams that allow it."""
        if any(group in (attention.query_group, attention.value_group) for attention in self.attentions.values()):
            return HEADS
        takers = self.takers(group)
        alone = group not in self._inside and (len(takers) > 1 or group not in self.neurons.multiplied)
        if not alone or len(self.neurons.groups[group].block_shape) > 1 or not takers:
            return UNIFORM
        if len(takers) == 1 and not self.norms(group):
            return STRONGEST
        return ROTATED if rotate and self.why_not_rotatable(group) is None else GREEDY

    def rotated(self, rotate: bool = True) -> list:
        """Numbers of the neuron groups that are rotated."""
        return [group for group in self.uses if self.treatment(group, rotate) == ROTATED]

    def why_not_rotatable(self, group: int) -> str | None:
        """The reason why a stream's coordinates cannot be rotated; None if they can."""
        if self.neurons.groups[group].fixed == (True,):
            return "numbers that are no weights are added to it, such as sinusoids of positions"
        if not self.norms(group):
            return "no layer normalisation takes it"
        if len({self.kind(key) for key in self.norms(group)}) > 1:
            return "layer normalisations and RMS normalisations take it"
        for key, dim, _ in self.uses[group]:
            module = self.module_of(key)
            if self.is_norm(key):
                if len(self.slices(key, dim)) > 1:
                    return f"{key} normalises it together with others"
            elif self.dense.get(key) == dim and not self._takes_constants(key):
                return f"{key} has no bias to take over what the layer normalisation before it shifts"
            elif self.dense.get(key) == dim and key in self.tied:
                return f"{key} is tied to another tensor, and cannot take over the gain of the normalisation before it"
            elif self.is_of_dense(key):
                if key.endswith("weight") and key not in self.dense:
                    return f"{key} works on single coordinates"
            elif isinstance(module, nn.Embedding) or self.kind(key) == SCALE or key.endswith("gamma"):
                continue
            elif next(module.children(), None) is None:
                return f"{key} works on single coordinates"
        return None

    def why_none_rotatable(self) -> str:
        """The reason why the stream that most layers take cannot be rotated."""
        return self.why_not_rotatable(sorted(self.uses, key=lambda group: len(self.takers(group)))[-1])

    def leave_heads(self, kind: type) -> None:
        """From now on mix no heads in attention modules of this class."""
        self.attentions = {
            name: attention for name, attention in self.attentions.items() if type(self.modules[name]) is not kind
        }

    def _find_attentions(self):
        shared = Counter(query_group for query_group, *_ in self.neurons.attentions)
        for found in self.neurons.attentions:
            if shared[found[0]] > 1:
                continue
            uses = [use for group in found[:2] for use in self.uses[group]]
            name, within = self._around({key for key, *_ in uses})
            attention = self._find_attention(name, found, within)
            if attention is not None:
                self.attentions[name] = attention
            else:
                _, within = self._around({key for key, dim, _ in uses if self.dense.get(key, dim) != dim})
            self._inside |= within

    def _around(self, keys):
        """The innermost module that holds several tensors, or one linear layer; and the groups that only it uses."""
        name = module_around([key.split(".")[: -2 if len(keys) == 1 else -1] for key in keys])
        return name, {g for g, uses in self.uses.items() if all(key.startswith(f"{name}.") for key, *_ in uses)}

    def _find_attention(self, name, found, inside):
        """The ``Attention`` of a module, from the groups that only it uses; None if nothing is known of its heads."""
        query_group, value_group, heads, of_keys = found
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
            and all(key in self.dense or key.endswith("bias") and not self.is_norm(key) for key, *_ in used)
        )
        sizes = {self.neurons.groups[group].size for group in others if heads > 1 and self._is_of_norms(group)}
        normed = shapes[0].size // heads in sizes
        if not (free or bound or normed):
            return None
        if free and len(shapes[0].block_shape) > 1 and not per_head:
            return None  # the heads meet a table outside of the module, which all blocks share
        queries.sort(key=lambda use: use[0] in of_keys)
        places = [(key, number) for key, _, number in (queries[0], queries[-1], given[0])]
        return Attention(name, heads, *places, query_group, value_group, taken[0][0], tuple(per_head), free)

    def _takes_constants(self, key):
        """Whether a dense layer has biases, or takes one whole stream, so that (11) can give it constants."""
        takes = self.slices(key, self.dense[key])
        return bool(self.biases(key)) or len(self._sizes[key]) == 2 and len(takes) == 1

    def gives_keys(self, key: str) -> bool:
        """Whether a tensor is the weight or the bias of a layer that gives keys, but not the queries of its group."""
        places = ((attention.keys[0], attention.queries[0]) for attention in self.attentions.values())
        return any(weight_of(key) == keys != queries for keys, queries in places)

    def _is_of_norms(self, group):
        return all(self.is_norm(key) for key, *_ in self.uses[group])


def _kind(module):
    """What a module does, if it has a number for each neuron. We find out by running it on a vector."""
    if isinstance(module, nn.LayerNorm):
        return LAYER_NORM
    parameters = list(module.parameters())
    if next(module.children(), None) is not None or len(parameters) != 1 or parameters[0].ndim != 1:
        return None
    copied = skeleton_of(module).to_empty(device="cpu").float()
    size = len(parameters[0])
    weight, x = torch.linspace(0.5, 1.5, size), torch.linspace(-1, 2, size).view(1, 1, size)
    with torch.no_grad():
        next(copied.parameters()).copy_(weight)
        try:
            y = copied(x.clone())
        except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError):  # it takes something else
            return None
    for kind, expected in ((SCALE, weight * x), (RMS_NORM, weight * x / x.square().mean().sqrt())):
        if isinstance(y, torch.Tensor) and y.shape == x.shape and torch.allclose(y, expected, atol=1e-4):
            return kind
    return None
