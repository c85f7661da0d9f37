"""Carrying out a plan by projection: what the weights are made from is planned as ever, how is fitted to a few images.

Two passes over the images. In the first the teacher shows the moments of what its dense layers take; from them the
write of each set of neurons is chosen. In the second the student runs beside it, and every dense layer of the student
gives what the teacher's gives, written onto the student's neurons: so each takes what it would take if all before it
were as good as it can be, and its read is fitted to that. ``selection/projection.py`` has the equations.
"""

import copy
import inspect
import re
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor
from tqdm import tqdm

from models.membership import classifier_pattern
from program import InputError
from selection import projection
from selection.calibration import Calibration, Tap, check_batches, vectors
from selection.plan import Anatomy, anatomy, checked_weight, plan_selection
from selection.projection import Moments
from selection.roles import ROTATED, Structure
from selection.survey import Side, Survey
from selection.trace import input_size
from selection.writes import Writes, choose_writes, mixed_writes

TOLERANCE = 1e-2  # relative; where neurons are not free the difference is as large as what is compared


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

    def fit_reads(self, images) -> None:
        """Fit the reads to a pass over the images.

        Args:
            images: batches on the device of the models.
        """
        across, own = ({key: Moments() for key in self.rows} for _ in range(2))
        sources = {entry.source for entry in self.entries.values()}
        for batch in images:
            taken = {}

            def record(key, x, y, taken=taken):
                if key in sources:
                    taken.setdefault(key, []).append((x.clone(), y.clone()))  # activations may be changed in place
                return y

            def force(key, z, y, taken=taken):
                entry = self.entries.get(key)
                if entry is None or not taken.get(entry.source):
                    return y
                x, given = taken[entry.source].pop(0)
                given = self._given(entry, given)
                if given.shape != y.shape:  # along another axis than its own, such as tokens, a layer has neurons
                    return y
                if key in self.rows:
                    x, z = vectors(x, len(entry.source_shape)), vectors(z, len(entry.shape))
                    across[key].add(x, z)
                    own[key].add(z, z)
                return given

            with Tap(self.teacher.model, record):
                self.teacher.model(batch)
            with Tap(self.student.model, force):
                self.student.model(batch)
        for key, prior in self.priors.items():
            if own[key].count:
                moments = across[key].mean[:-1], own[key].mean
                self._read(key, projection.read_through(*moments, prior, constant=bool(self._shifts[key])))

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
            for key in (dense, _bias(dense)):
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
        gain = entry.source.removesuffix("bias") + "weight" if is_shift else entry.source
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
        return self.weights.get(_bias(gain), torch.zeros_like(self.weights[gain])).double()

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
            layer = entry.source.rpartition(".")[0] + ".weight"
            for gain, before in self.survey.early.items():
                embedding = not self.student.structure.is_of_dense(entry.key)
                if gain in self._norms(space) and (embedding or layer in before):
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

    def _read(self, key, read):
        """Equation (1), of a read (B, c), or (B) alone."""
        rows, columns = self.rows[key].double(), self.entries[key].shape[1]
        self.state[key].copy_(torch.tensordot(rows, read[:, :columns], dims=([1], [0])).movedim(-1, 1))
        if read.shape[1] > columns:
            constant = rows.reshape(*rows.shape[:2], -1).sum(2) @ read[:, -1]
            for name, (some, shift) in self._shifts[key].items():
                self.state[name].copy_(shift + constant[some])


def _bias(weight):
    return weight.removesuffix("weight") + "bias"


# ---------------------------------------------------------------------------------------------------------
# Is what is mixed free?


def check_streams(structure: Structure, name: str) -> None:
    """Raise InputError unless a residual stream of a model can be rotated; ``name`` is what to call it."""
    if all(structure.role(space, True) != ROTATED for space in structure.uses):
        raise InputError(
            f"--element_selection project: {name} has no residual stream that can be rotated: {structure.why_not()}; "
            "choose greedy, which keeps coordinates"
        )


def check_free(teacher: Side, student: Side, survey: Survey, batch: Tensor, rotate: bool) -> None:
    """Make sure that what is mixed is free: mix it at random in the teacher, undo it where it is read, compare.

    Heads that are not free are left to plain selection, which is said.

    Args:
        survey: of the teacher.
        batch: of images.
        rotate: whether streams are to be rotated.

    Raises:
        InputError: the teacher computes something else when its streams are rotated.
    """
    structure = teacher.structure
    kinds = {}
    for attention in structure.attentions.values():
        kinds.setdefault(type(structure.modules[attention.name]), []).append(attention)
    for kind, attentions in kinds.items():
        if not _unchanged(teacher, survey, batch, [], attentions):
            tqdm.write(f"{kind.__name__}: queries, keys and values are not free inside a head; selected uniformly")
            for side in (teacher, student):
                side.structure.refuse(kind)
    streams = [space for space in structure.uses if structure.role(space, rotate) == ROTATED]
    readers = [key for space in streams for key in structure.readers(space) if key in survey.moments]
    normalised = all(key in survey.norm_of for key in readers)
    if streams and not (normalised and _unchanged(teacher, survey, batch, streams, [])):
        raise InputError(
            "--element_selection project: this teacher computes something else when its residual stream is rotated; "
            "choose greedy, which keeps coordinates"
        )


def _unchanged(teacher, survey, batch, streams, attentions):
    """Whether all dense layers give the same when streams are rotated and heads are mixed."""
    plan = plan_selection(teacher.anatomy, teacher.anatomy)
    entries = {entry.key: entry for entry in plan if entry.role == "selected"}
    copied = Side(copy.deepcopy(teacher.model), teacher.anatomy, teacher.structure)
    spaces = spaces_of(plan, teacher.anatomy, teacher.anatomy)
    fit = Fit(entries, teacher, copied, survey, mixed_writes(spaces, streams, attentions, teacher))
    given, norms, errors = {}, {}, []

    def record(key, x, y):
        given.setdefault(key, []).append(y.clone())
        return y

    def record_norm(key, x, y):
        norms.setdefault(key, []).append(y.clone())
        return y

    def compare(key, x, y):
        expected = given[key].pop(0)
        if fit.comparable(key):
            errors.append(((y - expected).norm() / expected.norm().clamp(min=1e-30)).item())
        return y

    def force(key, x, y):
        expected = norms[key].pop(0)
        return fit.written(key, expected) if key in survey.early else y

    with Tap(teacher.model, record, record_norm):
        teacher.model(batch)
    with Tap(copied.model, compare, force):
        copied.model(batch)
    return bool(errors) and max(errors) < TOLERANCE


# ---------------------------------------------------------------------------------------------------------
# From two models to a state_dict


def load_teacher(teacher: nn.Module, weights: Mapping, option: str, include_head: bool = False) -> None:
    """Load all of a teacher's weights, in single precision or double.

    Unless it is to be selected, the classifier may be missing or have other classes: then it is zero and reads nothing.

    Raises:
        InputError: as ``checked_weight``.
    """
    pattern = classifier_pattern(teacher)
    state = {}
    for key, own in teacher.state_dict().items():
        weight = weights.get(key)
        if not include_head and re.search(pattern, key) and (weight is None or weight.shape != own.shape):
            state[key] = torch.zeros_like(own)
            continue
        state[key] = checked_weight(key, tuple(own.shape), weight, option)
    if all(value.dtype != torch.float64 for value in state.values()):
        teacher.float()
    teacher.load_state_dict(state)


def fit_weights(
    teacher: nn.Module,
    student: nn.Module,
    *,
    method: str,
    calibration,
    calibration_images: int | None = None,
    seed: int = 0,
    **plan_options,
) -> dict:
    """A student's first weights by projection.

    Args:
        teacher: a timm model with its weights, on the device to work on; it may be changed to the student's geometry.
        student: a timm model on any device; its weights are replaced.
        method: ``project`` or ``greedy``.
        calibration: ``noise``, a directory of images, or images as the teacher takes them, normalised: a tensor (n,
            channels, height, width), or an iterable of such batches that is gone through three times.
        calibration_images: of noise or a directory, as for ``Calibration``.
        seed: of the noise, or of the draw from the directory.
        **plan_options: of ``plan_selection``, but ``exclude``: layers are fitted to what those before them give.

    Returns:
        The student's state_dict, in its order, without what is not selected, on the CPU.

    Raises:
        InputError: as ``plan_selection``, ``Calibration`` and ``fit_plan``, or the teacher cannot be brought to the
            student's images.
    """
    student = student.to(next(teacher.parameters())).eval()
    taken_apart = anatomy(student, "student")
    teacher, whole = _at_geometry(teacher.eval(), student, taken_apart, plan_options)
    plan = plan_selection(whole, taken_apart, **plan_options)
    if isinstance(calibration, str | Path):
        calibration = Calibration(calibration, calibration_images, input_size(student), teacher.pretrained_cfg, seed)
    else:
        calibration = check_batches(calibration, input_size(student)[0], calibration_images)
    return fit_plan(plan, Side.of(teacher, whole), Side.of(student, taken_apart), calibration, method)


@torch.no_grad()
def fit_plan(plan: list, teacher: Side, student: Side, images, method: str) -> dict:
    """Carry out a plan by projection.

    Args:
        plan: of ``plan_selection``, without resampling.
        teacher, student: on one device, in evaluation mode; the student's weights are replaced.
        images: batches of normalised images, (n, channels, height, width); gone through three times.
        method: ``project`` or ``greedy``.

    Returns, Raises: as ``fit_weights``.
    """
    rotate = method == "project"
    if rotate:
        check_streams(teacher.structure, type(teacher.model).__name__)
    survey = Survey(teacher, _shown(images, "teacher", teacher))
    check_free(teacher, student, survey, next(iter(images)).to(next(teacher.model.parameters())), rotate)
    entries = {entry.key: entry for entry in plan if entry.role == "selected"}
    pairs = spaces_of(plan, teacher.anatomy, student.anatomy)
    writes = choose_writes(entries, pairs, teacher, student, survey, rotate)
    fit = Fit(entries, teacher, student, survey, writes)
    fit.fit_reads(_shown(images, "student", teacher))
    return {key: fit.state[key].to("cpu", copy=True) for key in entries}


def _at_geometry(teacher, student, taken_apart, plan_options):
    """The teacher, for whom the student's images are right, and its anatomy."""
    whole = anatomy(teacher, "teacher")
    if input_size(teacher)[0] != input_size(student)[0]:
        raise InputError("in_chans: the teacher cannot see images of other channels than its own; select by a rule")
    resampled = [e.key for e in plan_selection(whole, taken_apart, **plan_options) if e.resampling is not None]
    if resampled and hasattr(teacher, "set_input_size"):
        patch = getattr(getattr(student, "patch_embed", None), "patch_size", None)
        accepted = inspect.signature(teacher.set_input_size).parameters
        sizes = {"img_size": input_size(student)[1:]} | ({"patch_size": patch} if "patch_size" in accepted else {})
        teacher.set_input_size(**sizes)
        whole = anatomy(teacher, "teacher")
        resampled = [e.key for e in plan_selection(whole, taken_apart, **plan_options) if e.resampling is not None]
    if resampled:
        raise InputError(
            f"{resampled[0]}: the teacher's images or patches are of another size than the student's; give the teacher "
            "the student's (--teacher_kwargs img_size=N)"
        )
    return teacher, whole


def _shown(images, who, teacher):
    """Batches on the teacher's device and in its precision, with progress."""
    with tqdm(images, desc=f"calibration, {who}", unit="batch", leave=False) as batches:
        for batch in batches:
            yield batch.to(next(teacher.model.parameters()))


def describer(plan: list, structure: Structure, teacher: Anatomy, student: Anatomy, rotate: bool):
    """A function that says of an entry of a plan, in words, what is done with it."""
    pairs = spaces_of(plan, teacher, student)
    roles = {our: structure.role(their, rotate) for our, their in pairs.items()}
    sizes = {our: (teacher.neurons.spaces[t].size, student.neurons.spaces[our].size) for our, t in pairs.items()}

    def describe(entry):
        if entry.role != "selected":
            return entry.describe("")
        words = [] if entry.resampling is None else [entry.resampling.words]
        reads = entry.source in structure.dense and 1 in entry.parts
        for dim in entry.parts:
            if not (reads and dim == 1):
                spaces = [part.space for part in student.neurons.parts[entry.key][dim]]
                words += [roles[space] for space in spaces if len(set(sizes[space])) > 1]
        return ", ".join(list(dict.fromkeys(words)) + ["least-squares read"] * reads) or "copy"

    return describe
