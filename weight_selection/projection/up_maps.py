"""The second pass over the images: fit the student's dense layers one after the other.

Teacher and student go through the images side by side. Before each dense layer all batches wait. By then the layers
before it are final, so we fit this one to what the student really computes:

- A layer that adds to a residual stream brings the student's stream to where the teacher's is, Q x. So it also makes up
  for what all layers before it have lost. An activation behind the sum changes nothing about this.               (10)
- Any other layer restores what the teacher's layer takes, by the up map of (7).
- A batch normalisation gets the statistics of what it takes, and gives the mean that it should, by (13).

The teacher follows batch by batch, and stands before what it need not run yet. So at most one batch at a time has the
teacher's hidden units in memory.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

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


class Taught(NamedTuple):
    """What a layer of the teacher takes and gives; None where no fit needs it."""

    key: str
    x: Tensor | None
    y: Tensor | None


class _Fit:
    """Fits a layer when all batches wait before it.

    Attributes:
        takes, gives: keys of the teacher's layers of which we need what they take, or what they give.
    """

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
        takers = self.streams.keys() - self.given | weights.mapped.keys() - self.sums.keys()
        takers |= {self.sums[key].after for key in skipped.keys() & self.sums.keys()} & self.teacher_keys.keys()
        self.takes = {self.teacher_keys[key] for key in takers}
        self.gives = {self.teacher_keys[key] for key in (*self.sums, *self.batch_norms)}
        self._means = {}  # {key of a dense weight that adds to a stream: the mean of what it should give}
        again = (key for key in weights.mapped if self.teacher_keys[key] in weights.stats.again)
        self._again = {key: (Moments(), Moments()) for key in again}

    def see(self, passes: list, halts: list[Halt]) -> bool:
        """Look at the layer before which all batches wait, and fit it if it needs that. Returns whether it did."""
        key = halts[0].key
        if not any(key in those for those in (self.streams, self.weights.mapped, self.batch_norms)):
            return False
        taught = (one.taught(self.teacher_keys[key]) for one in passes)  # in turn, so that no two hold it
        if key in self.batch_norms:
            taught = list(taught)
            if None not in taught:
                self._fit_batch_norm(key, halts, taught)
        across, own = self._again.get(key) or (Moments(), Moments())  # of what is wanted with z, and of z alone
        for one, ours, theirs in zip(passes, halts, taught, strict=True):
            if theirs is None:
                return False  # the teacher's layer did not run, or not as often
            if key in self.streams:
                one.streams[key] = self._stream(key, ours, theirs)
            if key in self.weights.mapped:
                if key in self.sums:
                    z = self.weights.factors(key, ours.x)
                else:
                    z = self.weights.without_shift(key, rows(self.weights.student, key, ours.x))
                wanted = self._wanted(key, one, theirs)
                aligned = len(wanted) == len(z)  # not if the layer works along another axis than that of its neurons
                if aligned:
                    across.add(wanted, z)
                    own.add(z, z)
        if key not in self.weights.mapped or not aligned:
            return False
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
            x = rows(self.weights.teacher, teacher_key, after)
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
        self.teacher = SteppedPass(fit.weights.teacher, batch, fit.gives)
        self.student = SteppedPass(fit.weights.student, batch)
        self.images, self.streams = images_in(batch), {}
        self._takes, self._gives = fit.takes, fit.gives
        self._taken, self._here = defaultdict(list), None  # {key: [what it takes]}; where the teacher stands

    def taught(self, key: str) -> Taught | None:
        """What the teacher's layer takes and gives the next time that it runs; None if it does not run again."""
        y = self._next(self.teacher.given, key) if key in self._gives else None
        x = self._next(self._taken, key) if key in self._takes else None
        return None if x is None and y is None else Taught(key, x, y)

    def ahead(self, key: str) -> Tensor | None:
        """What the teacher's layer takes the next time that it runs; ``taught`` will give it once more."""
        x = self._next(self._taken, key)
        if x is not None:
            self._taken[key].insert(0, x)
        return x

    def close(self) -> None:
        """End both passes where they stand."""
        self.teacher.close()
        self.student.close()

    def _next(self, found, key):
        while not found[key] and self._step():
            pass
        return found[key].pop(0) if found[key] else None

    def _step(self):
        """Let the teacher go on to its next halt. Returns whether there is one."""
        if waiting := self._taken[self._here]:
            waiting[-1] = waiting[-1].clone()  # the model may change in place what it showed here
        halt = self.teacher.next()
        self._here = None if halt is None else halt.key
        if self._here in self._takes:
            self._taken[halt.key].append(halt.x)
        return halt is not None
