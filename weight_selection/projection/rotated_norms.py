"""Layer normalisations and LayerScales in a rotated stream: the layers around them take over what they do."""

from dataclasses import dataclass

import torch
from torch import Tensor

from weight_selection.plan import PlanEntry
from weight_selection.projection.activation_stats import ActivationStats
from weight_selection.projection.maps import DownMaps
from weight_selection.projection.symmetries import bias_of, weight_of
from weight_selection.projection.traced_model import TracedModel


def fold_layer_scales(entries: dict, student: TracedModel, stats: ActivationStats, maps: DownMaps) -> tuple:
    """Multiply LayerScales of rotated streams, which scale single coordinates, into the dense layers before them.

    Args:
        entries: {student's key: its entry of the plan}.

    Returns:
        (the teacher's weights, {key of a dense weight: the LayerScale that it has taken over}).
    """
    weights, folded = stats.teacher.model.state_dict(), {}
    in_stream = {entry.teacher_key for key, entry in entries.items() if student.group_of(key) in maps.rotated}
    for scale, dense in stats.scaled.items():
        if scale not in in_stream:
            continue
        folded[dense] = weights[scale].flatten()
        for key in (dense, bias_of(dense)):
            if key in weights:
                last = weights[key].ndim - 1 if key == bias_of(dense) or stats.teacher.symmetries.dense[dense] else 0
                weights[key] = weights[key] * folded[dense].view(-1, *[1] * last)
    return weights, folded


@dataclass
class RotatedNorms:
    """The values of a student's norms and LayerScales in rotated streams.

    Most start at gain 1 and shift 0, since the up maps of the layers behind them take over the teacher's gains and
    shifts. Three kinds of norms have no such layer behind them: a norm in the stream itself, see (8); the norm before a
    new classifier, whose features should keep their sizes; and a norm behind which only another norm stands. The last
    two get the mean gain of the neurons that make each coordinate, which is only nearly right.

    Attributes:
        entries: {student's key: its entry of the plan}.
        stats: of the teacher.
        maps: of the student's groups.
        weights: the teacher's.
        taken_over: keys of the gains that up maps take over.
    """

    entries: dict
    student: TracedModel
    stats: ActivationStats
    maps: DownMaps
    weights: dict
    taken_over: set

    def covers(self, key: str) -> bool:
        """Whether a student's tensor is of a norm or a LayerScale in a rotated stream."""
        scales = self.entries[key].teacher_key in self.stats.scaled or self.student.symmetries.is_norm(key)
        return scales and self.student.group_of(key) in self.maps.rotated

    def value(self, key: str) -> Tensor:
        """The value of a tensor that this class covers."""
        entry, group = self.entries[key], self.student.group_of(key)
        gain, is_shift = weight_of(entry.teacher_key), entry.teacher_key.endswith("bias")
        if gain in self.stats.early:
            return self._in_the_stream(group, gain)[1 + is_shift]
        if gain in self.stats.normalised and gain not in self.taken_over:
            return self.maps.of[group] @ self.shift(gain) if is_shift else self._mean_gain(group, gain)
        return torch.full(entry.shape, float(not is_shift), device=self.stats.teacher.device)

    def map_before(self, entry: PlanEntry, group: int) -> Tensor | None:
        """The down map of (8), if the entry gives to a rotated stream before a norm in the stream itself, or None."""
        if group not in self.maps.rotated:
            return None
        norms = [self.entries[key].teacher_key for key in self.student.symmetries.norms(group) if key in self.entries]
        embedding = not self.student.symmetries.is_of_dense(entry.key)
        for gain, before in self.stats.early.items():
            if gain in norms and (embedding or weight_of(entry.teacher_key) in before):
                return self._in_the_stream(group, gain)[0]
        return None

    def shift(self, gain: str) -> Tensor:
        """The shift of the teacher's norm that has this gain."""
        return self.weights.get(bias_of(gain), torch.zeros_like(self.weights[gain])).double()

    def _in_the_stream(self, group, gain):
        """For a norm x = g n + b in the stream itself: the down map before it, its gain and its shift.

        With g_i the mean gain of the neurons that make coordinate i, the down map Q diag(g) / g_i before the norm and
        the gain g_i give nearly Q diag(g) n. Only nearly: the length is right in the mean over images, and a mean over
        coordinates is lost.                                                                                        (8)
        """
        down, mean = self.maps.of[group], self._mean_gain(group, gain)
        before = down * self.weights[gain].double() / mean[:, None]
        if self.student.symmetries.centred(group):
            before = before - before.mean(1, keepdim=True)
        moments = self.stats.normalised[gain].mean[:-1, :-1]
        length = ((before @ moments) * before).sum() / len(before)
        return before, mean * length.sqrt(), down @ self.shift(gain)

    def _mean_gain(self, group, gain):
        """g_i, the mean gain of the neurons that make each coordinate of a rotated stream, kept away from zero."""
        share, gains = self.maps.of[group] ** 2, self.weights[gain].double()
        mean, least = share @ gains / share.sum(1), 0.1 * gains.square().mean().sqrt()
        return torch.where(mean.abs() < least, least.copysign(mean), mean)
