"""A model together with what tracing found in it."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn as nn

from weight_selection.modules import run_forward
from weight_selection.projection.images import inputs_with, placed
from weight_selection.projection.symmetries import Symmetries, weight_of
from weight_selection.structure import ModelStructure


@dataclass(frozen=True)
class TracedModel:
    """The teacher or the student.

    Attributes:
        model: the module; on the meta device it serves for checks that need no weights.
        structure: its layers and neuron groups, from tracing.
        symmetries: what its neuron groups allow.
    """

    model: nn.Module
    structure: ModelStructure
    symmetries: Symmetries

    @classmethod
    def of(cls, model: nn.Module, structure: ModelStructure) -> "TracedModel":
        """A model whose structure is known already; nothing is traced again."""
        return cls(model, structure, Symmetries(model, structure.neurons))

    def slices(self, key: str, dim: int) -> list:
        """The slices of a dimension of a tensor.

        Returns:
            [(number of the neuron group, how many slices of that group came before in this dimension, indices (n,))].
            Of queries and keys, in one tensor or in two, the queries come first.
        """
        seen, found = {}, []
        outputs = self.symmetries.output_dim(key) if key == weight_of(key) else 0
        first = 0 if dim == outputs and self.symmetries.gives_keys(key) else -1
        for part in self.structure.neurons.slices_of(key, dim):
            nth = seen[part.group] = seen.get(part.group, first) + 1
            found.append((part.group, nth, torch.from_numpy(part.indices.reshape(-1)).to(self.device)))
        return found

    def inputs(self, key: str) -> list:
        """The slices of a dense layer's inputs, as of ``slices``."""
        return self.slices(key, self.symmetries.dense[key])

    def outputs(self, key: str) -> list:
        """The slices of a dense layer's outputs, as of ``slices``."""
        return self.slices(key, self.symmetries.output_dim(key))

    def input_indices(self, key: str, group: int) -> torch.Tensor:
        """Where the first slice of a neuron group is in the inputs of a dense layer, integers (n,)."""
        return next(indices for number, _, indices in self.inputs(key) if number == group)

    def group_of(self, key: str) -> int | None:
        """The neuron group of a tensor's last dimension (of a norm or a LayerScale, say); None if it has several."""
        dims = self.structure.neurons.slices[key]
        return dims[-1][0].group if dims and dims[-1] is not None and len(dims[-1]) == 1 else None

    def size(self, group: int) -> int:
        """Number of neurons in a group."""
        return self.structure.neurons.groups[group].size

    def block_shape(self, group: int) -> tuple:
        """Sizes of the blocks in which a group's neurons come."""
        return self.structure.neurons.groups[group].block_shape

    def run(self, batch: torch.Tensor | Mapping) -> None:
        """Pass a batch forward: images, or a dict of tensors."""
        run_forward(self.model, inputs_with(self.structure.facts.inputs, batch))

    def placed(self, batch: torch.Tensor | Mapping) -> torch.Tensor | dict:
        """A batch where the model is; images and other floating point numbers in its precision."""
        return placed(batch, next(self.model.parameters()))

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


def paired_groups(entries: dict) -> dict:
    """{number of a student's neuron group: number of the teacher's group that it is made from}.

    Args:
        entries: {student's key: its entry of the plan}, of the selected tensors.
    """
    pairs = [pair for entry in entries.values() for pairs in entry.slices.values() for pair in pairs]
    return {pair.group: pair.teacher_group for pair in reversed(pairs)}  # the first pair of a group counts
