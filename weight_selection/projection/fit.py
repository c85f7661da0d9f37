"""The second pass over the images: a student's weights by equation (1), every layer's read fitted to what it takes.

The student runs beside the teacher, and every dense layer of the student gives what the teacher's gives, written onto
the student's neurons: so each takes what it would take if all before it were as good as it can be.
"""

import torch
from torch import Tensor

from weight_selection.plan import Anatomy
from weight_selection.projection import equations
from weight_selection.projection.activation_stats import Side, Survey
from weight_selection.projection.equations import Moments
from weight_selection.projection.images import Tap, vectors
from weight_selection.projection.maps import Writes
from weight_selection.projection.skipped_layers import Gaps
from weight_selection.projection.symmetries import bias_of, weight_of


def spaces_of(plan: list, teacher: Anatomy, student: Anatomy) -> dict:
    """{number of a student's space: number of the teacher's that it is made from}."""
    pairs = {}
    for entry in plan:
        for dim in entry.parts or ():
            ours, theirs = student.neurons.parts[entry.key][dim], teacher.neurons.parts[entry.source][dim]
            for our, their in zip(ours, theirs, strict=True):
                pairs.setdefault(our.space, their.space)
    return pairs


class Fit:
    """A student's weights, made from a teacher's by equation (1).

    Args:
        entries: {student's key: its entry of the plan}, of what is selected.
        teacher, student: of one geometry, in evaluation mode. The student's weights are replaced.
        survey: of the teacher.
        writes: of the student's neurons.

    Attributes:
        state: the student's state_dict.
        rows, priors: {key of a dense weight whose read is fitted: Q W; (B, c) without images}.
    """

    def __init__(self, entries: dict, teacher: Side, student: Side, survey: Survey, writes: Writes):
        self.entries, self.teacher, self.student, self.survey, self.writes = entries, teacher, student, survey, writes
        self.weights = teacher.model.state_dict()
        self.state = student.model.state_dict()
        self.folded = self._fold()
        read = {entry.source for key, entry in entries.items() if self._is_read(key)}
        self._taken_over = {self.survey.norm_of[key] for key in read if key in survey.norm_of}
        self.rows, self.priors, self._shifts = {}, {}, {}
        for key, entry in entries.items():
            self._convert(key, entry)
        for key, prior in self.priors.items():
            biases = student.structure.biases(key)
            self._shifts[key] = {name: (rows, self.state[name].double().clone()) for name, rows in biases.items()}
            self._read(key, prior)

    def fit_reads(self, images, gaps: Gaps) -> None:
        """Fit the reads to a pass over the images, and what layers write for those that are left out.

        Args:
            images: batches on the device of the models.
            gaps: in the teacher's layers.
        """
        across, own = ({key: Moments() for key in self.rows} for _ in range(2))
        missing = {key: Moments() for key in gaps.bridged}
        sources = {entry.source for entry in self.entries.values()}
        for batch in images:
            taken = {}

            def record(key, x, y, taken=taken):
                if key in sources:
                    taken.setdefault(key, []).append((x.clone(), y.clone()))  # activations may be changed in place
                return y

            with Tap(self.teacher.model, record), gaps.watch() as outputs:
                self.teacher.model(batch)

            def force(key, z, y, taken=taken, outputs=outputs):
                entry = self.entries.get(key)
                if entry is None or not taken.get(entry.source):
                    return y
                x, theirs = taken[entry.source].pop(0)
                given = self._given(entry, theirs)
                if given.shape != y.shape:  # along another axis than its own, such as tokens, a layer has neurons
                    return y
                if key in self.rows:
                    x, z = vectors(x, len(entry.source_shape)), vectors(z, len(entry.shape))
                    across[key].add(x, z)
                    own[key].add(z, z)
                if key in missing:
                    lost = self._given(entry, gaps.missing(key, outputs, theirs))
                    missing[key].add(vectors(lost, len(entry.shape)), z)
                    given = given + lost
                return given

            with Tap(self.student.model, force):
                self.student.model(batch)
        for key, prior in self.priors.items():
            if own[key].count:
                moments = across[key].mean[:-1], own[key].mean
                self._read(key, equations.read_through(*moments, prior, constant=bool(self._shifts[key])))
        for key, moments in missing.items():
            if moments.count:
                self._write_for(key, moments.mean[:-1], own[key].mean)

    def comparable(self, key: str) -> bool:
        """Whether a dense layer of the student gives what the teacher's gives, if nothing is lost."""
        if key not in self.entries or key in self._shifts and len(self._shifts[key]) > 1:  # keys lost their constant
            return False
        parts = self.student.parts(key, 0) if 0 in self.entries[key].parts else ()
        return all(self.writes.get(space, nth).ndim == 1 for space, nth, _ in parts)

    def written(self, gain: str, x: Tensor) -> Tensor:
        """Q x of what the norm in the stream that has this gain gives."""
        write = self.writes.of[self.student.space_of(gain)]
        return x if write.ndim == 1 else (x.double() @ write.T).to(x.dtype)

    def _fold(self):
        """Move LayerScales of rotated streams, which scale coordinates, into the layers that they scale."""
        folded = {}
        spaces = {self.student.space_of(key) for key in self.entries} & self.writes.rotated
        scales = {entry.source for key, entry in self.entries.items() if self.student.space_of(key) in spaces}
        for scale, dense in self.survey.scaled.items():
            if scale not in scales:
                continue
            folded[dense] = self.weights[scale].flatten()
            for key in (dense, bias_of(dense)):
                if key in self.weights:
                    weight = self.weights[key]
                    self.weights[key] = weight * folded[dense].view(-1, *[1] * (weight.ndim - 1))
        return folded

    def _convert(self, key, entry):
        """Give a tensor its value; of what is to be read, note it."""
        weight = self.weights[entry.source]
        structure = self.student.structure
        in_stream = self.student.space_of(key) in self.writes.rotated and (
            entry.source in self.survey.scaled or structure.is_norm(key)
        )
        reads = self._is_read(key)
        if in_stream:
            weight = self._neutral(key, entry)
        for dim in () if in_stream else entry.parts:
            if not (reads and dim == 1):
                weight = self._write(entry, dim, weight, dim)
        if reads:
            self.rows[key] = weight.reshape(entry.shape[0], entry.source_shape[1], *entry.shape[2:])
            self.priors[key] = self._prior(entry)
        else:
            self.state[key].copy_(weight.reshape(entry.shape))

    def _is_read(self, key):
        """Whether a tensor is the weight of a layer whose read is fitted."""
        entry = self.entries[key]
        return 1 in entry.parts and key in self.student.structure.dense and entry.source in self.survey.moments

    def _neutral(self, key, entry):
        """What a norm or a LayerScale of a rotated stream starts from: layers around it have taken its values over.

        Where none has, before a new classifier, features keep their sizes.
        """
        is_shift = entry.source.endswith("bias")
        gain = weight_of(entry.source)
        space = self.student.space_of(key)
        if gain in self.survey.early:
            return self._between(space, gain)[1 + is_shift]
        if gain in self.survey.normalised and gain not in self._taken_over:
            return self.writes.of[space] @ self._shift(gain) if is_shift else self._mean_gain(space, gain)
        return torch.full(entry.shape, float(not is_shift), device=self.teacher.device)

    def _mean_gain(self, space, gain):
        """g_i, the mean gain of what is written onto each coordinate of a rotated stream; none is nearly zero."""
        share, gains = self.writes.of[space] ** 2, self.weights[gain].double()
        mean, least = share @ gains / share.sum(1), 0.1 * gains.square().mean().sqrt()
        return torch.where(mean.abs() < least, least.copysign(mean), mean)

    def _between(self, space, gain):
        """For a norm in the stream itself, x = g n + b: the write before it, its gain and its shift.

        With g_i the mean gain of what is written onto coordinate i, the write Q diag(g) / g_i before it and this gain
        give nearly Q diag(g) n: the length is right in the mean only, and a mean over coordinates is lost.        (8)
        """
        write, mean = self.writes.of[space], self._mean_gain(space, gain)
        before = write * self.weights[gain].double() / mean[:, None]
        before = before - before.mean(1, keepdim=True)
        moments = self.survey.normalised[gain].mean[:-1, :-1]
        length = ((before @ moments) * before).sum() / len(before)
        return before, mean * length.sqrt(), write @ self._shift(gain)

    def _shift(self, gain):
        """The shift of the layer normalisation that has this gain."""
        return self.weights.get(bias_of(gain), torch.zeros_like(self.weights[gain])).double()

    def _given(self, entry, y):
        """What a layer of the teacher's gave, on the student's neurons."""
        convolution = len(entry.source_shape) > 2
        if entry.source in self.folded:
            scale = self.folded[entry.source]
            y = y * (scale.view(-1, 1, 1) if convolution else scale)
        y = self._write(entry, 0, y, 1 if convolution else y.ndim - 1)
        if len(entry.source_shape) != len(entry.shape):  # a linear layer for a 1x1 convolution or the reverse
            y = y.movedim(1, -1) if convolution else y.movedim(-1, 1)
        return y

    def _write(self, entry, dim, x, axis):
        """Q x, from the teacher's neurons of dimension ``dim`` of a tensor, along ``axis`` of x, to the student's."""
        if dim not in entry.parts:
            return x
        out = x.new_zeros(*x.shape[:axis], entry.shape[dim], *x.shape[axis + 1 :])
        pairs = zip(self.student.parts(entry.key, dim), self.teacher.parts(entry.source, dim), strict=True)
        for (space, nth, ours), (_, _, theirs) in pairs:
            taken, write = x.index_select(axis, theirs), self._write_of(entry, space, nth)
            if write.ndim == 1:
                taken = taken.index_select(axis, write)
            else:
                taken = torch.tensordot(taken.double(), write, dims=([axis], [1])).movedim(-1, axis).to(x.dtype)
            out.index_copy_(axis, ours, taken)
        return out

    def _write_of(self, entry, space, nth):
        """Q of a part of a tensor: before a norm in a rotated stream, that of (8)."""
        if space in self.writes.rotated:
            for gain, before in self.survey.early.items():
                embedding = not self.student.structure.is_of_dense(entry.key)
                if gain in self._norms(space) and (embedding or weight_of(entry.source) in before):
                    return self._between(space, gain)[0]
        return self.writes.get(space, nth)

    def _norms(self, space):
        """Keys of the teacher's norms in one of the student's spaces."""
        return [self.entries[key].source for key in self.student.structure.norms(space) if key in self.entries]

    def _prior(self, entry):
        """(B_0, c_0), (D, d + 1): kept neurons as they are; of a rotated stream n = sqrt(D r / d) U E' LN(s), r the
        share of the energy of n that is kept.                                                                      (9)
        """
        prior = torch.zeros(entry.source_shape[1], entry.shape[1] + 1, dtype=torch.float64, device=self.teacher.device)
        pairs = zip(self.student.parts(entry.key, 1), self.teacher.parts(entry.source, 1), strict=True)
        for (space, nth, ours), (_, _, theirs) in pairs:
            write = self.writes.get(space, nth)
            if write.ndim == 1:
                prior[theirs[write], ours] = 1
            elif space not in self.writes.rotated:
                prior[theirs[:, None], ours] = torch.linalg.pinv(write)
            else:
                gain = self.survey.norm_of[entry.source]
                moments = self.survey.normalised[gain].mean[:-1, :-1]
                kept = ((write @ moments) * write).sum() / len(write)  # D r / d, as trace C = D
                prior[theirs[:, None], ours] = self.weights[gain].double()[:, None] * write.T * kept.sqrt()
                prior[theirs, -1] = self._shift(gain)
        return prior

    def _write_for(self, key, across, own):
        """Equation (10): the write (V, v) for layers that are left out, from E[Q m z~'] and E[z~ z~']."""
        biases = self._shifts[key]
        write = equations.read_through(across, own, torch.zeros_like(across), constant=bool(biases))
        weight = self.state[key]
        weight += write[:, : weight.shape[1]].reshape(weight.shape)
        for name, (some, _) in biases.items():
            self.state[name] += write[some, -1]

    def _read(self, key, read):
        """Equation (1), of a read (B, c), or (B) alone."""
        rows, columns = self.rows[key].double(), self.entries[key].shape[1]
        self.state[key].copy_(torch.tensordot(rows, read[:, :columns], dims=([1], [0])).movedim(-1, 1))
        if read.shape[1] > columns:
            constant = rows.reshape(*rows.shape[:2], -1).sum(2) @ read[:, -1]
            for name, (some, shift) in self._shifts[key].items():
                self.state[name].copy_(shift + constant[some])
