"""Layers that the student does not have: the last dense layer before them also writes what they would have written.

In a residual stream x_j = x_i + y_i + m, what layer i writes and what the layers between i and j do, a student that
keeps i and goes on with j has lost m. Its layer i gets a second term beside that of equation (1), for m:

    W_student = Q W_teacher B + V        V = argmin E|Q m - V z~|^2                                                 (10)

with z what its last dense layer takes (and the ridge of (7), towards none). Only between layers that are kept: what is
left out at the end is better left out, a stream in which it is nearly made up for has worse features (RESULTS.md).
"""

import copy
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from weight_selection.layers import Layers
from weight_selection.projection.activation_stats import Side
from weight_selection.projection.images import Tap

TOLERANCE = 1e-2  # relative; where a layer ends in something else than a sum the difference is as large
LAYOUTS = (lambda x: x, lambda x: x.movedim(1, -1), lambda x: x.movedim(-1, 1))


@dataclass(frozen=True)
class Gap:
    """Layers of a teacher's that a student leaves out, between one that it keeps and the next.

    Attributes:
        source: key of the teacher's dense weight that is to write for them, the last of the layer before.
        before, last: names of that layer and of the last that is left out.
    """

    source: str
    before: str
    last: str


def find_gaps(entries: dict, teacher: Layers, student: Layers, dense) -> dict:
    """{key of a student's dense weight: the ``Gap`` that it is to write for}.

    Args:
        entries: {student's key: its entry of the plan}, of what is selected.
        dense: keys of the student's dense weights.
    """
    kept, writers = {}, {}
    for key, entry in entries.items():
        for (start, end), (_, ours) in zip(teacher.spans[entry.source], student.spans[key], strict=True):
            container, number = entry.source[:start], int(entry.source[start:end])
            kept.setdefault(container, set()).add(number)
            if key in dense:
                writers[key[:ours]] = key, container, number
    gaps = {}
    for key, container, number in writers.values():
        after = [other for other in kept[container] if other > number]
        missing = [n for n in teacher.containers[container] if number < n < min(after, default=0)]
        if missing:
            gaps[key] = Gap(entries[key].source, f"{container}{number}", f"{container}{max(missing)}")
    return gaps


class Gaps:
    """What the layers that a student leaves out add to the teacher's stream, as the layers before could write it.

    Some cannot, which is said: layers that do not end in a sum, and those that normalise before it by a batch's
    statistics, which would no longer be right.

    Args:
        gaps: of ``find_gaps``.
        teacher: in evaluation mode.
        batch: of images.

    Attributes:
        bridged: {key of a student's dense weight: (``Gap``, layout, gain)}, of those that can, as of ``_end``.
    """

    def __init__(self, gaps: dict, teacher: Side, batch: Tensor):
        self._modules = modules = teacher.structure.modules
        taken, given, handles = {}, {}, []
        for gap in gaps.values():
            if {gap.before, gap.last} <= modules.keys():
                handles.append(modules[gap.before].register_forward_pre_hook(_takes(taken, gap), with_kwargs=True))
                handles.append(modules[gap.last].register_forward_hook(_gives(given, gap)))
        if handles:
            teacher.model(batch)
        for handle in handles:
            handle.remove()
        self.bridged = {}
        for key, gap in gaps.items():
            end = self._end(teacher, gap, taken[gap], given[gap]) if gap in given else None
            if end is None:
                tqdm.write(f"{gap.before}: ends in no plain sum; nothing makes up for what is left out to {gap.last}")
            else:
                self.bridged[key] = gap, *end

    @contextmanager
    def watch(self):
        """Give a dictionary that has what the teacher's layers gave, by name, once it has run."""
        names = {name for gap, _, _ in self.bridged.values() for name in (gap.before, gap.last)}
        outputs = {}
        handles = [self._modules[name].register_forward_hook(_gives(outputs, name)) for name in names]
        try:
            yield outputs
        finally:
            for handle in handles:
                handle.remove()

    def missing(self, key: str, outputs: dict, y: Tensor) -> Tensor:
        """m, as the teacher's dense layer, which gives y, would have to give it."""
        gap, layout, gain = self.bridged[key]
        added = layout(outputs[gap.last] - outputs[gap.before]).reshape(y.shape)
        return torch.where(gain == 0, 0, added / gain)

    def _end(self, teacher, gap, taken, last):
        """(layout, gain): what the dense layer gives is added to what the layer gives, times a gain for each channel.

        Args:
            taken: what the layer takes.
            last: what the last layer that is left out gives.
        """
        layer, dense = self._modules[gap.before], teacher.structure.dense[gap.source]
        pointwise = isinstance(dense, nn.Linear) or dense.kernel_size == dense.stride == (1, 1)
        if not pointwise:
            return None
        pushes, normalised = [], []

        def push(key, x, y):
            if key != gap.source:
                return y
            random = torch.Generator(y.device).manual_seed(0)
            pushes.append(size * torch.randn(y.shape, generator=random, device=y.device, dtype=y.dtype))
            return y + pushes[-1]

        args, kwargs = copy.deepcopy(taken)  # layers may change what they take
        plain = layer(*args, **kwargs)
        if not isinstance(plain, Tensor) or not isinstance(last, Tensor) or plain.shape != last.shape:
            return None
        plain, size = plain.clone(), plain.std()
        args, kwargs = taken
        norms = [module for module in layer.modules() if isinstance(module, _BatchNorm)]
        handles = [norm.register_forward_pre_hook(lambda *_: normalised.append(len(pushes))) for norm in norms]
        with Tap(teacher.model, push):
            change = layer(*args, **kwargs) - plain
        for handle in handles:
            handle.remove()
        if any(normalised) or len(pushes) != 1 or change.numel() != pushes[0].numel():
            return None
        (pushed,) = pushes
        channels = pushed.ndim - 1 if isinstance(dense, nn.Linear) else 1
        others = [dim for dim in range(pushed.ndim) if dim != channels]
        for layout in LAYOUTS:
            found = layout(change).reshape(pushed.shape)
            gain = (found * pushed).sum(others, keepdim=True) / pushed.square().sum(others, keepdim=True)
            if (found - gain * pushed).norm() < TOLERANCE * found.norm():
                return layout, gain
        return None


def _takes(noted, name):
    """A hook that notes what a module takes."""

    def note(module, args, kwargs):
        noted[name] = copy.deepcopy((args, kwargs))

    return note


def _gives(noted, name):
    """A hook that notes what a module gives."""

    def note(module, args, output):
        noted[name] = copy.deepcopy(output)  # the next one may add to it in place

    return note
