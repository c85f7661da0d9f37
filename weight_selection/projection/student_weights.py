"""The student's weights, made from the teacher's by equation (1)."""

from collections.abc import Collection

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from weight_selection.plan import PlanEntry
from weight_selection.projection import equations
from weight_selection.projection.activation_stats import ActivationStats
from weight_selection.projection.maps import DownMaps
from weight_selection.projection.rotated_norms import RotatedNorms, fold_layer_scales
from weight_selection.projection.stream_sums import rows
from weight_selection.projection.symmetries import LAYER_NORM, bias_of, weight_of
from weight_selection.projection.traced_model import TracedModel


class StudentWeights:
    """A student's weights. At first its layers have the up maps that we would use without images.

    Args:
        entries: {student's key: its entry of the plan}, of the selected tensors.
        student: in evaluation mode, on the teacher's device; its weights are replaced.
        stats: of the teacher.
        maps: down maps of the student's groups.

    Attributes:
        state: the student's state_dict.
        mapped, priors: {key of a dense weight with an up map: Q W; the up map (B, c) that it has without images}.
    """

    def __init__(self, entries: dict, student: TracedModel, stats: ActivationStats, maps: DownMaps):
        self.entries, self.student, self.stats, self.maps = entries, student, stats, maps
        self.teacher = stats.teacher
        self.state = student.model.state_dict()
        self.weights, self._folded = fold_layer_scales(entries, student, stats, maps)
        self._norms = RotatedNorms(entries, student, stats, maps, self.weights, self._taken_over(entries))
        self.mapped, self.priors = {}, {}
        for key, entry in entries.items():
            self._convert(key, entry)
        self._shifts = {}  # key of a dense weight: {key of its bias: (outputs that it is for, Q b)}
        self._placed = {}  # key of a dense weight behind a norm with a shift of ones, by (11): (outputs, that shift)
        for key in self.priors:
            biases = student.symmetries.biases(key)
            self._shifts[key] = {name: (outputs, self.state[name].double().clone()) for name, outputs in biases.items()}
        before = {key: self._shift_before(key) for key in self.priors}
        without = {key: student.symmetries.without_bias(key).to(self.teacher.device) for key in self.priors}
        needed = {before[key] for key, outputs in without.items() if len(outputs)} - {None}
        self._placed = {key: (without[key], shift) for key, shift in before.items() if shift in needed}
        for key, prior in self.priors.items():
            self.set_up_map(key, prior)
        for _, shift in self._placed.values():
            self.state[shift].fill_(1)

    def set_up_map(self, key: str, up_map: Tensor) -> None:
        """Give a dense layer its weight and bias by (1), for an up map (B, c), or B alone."""
        mapped, weight = self.mapped[key].double(), self._by_outputs(key)
        columns = weight.shape[1]
        made = torch.tensordot(mapped, up_map[:, :columns], dims=([1], [0])).movedim(-1, 1)
        constant = made.new_zeros(len(made))
        if up_map.shape[1] > columns:
            constant = mapped.reshape(*mapped.shape[:2], -1).sum(2) @ up_map[:, -1]
            for name, (outputs, shift) in self._shifts[key].items():
                self.state[name].copy_(shift + constant[outputs])
        if key in self._placed:
            outputs, _ = self._placed[key]
            kept = torch.zeros_like(constant).index_copy_(0, outputs, constant[outputs])
            made = equations.with_constant(made, kept)
        weight.copy_(made)

    def solve_up_map(self, key: str, across: Tensor, own: Tensor) -> None:
        """Give a dense layer the up map of (7), from E[x z~'] and E[z~ z~']."""
        symmetries = self.student.symmetries
        constant = bool(self._shifts[key]) or key in self._placed or not len(symmetries.without_bias(key))
        self.set_up_map(key, equations.solve_up_map(across, own, self.priors[key], constant=constant))

    def bias_apart(self, key: str) -> Tensor | None:
        """The biases that a dense layer has in tensors of several names, (outputs,); None if it has one or none.

        Its module puts them together before the layer runs.
        """
        return None if self._shifts[key].keys() <= {bias_of(key)} else self._bias(key)

    def without_shift(self, key: str, z: Tensor) -> Tensor:
        """What a dense layer takes, without the shift of ones by which the norm before it gives constants, (11)."""
        return z - 1 if key in self._placed else z

    def solve_outputs(self, key: str, across: Tensor, own: Tensor) -> None:
        """Give a dense layer the weight and bias that give y best: (7) with y in place of x, and (1) as the prior.

        Args:
            key: of a layer with ``is_product``.
            across, own: E[y z~'] and E[z~ z~'], with y what the layer should give.
        """
        weight, biases = self._by_outputs(key), self._shifts[key]
        prior = torch.cat([weight.flatten(1).double(), self._bias(key)[:, None]], dim=1)
        solved = equations.solve_up_map(across, own, prior, constant=bool(biases))
        weight.copy_(solved[:, : weight[0].numel()].reshape(weight.shape))
        for name, (outputs, _) in biases.items():
            self.state[name].copy_(solved[outputs, -1])

    def is_product(self, key: str) -> bool:
        """Whether a dense layer with an up map multiplies rows by its whole weight, as ``factors`` gives them."""
        return key in self.mapped and (self._by_outputs(key)[0, 0].numel() == 1 or self._convolution(key) is not None)

    def factors(self, key: str, x: Tensor) -> Tensor:
        """What a layer multiplies by its whole weight where it takes x: rows (n, inputs).

        Of a convolution these are the patches that its kernel meets, with zeros where the image ends.
        """
        if (conv := self._convolution(key)) is None:
            return self.without_shift(key, rows(self.student, key, x))
        patches = F.unfold(x, conv.kernel_size, conv.dilation, conv.padding, conv.stride)
        return patches.movedim(1, -1).flatten(0, 1)

    def without(self, left_out: Collection) -> dict:
        """The values of all entries but ``left_out``, the keys of a classifier that the student does not get.

        If only that classifier took over the gain of a rotated norm, the norm gets its values before a new classifier.
        """
        kept = [key for key in self.entries if key not in left_out]
        freed = self._norms.taken_over - self._taken_over(kept)
        self._norms.taken_over -= freed
        values = {key: self.state[key] for key in kept}
        for key, value in values.items():
            if weight_of(self.entries[key].teacher_key) in freed and self._norms.covers(key):
                values[key] = self._norms.value(key).reshape(value.shape).to(value.dtype)
        return values

    def map_output(self, entry: PlanEntry, y: Tensor) -> Tensor:
        """Q y: what the student's layer should give where the teacher's gives y."""
        convolution = len(entry.teacher_shape) > 2
        if entry.teacher_key in self._folded:
            scale = self._folded[entry.teacher_key]
            y = y * (scale.view(-1, 1, 1) if convolution else scale)
        outputs = self.teacher.symmetries.output_dim(entry.teacher_key)
        y = self._map_down(entry, outputs, y, 1 if convolution else y.ndim - 1)
        if len(entry.teacher_shape) != len(entry.shape):  # a linear layer for a 1x1 convolution or the reverse
            y = y.movedim(1, -1) if convolution else y.movedim(-1, 1)
        return y

    def map_stream(self, group: int, x: Tensor) -> Tensor:
        """Q x: what the student's stream (its neuron group) should be where the teacher's is x, along the last axis."""
        down = self.maps.of[group]
        return x[..., down] if down.ndim == 1 else x @ down.T.to(x.dtype)

    def keeps_outputs(self, key: str) -> bool:
        """Whether a dense layer of the student would give outputs of the teacher's, unmixed, if nothing were lost."""
        if key not in self.entries or self.student.symmetries.drops_constants(key):
            return False
        outputs = self.student.symmetries.output_dim(key)
        slices = self.student.slices(key, outputs) if outputs in self.entries[key].slices else ()
        return all(self.maps.get(group, nth).ndim == 1 for group, nth, _ in slices)

    def _has_up_map(self, key):
        """Whether a tensor is the weight of a dense layer whose inputs the teacher showed."""
        entry = self.entries[key]
        return (
            self.student.symmetries.dense.get(key) in entry.slices
            and key not in self.student.symmetries.tied
            and entry.teacher_key in self.stats.moments
        )

    def _taken_over(self, keys):
        """Keys of the teacher's gains that the up maps of some of the student's tensors take over."""
        up_mapped = [self.entries[key].teacher_key for key in keys if self._has_up_map(key)]
        return {self.stats.norm_of[key] for key in up_mapped if key in self.stats.norm_of}

    def _shift_before(self, key):
        """The key of the student's shift of the rotated layer norm before a linear layer; None if there is none."""
        gain = self.stats.norm_of.get(self.entries[key].teacher_key)
        groups = {group for group, *_ in self.student.inputs(key)}
        if gain in (None, *self.stats.early) or not groups <= self.maps.rotated or len(self.entries[key].shape) != 2:
            return None
        found = (name for name, entry in self.entries.items() if entry.teacher_key == bias_of(gain))
        return next((name for name in found if self.student.symmetries.kind(name) == LAYER_NORM), None)

    def _convolution(self, key):
        """The module of a weight, if it is a convolution that pads with a fixed number of zeros; else None."""
        module = self.student.symmetries.module_of(key)
        plain = type(module) is nn.Conv2d and module.padding_mode == "zeros" and not isinstance(module.padding, str)
        return module if plain else None

    def _by_outputs(self, key):
        """The student's weight of a dense layer as (outputs, inputs, ...), a view."""
        return self.student.symmetries.by_outputs(key, self.state[key])

    def _bias(self, key):
        """What the biases of a dense layer add to each output, float64 (outputs,); zero where there is none."""
        bias = torch.zeros(len(self._by_outputs(key)), dtype=torch.float64, device=self.teacher.device)
        for name, (outputs, _) in self._shifts[key].items():
            bias[outputs] = self.state[name].double()
        return bias

    def _convert(self, key, entry):
        """Give a tensor its value; of a dense weight with an up map, prepare it."""
        if self._norms.covers(key):
            self.state[key].copy_(self._norms.value(key).reshape(entry.shape))
            return
        weight, has_up_map = self.weights[entry.teacher_key], self._has_up_map(key)
        for dim in entry.slices:
            if not (has_up_map and dim == self.student.symmetries.dense[key]):
                weight = self._map_down(entry, dim, weight, dim)
        if has_up_map:
            weight = self.teacher.symmetries.by_outputs(entry.teacher_key, weight)
            self.mapped[key] = weight.reshape(*weight.shape[:2], *self._by_outputs(key).shape[2:])
            self.priors[key] = self._prior(entry)
        else:
            self.state[key].copy_(weight.reshape(entry.shape))

    def _map_down(self, entry, dim, x, axis):
        """Q x along ``axis`` of x, which holds the teacher's neurons of dimension ``dim`` of a tensor."""
        if dim not in entry.slices:
            return x
        out = x.new_zeros(*x.shape[:axis], entry.shape[dim], *x.shape[axis + 1 :])
        for group, nth, ours, theirs in self._slices(entry, dim):
            down = self._norms.map_before(entry, group)
            down = self.maps.get(group, nth) if down is None else down
            taken = x.index_select(axis, theirs)
            if down.ndim == 1:
                taken = taken.index_select(axis, down)
            else:
                taken = torch.tensordot(taken.double(), down, dims=([axis], [1])).movedim(-1, axis).to(x.dtype)
            out.index_copy_(axis, ours, taken)
        return out

    def _slices(self, entry, dim):
        """The student's slices of a dimension, as of ``TracedModel.slices``, each with the teacher's indices (n,)."""
        for ours, pair in zip(self.student.slices(entry.key, dim), entry.slices[dim], strict=True):
            yield *ours, torch.from_numpy(pair.teacher.reshape(-1)).to(self.teacher.device)

    def _prior(self, entry):
        """The up map (B_0, c_0), (D, d + 1), that we would use without images.

        Kept neurons are restored as they are. Of a rotated stream n = sqrt(D r / d) U E' LN(s), with r the share of the
        energy of n that is kept.                                                                                   (9)
        """
        sizes = self.mapped[entry.key].shape[1], self._by_outputs(entry.key).shape[1] + 1
        prior = torch.zeros(sizes, dtype=torch.float64, device=self.teacher.device)
        for group, nth, ours, theirs in self._slices(entry, self.student.symmetries.dense[entry.key]):
            down = self.maps.get(group, nth)
            if down.ndim == 1:
                prior[theirs[down], ours] = 1
            elif group not in self.maps.rotated:
                prior[theirs[:, None], ours] = torch.linalg.pinv(down)
            else:
                gain = self.stats.norm_of[entry.teacher_key]
                moments = self.stats.normalised[gain].mean[:-1, :-1]
                kept = len(moments) / len(down) * ((down @ moments) * down).sum() / moments.trace()  # D r / d
                prior[theirs[:, None], ours] = self.weights[gain].double()[:, None] * down.T * kept.sqrt()
                prior[theirs, -1] = self._norms.shift(gain)
        return prior
