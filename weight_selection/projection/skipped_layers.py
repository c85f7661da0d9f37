"""Layers that the student leaves out: the last dense layer before them also gives what they would have added.

In a residual stream x_j = x_i + y_i + m, layer i adds y_i and the layers between i and j add m. A student that keeps i
and goes on with j has lost m. Its layer i therefore gets a second term beside that of equation (1):

    W_student = Q W_teacher B + V        V = argmin E|Q m - V z~|^2                                                 (10)

with z the input of its last dense layer, and the ridge of (7), towards zero. We do this only between layers that are
kept. We do not approximate layers dropped at the end; doing so gave worse features (docs/results.md).
"""

import copy
from collections.abc import Callable, Iterable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from weight_selection.layers import Layers
from weight_selection.projection.activation_tap import ActivationTap
from weight_selection.projection.traced_model import TracedModel

TOLERANCE = 1e-2  # relative; where a layer does not end in a sum the difference is as large as what is compared
LAYOUTS = (lambda x: x, lambda x: x.movedim(1, -1), lambda x: x.movedim(-1, 1))


@dataclass(frozen=True)
class Skipped:
    """Layers of the teacher that the student leaves out, between one that it keeps and the next.

    Attributes:
        source: key of the teacher's dense weight that is to make up for them, the last of the layer before them.
        before, last: names of the layer before them, and of the last that is left out.
    """

    source: str
    before: str
    last: str


@dataclass(frozen=True)
class SumEnd:
    """How a layer ends if it adds the output y of its last dense layer to its input: it adds gain * y.

    Attributes:
        layout: brings what the layer adds into the order of y's dimensions.
        gain: a number for each channel of y.
    """

    layout: Callable
    gain: Tensor


def find_skipped(entries: dict, teacher: Layers, student: Layers, up_mapped: Iterable) -> dict:
    """Find the layers that the student leaves out.

    Args:
        entries: {student's key: its entry of the plan}, of the selected tensors.
        up_mapped: keys of the student's dense weights with an up map.

    Returns:
        {key of a student's dense weight: the ``Skipped`` layers that it is to make up for}.
    """
    kept, ends = {}, {}
    for key, entry in entries.items():
        spans = teacher.spans[entry.teacher_key], student.spans[key]
        if len(spans[0]) != len(spans[1]):  # only in one of the two models its numbered modules have the same shapes
            continue
        for (start, end), (_, ours) in zip(*spans, strict=True):
            container, number = entry.teacher_key[:start], int(entry.teacher_key[start:end])
            kept.setdefault(container, set()).add(number)
            if key in up_mapped:
                ends[key[:ours]] = key, container, number
    skipped = {}
    for key, container, number in ends.values():
        after = [other for other in kept[container] if other > number]
        missing = [n for n in teacher.containers[container] if number < n < min(after, default=0)]
        if missing:
            skipped[key] = Skipped(entries[key].teacher_key, f"{container}{number}", f"{container}{max(missing)}")
    return skipped


class SkippedLayers:
    """What the layers that the student leaves out add to the teacher's stream.

    Two kinds of layers cannot make up for those behind them; the program says which these are. One does not end in a
    sum. The other normalises by the statistics of a batch before its sum, and these would no longer be right.

    Args:
        skipped: of ``find_skipped``.
        teacher: in evaluation mode.
        batch: of images.

    Attributes:
        bridged: {key of a student's dense weight: (``Skipped``, ``SumEnd``)} of those that can.
    """

    def __init__(self, skipped: dict, teacher: TracedModel, batch: Tensor):
        self._modules = modules = teacher.symmetries.modules
        inputs, outputs = {}, {}
        found = [some for some in skipped.values() if {some.before, some.last} <= modules.keys()]
        with ExitStack() as hooks:
            for some in found:
                keep_input, keep_output = partial(_keep_input, inputs, some), partial(_keep_output, outputs, some)
                before, last = modules[some.before], modules[some.last]
                hooks.enter_context(before.register_forward_pre_hook(keep_input, with_kwargs=True))
                hooks.enter_context(last.register_forward_hook(keep_output))
            if found:
                teacher.run(batch)
        self.bridged = {}
        for key, some in skipped.items():
            end = _find_end(teacher, some, inputs[some], outputs[some]) if some in outputs else None
            if end is None:
                tqdm.write(f"{some.before}: ends in no plain sum; nothing makes up for what is left out to {some.last}")
            else:
                self.bridged[key] = some, end

    @contextmanager
    def watch(self):
        """Give a dictionary that the teacher, when it runs, fills with {name of a layer: its output}."""
        names = {name for some, _ in self.bridged.values() for name in (some.before, some.last)}
        outputs = {}
        with ExitStack() as hooks:
            for name in names:
                keep_output = partial(_keep_output, outputs, name)
                hooks.enter_context(self._modules[name].register_forward_hook(keep_output))
            yield outputs

    def missing(self, key: str, outputs: dict, y: Tensor) -> Tensor:
        """What the teacher's dense layer would have to give, beside its y, to add m."""
        some, end = self.bridged[key]
        added = end.layout(outputs[some.last] - outputs[some.before]).reshape(y.shape)
        return torch.where(end.gain == 0, 0, added / end.gain)


class _Push:
    """Adds random numbers to the output of one dense layer while its layer runs.

    Attributes:
        added: what it added, once for each time that the dense layer ran.
        normalised_after: whether a batch normalisation ran after it.
    """

    def __init__(self, source: str, size: Tensor):
        self.source, self.size = source, size
        self.added, self.normalised_after = [], False

    def add(self, key, x, y):
        if key != self.source:
            return y
        random = torch.Generator(y.device).manual_seed(0)
        self.added.append(self.size * torch.randn(y.shape, generator=random, device=y.device, dtype=y.dtype))
        return y + self.added[-1]

    def note_norm(self, *_):
        self.normalised_after |= bool(self.added)


def _find_end(teacher: TracedModel, skipped: Skipped, taken: tuple, last_output) -> SumEnd | None:
    """How the layer before the skipped ones ends; None if it does not end in a sum.

    We push the output of its last dense layer at random and look whether the layer's output moves by as much.

    Args:
        taken: (arguments, keyword arguments) of the layer.
        last_output: what the last skipped layer gives.
    """
    layer, linear = teacher.symmetries.modules[skipped.before], len(teacher.structure.shapes[skipped.source]) == 2
    dense = teacher.symmetries.modules[skipped.source.rpartition(".")[0]]
    if not linear and not dense.kernel_size == dense.stride == (1, 1):
        return None
    args, kwargs = copy.deepcopy(taken)  # a layer may change its input in place
    plain = layer(*args, **kwargs)
    if not isinstance(plain, Tensor) or not isinstance(last_output, Tensor) or plain.shape != last_output.shape:
        return None
    plain = plain.clone()
    push = _Push(skipped.source, plain.std())
    args, kwargs = taken
    with ActivationTap(teacher.model, push.add), ExitStack() as hooks:
        for module in layer.modules():
            if isinstance(module, _BatchNorm):
                hooks.enter_context(module.register_forward_pre_hook(push.note_norm))
        change = layer(*args, **kwargs) - plain
    if push.normalised_after or len(push.added) != 1 or change.numel() != push.added[0].numel():
        return None
    return _compare(change, push.added[0], linear)


def _compare(change: Tensor, pushed: Tensor, channels_last: bool) -> SumEnd | None:
    """The layout and the gains with which ``change`` is ``pushed``; None if there are none."""
    channels = pushed.ndim - 1 if channels_last else 1
    others = [dim for dim in range(pushed.ndim) if dim != channels]
    for layout in LAYOUTS:
        found = layout(change).reshape(pushed.shape)
        gain = (found * pushed).sum(others, keepdim=True) / pushed.square().sum(others, keepdim=True)
        if (found - gain * pushed).norm() < TOLERANCE * found.norm():
            return SumEnd(layout, gain)
    return None


def _keep_input(kept, name, module, args, kwargs):
    """A hook that keeps what a module takes."""
    kept[name] = copy.deepcopy((args, kwargs))


def _keep_output(kept, name, module, args, output):
    """A hook that keeps what a module gives."""
    kept[name] = copy.deepcopy(output)  # the next layer may add to it in place
