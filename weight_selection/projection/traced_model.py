"""A model together with what tracing found in it."""

from dataclasses import dataclass

import torch
import torch.nn as nn

from weight_selection.plan import Anatomy
from weight_selection.projection.symmetries import Symmetries


@dataclass(frozen=True)
class TracedModel:
    """The teacher or the student.

    Attributes:
        model: the module; on the meta device it serves for checks that need no weights.
        structure: its layers and neuron groups, from tracing.
        symmetries: what its neuron groups allow.
    """

    model: nn.Module
    structure: Anatomy
    symmetries: Symmetries

    @classmethod
    def of(cls, model: nn.Module, structure: Anatomy) -> "TracedModel":
        """A model whose structure is known already; nothing is traced again."""
        return cls(model, structure, Symmetries(model, structure.neurons))

    def slices(self, key: str, dim: int) -> list:
        """The slices of a dimension of a tensor.

        Returns:
            [(number of the neuron group, how many slices of that group came before in this dimension, indices (n,))].
        """
        seen, found = {}, []
        for part in self.structure.neurons.parts[key][dim]:
            nth = seen[part.space] = seen.get(part.space, -1) + 1
            found.append((part.space, nth, torch.from_numpy(part.indices.reshape(-1)).to(self.device)))
        return found

    def indices(self, key: str, dim: int, group: int) -> torch.Tensor:
        """Where the first slice of a neuron group is in a dimension of a tensor, integers (n,)."""
        return next(indices for number, _, indices in self.slices(key, dim) if number == group)

    def group_of(self, key: str) -> int | None:
        """The neuron group of a tensor's last dimension (of a norm or a LayerScale, say); None if it has several."""
        dims = self.structure.neurons.parts[key]
        return dims[-1][0].space if dims and dims[-1] is not None and len(dims[-1]) == 1 else None

    def size(self, group: int) -> int:
        """Number of neurons in a group."""
        return self.structure.neurons.spaces[group].size

    def block_shape(self, group: int) -> tuple:
        """Sizes of the blocks in which a group's neurons come."""
        return self.structure.neurons.spaces[group].factors

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


def paired_groups(entries: dict, teacher: Anatomy, student: Anatomy) -> dict:
    """{number of a student's neuron group: number of the teacher's group that it is made from}.

    Args:
        entries: {student's key: its entry of the plan}, of the selected tensors.
    """
    pairs = {}
    for key, entry in entries.items():
        for dim in entry.parts:
            ours, theirs = student.neurons.parts[key][dim], teacher.neurons.parts[entry.source][dim]
            for our, their in zip(ours, theirs, strict=True):
                pairs.setdefault(our.space, their.space)
    return pairs
