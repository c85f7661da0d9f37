"""What each set of neurons lets be done with it, from a model's structure alone: rotate, choose, refactor.

Only a residual stream that nothing but layer normalisations, dense layers and sums touch has no preferred coordinates.
A head's queries and keys, and its values, are free inside the head. All other neurons are chosen one by one; those in
blocks, and those that no dense layer reads, as plain selection does it.
"""

from dataclasses import dataclass

import torch.nn as nn

from weight_selection.tracing.groups import Neurons

ROTATED, GREEDY, STRONGEST, HEADS, UNIFORM = "rotated", "greedy", "strongest", "heads", "uniform"
HEAD_COUNTS = ("num_heads", "heads")  # what timm's attention modules call it


@dataclass(frozen=True)
class Attention:
    """The heads of one attention module, for whom nothing but their own products fixes the coordinates.

    Attributes:
        name, heads: of the module, and their number.
        queries, keys, values: (key of the weight, number of the part along its outputs).
        shared, valued: numbers of the spaces of queries and keys, and of values.
        out: key of the weight that reads the heads' outputs.
        counted: numbers of spaces with one element per head.
    """

    name: str
    heads: int
    queries: tuple
    keys: tuple
    values: tuple
    shared: int
    valued: int
    out: str
    counted: tuple


def weight_of(key: str) -> str:
    """Key of the weight in the module of a weight or a bias."""
    return f"{key.rpartition('.')[0]}.weight"


def bias_of(key: str) -> str:
    """Key of the bias in the module of a weight or a bias."""
    return f"{key.rpartition('.')[0]}.bias"


class Structure:
    """Where the neurons of a model are used, and what that lets be done with them.

    Args:
        model: a timm model; it may be on the meta device.
        neurons: its own.

    Attributes:
        dense: {key of the weight: linear layer or convolution that sums over all its inputs}.
        attentions: {name of the module: ``Attention``}, of those whose heads are free.
    """

    def __init__(self, model: nn.Module, neurons: Neurons):
        self.neurons = neurons
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.dense = {
            f"{name}.weight".lstrip("."): module
            for name, module in self.modules.items()
            if isinstance(module, (nn.Linear, nn.Conv2d)) and getattr(module, "groups", 1) == 1
        }
        self.uses = {}  # of a space: (key, dimension, number of the part)
        for key, dims in neurons.parts.items():
            for dim, parts in enumerate(dims):
                for number, part in enumerate(parts or ()):
                    self.uses.setdefault(part.space, []).append((key, dim, number))
        self.inside = set()  # spaces that are used in one attention module only
        self.attentions = {}
        self._find_attentions()

    def readers(self, space: int) -> list:
        """Keys of the dense layers that take these neurons."""
        return list(dict.fromkeys(key for key, dim, _ in self.uses[space] if key in self.dense and dim == 1))

    def norms(self, space: int) -> list:
        """Keys of the gains of the layer normalisations over these neurons."""
        return [key for key, _, _ in self.uses[space] if key.endswith("weight") and self.is_norm(key)]

    def is_norm(self, key: str) -> bool:
        """Whether a tensor is the gain or the shift of a layer normalisation."""
        return isinstance(self._owner(key), nn.LayerNorm)

    def is_of_dense(self, key: str) -> bool:
        """Whether a tensor is the weight or the bias of a linear layer or a convolution."""
        return isinstance(self._owner(key), (nn.Linear, nn.Conv2d))

    def biases(self, key: str) -> dict:
        """{key of a bias of a dense layer: the outputs that it is for}; none if the layer has no bias.

        Where queries and values have biases of their own, the keys' share is lost, which softmax ignores (after a
        normalisation or a rotation of keys only nearly).
        """
        if bias_of(key) in self.neurons.parts:
            return {bias_of(key): slice(None)}
        module, third = key.removesuffix("qkv.weight"), len(self.dense[key].weight) // 3
        apart = {f"{module}q_bias": slice(third), f"{module}v_bias": slice(2 * third, None)}
        return apart if key.endswith("qkv.weight") and apart.keys() <= self.neurons.parts.keys() else {}

    def role(self, space: int, rotate: bool) -> str:
        """What is done with a space: one of the constants above."""
        if any(space in (attention.shared, attention.valued) for attention in self.attentions.values()):
            return HEADS
        readers = self.readers(space)
        if space in self.inside or len(self.neurons.spaces[space].factors) > 1 or not readers:
            return UNIFORM
        if len(readers) == 1 and not self.norms(space):
            return STRONGEST
        return ROTATED if rotate and self.tied(space) is None else GREEDY

    def refuse(self, kind: type) -> None:
        """Let heads of attention modules of that class be as they are."""
        self.attentions = {
            name: attention for name, attention in self.attentions.items() if type(self.modules[name]) is not kind
        }

    def tied(self, space: int) -> str | None:
        """Why a stream's coordinates cannot be rotated, or None."""
        if not self.norms(space):
            return "no layer normalisation reads it"
        for key, dim, _ in self.uses[space]:
            owner = self._owner(key)
            if isinstance(owner, nn.LayerNorm):
                if len(self.neurons.parts[key][dim]) > 1:
                    return f"{key} normalises it together with others"
            elif key in self.dense and dim == 1 and not self.biases(key):
                return f"{key} has no bias to take over what the layer normalisation before it shifts"
            elif isinstance(owner, (nn.Linear, nn.Conv2d)):
                if key.endswith("weight") and key not in self.dense:
                    return f"{key} works on single coordinates"
            elif next(owner.children(), None) is None and not key.endswith("gamma"):
                return f"{key} works on single coordinates"
        return None

    def why_not(self) -> str:
        """Why no stream of the model can be rotated."""
        streams = sorted(self.uses, key=lambda space: len(self.readers(space)))
        return self.tied(streams[-1])

    def _owner(self, key):
        return self.modules[key.rpartition(".")[0]]

    def _find_attentions(self):
        counts = {}
        for name, module in self.modules.items():
            count = next((value for what in HEAD_COUNTS if isinstance(value := getattr(module, what, None), int)), None)
            if count is not None:
                counts[name] = count
        for name, heads in counts.items():
            if any(other.startswith(f"{name}.") for other in counts):
                continue  # the innermost one has the heads
            local = {s for s, uses in self.uses.items() if all(key.startswith(f"{name}.") for key, _, _ in uses)}
            self.inside |= local
            found = self._attention(name, heads, local)
            if found is not None:
                self.attentions[name] = found

    def _attention(self, name, heads, local):
        """The ``Attention`` of a module, or None where its heads are not free."""
        shared, valued, counted = [], [], []
        for space in sorted(local):
            size = self.neurons.spaces[space].size
            uses = [use for use in self.uses[space] if use[0] in self.dense]
            dims = [dim for _, dim, _ in uses]
            if size == heads:
                counted.append(space)
            elif size % heads or not all(self._is_bias(key) for key, _, _ in self.uses[space] if key not in self.dense):
                return None
            elif dims == [0, 0]:
                shared.append((space, uses))
            elif dims == [0, 1]:
                valued.append((space, uses))
            else:
                return None
        if len(shared) != 1 or len(valued) != 1:
            return None
        (ours, (queries, keys)), (theirs, (given, out)) = shared[0], valued[0]
        if any(fixed for space in (ours, theirs) for fixed in self.neurons.spaces[space].fixed[1:]):
            return None  # rotary embeddings, constants inside a head
        if len(self.neurons.spaces[ours].factors) > 1 and not counted:
            return None  # heads meet a table that is elsewhere, of all modules
        places = [(key, number) for key, _, number in (queries, keys, given)]
        return Attention(name, heads, *places, ours, theirs, out[0], tuple(counted))

    def _is_bias(self, key):
        return key.endswith("bias") and not self.is_norm(key)
