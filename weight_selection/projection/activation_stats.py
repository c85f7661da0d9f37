"""The first pass over the images: the moments of the teacher's activations, and which layer follows which."""

from collections import Counter
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from weight_selection.errors import InputError
from weight_selection.projection.activation_tap import ActivationTap
from weight_selection.projection.equations import Moments, Variances
from weight_selection.projection.stream_sums import rows
from weight_selection.projection.symmetries import LAYER_NORM, STRONGEST
from weight_selection.projection.traced_model import TracedModel


class ActivationStats:
    """What the teacher's dense layers and norms take and give while it sees the images.

    Args:
        teacher: in evaluation mode.
        images: batches of images on its device.

    Raises:
        InputError: an activation is not finite.

    Attributes:
        teacher: as given.
        moments: {key of a dense weight: ``Moments`` of the layer's inputs; ``Variances`` if these are hidden units}.
        normalised: {key of a norm's gain: ``Moments`` of what the norm gives before gain and shift}.
        norm_of: {key of a dense weight: key of the last norm before it over the same neurons}.
        scaled: {key of a LayerScale: key of the dense weight whose output it scales}.
        early: {key of a norm in the stream itself: keys of the dense weights that ran before it}. Dense layers add to
            what such a norm gives; none takes it as it is.
        again: keys of the dense weights that run more than once in a forward pass.
    """

    def __init__(self, teacher: TracedModel, images: Iterable):
        self.teacher = teacher
        self.moments, self.normalised, self.norm_of, self.scaled = {}, {}, {}, {}
        self._before = {}  # key of a norm: keys of the dense weights that ran before it
        self._hidden = self._takes_hidden_units()
        grown, ran = set(), ()
        for batch in images:
            recorder = _BatchRecorder(self)
            with ActivationTap(teacher, recorder.dense, recorder.norm, recorder.scale):
                teacher.run(batch)
            grown, ran = recorder.grown, recorder.ran
        for key, moments in self.moments.items():
            if not moments.variance.isfinite().all():
                raise InputError(
                    f"--calibration: what the teacher's {key} takes is not finite; check weights and images"
                )
        self.again = {key for key, times in Counter(ran).items() if times > 1}
        self.early = {key: self._before[key] for key in grown - set(self.norm_of.values())}

    def outgoing(self, key: str) -> Tensor:
        """The weights of a dense layer by its inputs, with the LayerScale behind it: float64 (inputs, rest)."""
        weights = self.teacher.model.state_dict()
        weight, symmetries = weights[key].double(), self.teacher.symmetries
        for scale, scaled in self.scaled.items():
            if scaled == key:
                scaling = weights[scale].double().flatten()
                weight = weight * (scaling.view(-1, *[1] * (weight.ndim - 1)) if symmetries.dense[key] else scaling)
        return symmetries.by_outputs(key, weight).transpose(0, 1).flatten(1)

    def add_input(self, key: str, x: Tensor) -> None:
        """Add what a dense layer takes."""
        x = rows(self.teacher, key, x)
        if key in self._hidden:
            self.moments.setdefault(key, Variances()).add(x)
        else:
            self.moments.setdefault(key, Moments()).add(x, x)

    def add_normalised(self, key: str, n: Tensor, before: list) -> None:
        """Add what a norm gives before gain and shift; ``before`` are the dense weights that ran before it."""
        self.normalised.setdefault(key, Moments()).add(n, n)
        self._before.setdefault(key, list(before))

    def _takes_hidden_units(self):
        """Keys of the dense layers of which only variances are needed, for (4): they take nothing but hidden units."""
        symmetries = self.teacher.symmetries
        values = {attention.out for attention in symmetries.attentions.values()}
        return {
            key
            for key, dim in symmetries.dense.items()
            if key not in values
            and all(symmetries.treatment(part.group, False) == STRONGEST for part in symmetries.slices(key, dim))
        }


class _BatchRecorder:
    """Follows one batch through the teacher and adds what it sees to the statistics.

    Attributes:
        grown: keys of the norms behind which a dense layer gives the same neurons.
        ran: keys of the dense weights, in the order in which they ran.
    """

    def __init__(self, stats: ActivationStats):
        self.stats, self.grown, self.ran = stats, set(), []
        self._norms = {}  # number of a group: keys of the norms over it that ran
        self._outputs = {}  # address of a dense layer's output: (key of the weight, output)

    def dense(self, key, x, y):
        self.ran.append(key)
        self._outputs[y.data_ptr()] = key, y  # we hold the output, so that no other tensor gets its memory
        symmetries = self.stats.teacher.symmetries
        slices = symmetries.slices(key, symmetries.dense[key]) if key in symmetries.dense else ()
        for part in slices:
            if part.group in self._norms:
                self.stats.norm_of[key] = self._norms[part.group][-1]
        if slices:
            self.stats.add_input(key, x)
            for part in symmetries.slices(key, symmetries.output_dim(key)):
                self.grown.update(self._norms.get(part.group, ()))
        return y

    def norm(self, key, x, y):
        group = self.stats.teacher.group_of(key)
        if group is not None:
            self._norms.setdefault(group, []).append(key)
            normalise = F.layer_norm if self.stats.teacher.symmetries.kind(key) == LAYER_NORM else F.rms_norm
            n = normalise(x, y.shape[-1:]).reshape(-1, y.shape[-1])
            self.stats.add_normalised(key, n, self.ran)
        return y

    def scale(self, key, x):
        if isinstance(x, torch.Tensor) and x.data_ptr() in self._outputs:
            self.stats.scaled[key] = self._outputs[x.data_ptr()][0]
