"""The first pass over the images: the moments of what a teacher's layers take, and what follows what."""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from weight_selection.errors import InputError
from weight_selection.plan import Anatomy
from weight_selection.projection.equations import Moments, Variances
from weight_selection.projection.images import Tap, vectors
from weight_selection.projection.symmetries import STRONGEST, Structure


@dataclass(frozen=True)
class Side:
    """One of the two models: with its weights, taken apart."""

    model: nn.Module
    anatomy: Anatomy
    structure: Structure

    @classmethod
    def of(cls, model: nn.Module, anatomy: Anatomy) -> "Side":
        return cls(model, anatomy, Structure(model, anatomy.neurons))

    def parts(self, key: str, dim: int) -> list:
        """[(number of its space, how many parts of that space came before, indices (n,))] along a dimension."""
        seen, found = {}, []
        for part in self.anatomy.neurons.parts[key][dim]:
            nth = seen[part.space] = seen.get(part.space, -1) + 1
            found.append((part.space, nth, torch.from_numpy(part.indices.reshape(-1)).to(self.device)))
        return found

    def space_of(self, key: str) -> int | None:
        """The one space of a tensor's last dimension: that of a norm, a LayerScale; None if it has several."""
        dims = self.anatomy.neurons.parts[key]
        return dims[-1][0].space if dims and dims[-1] is not None and len(dims[-1]) == 1 else None

    def size(self, space: int) -> int:
        return self.anatomy.neurons.spaces[space].size

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


class Survey:
    """What a teacher's layers do while it sees the images.

    Args:
        teacher: in evaluation mode.
        images: batches of images on its device.

    Raises:
        InputError: activations that are not finite.

    Attributes:
        moments: {key of a dense weight: ``Moments`` of what it takes; ``Variances`` if it takes hidden units}.
        normalised: {key of a norm's gain: ``Moments`` of what it makes before gain and shift}.
        norm_of: {key of a dense weight: key of the last norm before it over the same neurons}.
        scaled: {key of a LayerScale: key of the dense weight that gives what it scales}.
        early: {key of a norm in the stream itself, which no dense layer but another norm reads: keys of the dense
            weights before it}.
    """

    def __init__(self, teacher: Side, images):
        self.moments, self.normalised, self.norm_of, self.scaled, self.early = {}, {}, {}, {}, {}
        self._teacher = teacher
        structure = teacher.structure
        valued = {attention.out for attention in structure.attentions.values()}
        self._units = {
            key
            for key in structure.dense
            if key not in valued
            and all(structure.role(part.space, False) == STRONGEST for part in structure.neurons.parts[key][1] or ())
        }
        for batch in images:
            self._last, self._given, self._before, self._followed = {}, {}, [], set()
            with Tap(teacher.model, self._dense, self._norm, self._scale):
                teacher.model(batch)
        followed = self._followed
        del self._last, self._given, self._before, self._followed
        for key, moments in self.moments.items():
            if not moments.total.isfinite().all():
                raise InputError(
                    f"--calibration: what the teacher's {key} takes is not finite; check weights and images"
                )
        read = set(self.norm_of.values())
        self.early = {key: self.early[key] for key in followed - read}

    def _dense(self, key, x, y):
        structure = self._teacher.structure
        self._before.append(key)
        self._given[y.data_ptr()] = key, y  # held, so that nothing else gets its memory
        parts = structure.neurons.parts[key][1] if key in structure.dense else None
        if parts is None:
            return y
        for part in parts:
            if part.space in self._last:
                self.norm_of[key] = self._last[part.space]
        x = vectors(x, structure.dense[key].weight.ndim)
        if key in self._units:
            self.moments.setdefault(key, Variances()).add(x)
        else:
            self.moments.setdefault(key, Moments()).add(x, x)
        return y

    def _norm(self, key, x, y):
        space = self._teacher.space_of(key)
        if space is not None:
            self._followed.add(self._last.get(space, key))
            self._last[space] = key
            n = F.layer_norm(x, y.shape[-1:]).reshape(-1, y.shape[-1])
            self.normalised.setdefault(key, Moments()).add(n, n)
            self.early.setdefault(key, list(self._before))
        return y

    def _scale(self, key, x):
        if isinstance(x, torch.Tensor) and x.data_ptr() in self._given:
            self.scaled[key] = self._given[x.data_ptr()][0]
