"""The second pass over the images: fit the up map of every dense layer of the student.

The student runs beside the teacher. We replace the output of each of its dense layers by Q y, the teacher's output y
mapped down. So each layer takes what it would take if all layers before it were as good as they can be.
"""

from collections.abc import Iterable

from torch import Tensor

from weight_selection.projection.activation_tap import ActivationTap, vectors
from weight_selection.projection.equations import Moments
from weight_selection.projection.skipped_layers import SkippedLayers
from weight_selection.projection.student_weights import StudentWeights


def fit_up_maps(weights: StudentWeights, skipped: SkippedLayers, images: Iterable) -> None:
    """Fit the student's up maps, and what its layers give in place of layers that it leaves out.

    Args:
        weights: of the student; they are changed.
        skipped: the layers that it leaves out.
        images: batches on the device of the models.
    """
    second = _SecondPass(weights, skipped)
    for batch in images:
        second.see(batch)
    second.solve()


class _SecondPass:
    """Collects the moments of the student's inputs, z, with the teacher's, x, and with what is left out, Q m."""

    def __init__(self, weights: StudentWeights, skipped: SkippedLayers):
        self.weights, self.skipped = weights, skipped
        self.across, self.own = ({key: Moments() for key in weights.rows} for _ in range(2))
        self.left_out = {key: Moments() for key in skipped.bridged}
        self._sources = {entry.teacher_key for entry in weights.entries.values()}
        self._taught = {}  # of a batch: {key of the teacher's dense weight: [(input, output) of each time that it ran]}
        self._layer_outputs = {}  # of a batch: {name of a layer of the teacher's: output}

    def see(self, batch: Tensor) -> None:
        """Show a batch first to the teacher, then to the student."""
        teacher, student = self.weights.teacher, self.weights.student
        self._taught = {}
        with ActivationTap(teacher.model, self._record), self.skipped.watch() as self._layer_outputs:
            teacher.run(batch)
        with ActivationTap(student.model, self._replace):
            student.run(batch)

    def solve(self) -> None:
        """Solve (7) and (10) for all layers that ran."""
        for key, own in self.own.items():
            if own.count:
                self.weights.solve_up_map(key, self.across[key].mean[:-1], own.mean)
        for key, left_out in self.left_out.items():
            if left_out.count:
                self.weights.add_skipped(key, left_out.mean[:-1], self.own[key].mean)
        self.weights.place_constants()

    def _record(self, key, x, y):
        if key in self._sources:
            self._taught.setdefault(key, []).append((x.clone(), y.clone()))  # the model may change them in place
        return y

    def _replace(self, key, z, y):
        entry = self.weights.entries.get(key)
        if entry is None or not self._taught.get(entry.teacher_key):
            return y
        x, theirs = self._taught[entry.teacher_key].pop(0)
        target = self.weights.map_output(entry, theirs)
        if target.shape != y.shape:  # the layer works along another axis than that of its neurons, such as tokens
            return y
        z = vectors(z, len(entry.shape))
        if key in self.own:
            self.across[key].add(vectors(x, len(entry.teacher_shape)), z)
            self.own[key].add(z, z)
        if key in self.left_out:
            added = self.weights.map_output(entry, self.skipped.missing(key, self._layer_outputs, theirs))
            self.left_out[key].add(vectors(added, len(entry.shape)), z)
            target = target + added
        return target
