"""The second pass over the images: fit the student's dense layers one after the other.

Teacher and student go through the images side by side. Before each dense layer all batches wait. By then the layers
before it are final, so we fit this one to what the student really computes:

- A layer that adds to a residual stream brings the student's stream to where the teacher's is, Q x. So it also makes up
  for what all layers before it have lost. An activation behind the sum changes nothing about this.               (10)
- Any other layer restores what the teacher's layer takes, by the up map of (7).
- A batch normalisation gets the statistics of what it takes, and gives the mean that it should, by (13).
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from tqdm import tqdm

from weight_selection.projection.batch_norms import find_batch_norms, fit_batch_norm, given_by, mean_given
from weight_selection.projection.equations import Moments, Variances
from weight_selection.projection.images import first_images, images_in, joined
from weight_selection.projection.stepped_pass import Halt, SteppedPass
from weight_selection.projection.stream_sums import by_place, find_sums, rows, stream_taken
from weight_selection.projection.student_weights import StudentWeights

PASS_IMAGES = 128  # of a pass: many small passes would scatter what they keep all over the memory
SUM_IMAGES = 4
LEAST_GAIN = 1e-3  # of a stream's neurons, as a share of the largest: neurons with less are not corrected


def fit_up_maps(weights: StudentWeights, skipped: dict, images: Iterable) -> None:
    """Fit the student's dense layers.

    Args:
        weights: of the student; they are changed.
        skipped: the layers that it leaves out, as of ``find_skipped``.
        images: batches on the device of the models. All of them are held in memory and pass at the same time.
    """
    batches = list(joined(images, PASS_IMAGES))
    sums = find_sums(weights.student, first_images(batches[0], SUM_IMAGES))
    for key in skipped.keys() - {key for key, one in sums.items() if one.after is not None}:
        if key in weights.mapped:
            some = skipped[key]
            tqdm.write(f"{some.before}: ends in no plain sum; nothing makes up for what is left out to {some.last}")
    fit = _Fit(weights, sums, skipped)
    passes = [_Pass(fit, batch) for batch in batches]
    del batches
    try:
        with tqdm(total=len(weights.mapped), desc="calibration, student", unit="layer", leave=False) as progress:
            while (halts := [one.student.next() for one in passes])[0] is not None:
                progress.update(fit.see(passes, halts))
    finally:
        for one in passes:
            one.close()


class _Fit:
    """Fits a layer when all batches wait before it."""

    def __init__(self, weights: StudentWeights, sums: dict, skipped: dict):
        self.weights, self.skipped = weights, skipped
        self.teacher_keys = {key: entry.teacher_key for key, entry in weights.entries.items()}
        norms = find_batch_norms(weights.student.model)
        self.batch_norms = {key: norm for key, norm in norms.items() if key in self.teacher_keys}
        self.sums = {
            key: one
            for key, one in sums.items()
            if weights.is_product(key) and one.before in (self.batch_norms if one.given else self.teacher_keys)
        }
        self.streams = {one.before: stream_taken(weights.student, one.before) for one in self.sums.values()}
        self.given = {one.before for one in self.sums.values() if one.given}
        self.last = {one.before: key for key, one in self.sums.items()}
        self.wanted = {self.teacher_keys[key] for key in (*weights.mapped, *self.streams, *self.batch_norms)}
        self.wanted |= {self.teacher_keys.get(self.sums[key].after) for key in skipped.keys() & self.sums.keys()}
        self._means = {}  # {key of a dense weight that adds to a stream: the mean of what it should give}
        again = (key for key in weights.mapped if self.teacher_keys[key] in weights.stats.again)
        self._again = {key: (Moments(), Moments()) for key in again}

    def see(self, passes: list, halts: list[Halt]) -> bool:
        """Look at the layer before which all batches wait, and fit it if it needs that. Returns whether it did."""
        key = halts[0].key
        if not any(key in those for those in (self.streams, self.weights.mapped, self.batch_norms)):
            return False
        taught = [one.taught(self.teacher_keys[key]) for one in passes]
        if None in taught:
            return False  # the teacher's layer did not run, or not as often
        if key in self.batch_norms:
            self._fit_batch_norm(key, halts, taught)
        if key in self.streams:
            for one, ours, theirs in zip(passes, halts, taught, strict=True):
                one.streams[key] = self._stream(key, ours, theirs)
        if key not in self.weights.mapped:
            return False
        across, own = self._again.get(key) or (Moments(), Moments())  # of what is wanted with z, and of z alone
        for one, ours, theirs in zip(passes, halts, taught, strict=True):
            if key in self.sums:
                z = self.weights.factors(key, ours.x)
            else:
                z = self.weights.without_shift(key, rows(self.weights.student, key, ours.x))
            wanted = self._wanted(key, one, theirs)
            if len(wanted) != len(z):  # the layer works along another axis than that of its neurons, such as tokens
                return False
            across.add(wanted, z)
            own.add(z, z)
        bias = self.weights.bias_apart(key)
        moments = across.mean[:-1], own.mean
        if key in self.sums:
            self._means[key] = moments[0][:, -1]
            self.weights.solve_outputs(key, *moments)
        else:
            self.weights.solve_up_map(key, *moments)
        if bias is not None:
            for one, ours in zip(passes, halts, strict=True):
                one.student.add_late((self.weights.bias_apart(key) - bias).to(ours.x))
        return True

    def _fit_batch_norm(self, key, halts, taught):
        norm, taken, given = self.batch_norms[key], Variances(), Variances()
        for ours, theirs in zip(halts, taught, strict=True):
            taken.add(rows(self.weights.student, key, ours.x))
            given.add(rows(self.weights.teacher, theirs.key, theirs.y))
        wanted = self.weights.map_output(self.weights.entries[key], given.mean)
        if halts[0].behind in self._means:  # the stream should come to where the teacher's is
            wanted = mean_given(norm, self._means[halts[0].behind])
        fit_batch_norm(norm, taken, wanted)

    def _stream(self, key, ours, theirs):
        """(Q x, s) as rows: where the student's stream should be, and where it is."""
        should, is_now = theirs.x, ours.x
        if key in self.given:
            should, is_now = theirs.y, given_by(self.batch_norms[key], ours.x)
        should = self.weights.map_stream(self.streams[key], rows(self.weights.teacher, theirs.key, should))
        return should, rows(self.weights.student, key, is_now).clone()

    def _wanted(self, key, one, theirs):
        """What the layer should give, if it adds to a stream; else what the teacher's layer takes. Rows."""
        if key not in self.sums:
            return rows(self.weights.teacher, theirs.key, theirs.x)
        found = self.sums[key]
        should, is_now = one.streams.pop(found.before) if self.last[found.before] == key else one.streams[found.before]
        teacher_key = self.teacher_keys.get(found.after) if key in self.skipped else None
        after = None if teacher_key is None else one.ahead(teacher_key)
        if after is not None:
            x = rows(self.weights.teacher, after.key, after.x)
            lost = self.weights.map_stream(self.streams[found.before], x) - is_now - found.constant.to(is_now)
            given = 0
        else:
            lost = should - is_now
            given = rows(self.weights.student, key, self.weights.map_output(self.weights.entries[key], theirs.y))
        lost = by_place(lost, one.images) if found.by_place else lost
        gain = found.gain.to(lost)
        return given + torch.where(gain.abs() < LEAST_GAIN * gain.abs().max(), 0, lost / gain)


class _Pass:
    """Teacher and student on one batch.

    Attributes:
        images: their number.
        streams: {key of what takes a stream: (where the student's stream should be, where it is)}, rows.
    """

    def __init__(self, fit: _Fit, batch: Tensor):
        self.teacher = SteppedPass(fit.weights.teacher, batch, ahead=False)
        self.student = SteppedPass(fit.weights.student, batch, ahead=True)
        self.images = images_in(batch)
        self.streams, self._wanted, self._kept = {}, fit.wanted, {}

    def taught(self, key: str) -> Halt | None:
        """The next time that the teacher ran this layer; None if it does not do so again."""
        if self._kept.get(key):
            return self._kept[key].pop(0)
        while (halt := self.teacher.next()) is not None:
            if halt.key == key:
                return halt
            self._keep(halt)
        return None

    def ahead(self, key: str) -> Halt | None:
        """As ``taught``, but ``taught`` will give the same halt once more."""
        halt = self.taught(key)
        if halt is not None:
            self._keep(halt)
        return halt

    def close(self) -> None:
        """End both passes where they stand."""
        self.teacher.close()
        self.student.close()

    def _keep(self, halt):
        if halt.key in self._wanted:
            x, y = (value.clone() for value in (halt.x, halt.y))  # the model may change them in place
            self._kept.setdefault(halt.key, []).append(Halt(halt.key, x, y))
