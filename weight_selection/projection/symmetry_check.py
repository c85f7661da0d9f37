"""Check of the symmetries: rotate streams and mix heads of the teacher at random, which must change nothing."""

from torch import Tensor
from tqdm import tqdm

from weight_selection.errors import InputError
from weight_selection.modules import copy_of
from weight_selection.options import SelectionOptions
from weight_selection.plan import plan_selection
from weight_selection.projection.activation_stats import ActivationStats
from weight_selection.projection.activation_tap import ActivationTap
from weight_selection.projection.maps import random_down_maps
from weight_selection.projection.student_weights import StudentWeights
from weight_selection.projection.symmetries import Symmetries
from weight_selection.projection.traced_model import TracedModel, paired_groups

TOLERANCE = 1e-2  # relative; without the symmetry the difference is as large as what is compared


def check_streams(symmetries: Symmetries, name: str) -> None:
    """Raise InputError if no residual stream of a model can be rotated; ``name`` is what to call the model."""
    if not symmetries.rotated():
        raise InputError(
            f"--element_selection project: {name} has no residual stream that can be rotated: "
            f"{symmetries.why_none_rotatable()}; choose greedy, which keeps coordinates"
        )


def check_symmetries(stats: ActivationStats, student: TracedModel, batch: Tensor, rotate: bool) -> None:
    """Check the symmetries that projection is going to use.

    Where heads cannot be mixed, the program says so and selects them uniformly in both models.

    Args:
        stats: of the teacher.
        batch: of images.
        rotate: whether streams are going to be rotated.

    Raises:
        InputError: the teacher computes something else when its streams are rotated.
    """
    teacher = stats.teacher
    kinds = {}
    for attention in filter(lambda attention: attention.free, teacher.symmetries.attentions.values()):
        kinds.setdefault(type(teacher.symmetries.modules[attention.name]), []).append(attention)
    for kind, attentions in kinds.items():
        if not _is_unchanged(stats, batch, [], attentions):
            tqdm.write(f"{kind.__name__}: queries, keys and values are not free inside a head; selected uniformly")
            for traced in (teacher, student):
                traced.symmetries.leave_heads(kind)
    streams = teacher.symmetries.rotated(rotate)
    takers = [key for group in streams for key in teacher.symmetries.takers(group) if key in stats.moments]
    normalised = all(key in stats.norm_of for key in takers)
    if streams and not (normalised and _is_unchanged(stats, batch, streams, [])):
        raise InputError(
            "--element_selection project: this teacher computes something else when its residual stream is rotated; "
            "choose greedy, which keeps coordinates"
        )


def _is_unchanged(stats, batch, streams, attentions):
    """Whether the dense layers give the same when a copy of the teacher has its streams rotated and its heads mixed."""
    teacher = stats.teacher
    entries = plan_selection(teacher.structure, teacher.structure, SelectionOptions()).selected
    mixed = TracedModel(copy_of(teacher.model), teacher.structure, teacher.symmetries)
    maps = random_down_maps(teacher, paired_groups(entries), streams, attentions)
    weights = StudentWeights(entries, mixed, stats, maps)
    comparison = _Comparison(weights)
    with ActivationTap(teacher, comparison.record, comparison.record):
        teacher.run(batch)
    with ActivationTap(mixed, comparison.compare, comparison.replace_norm):
        mixed.run(batch)
    return bool(comparison.errors) and max(comparison.errors) < TOLERANCE


class _Comparison:
    """Compares the layers of a teacher with those of its mixed copy.

    Attributes:
        errors: the relative difference of each output that mixing should not change.
    """

    def __init__(self, weights: StudentWeights):
        self.weights, self.errors = weights, []
        self._given = {}  # {key: [what the teacher's layer or norm gave, each time that it ran]}

    def record(self, key, x, y):
        self._given.setdefault(key, []).append(y.clone())
        return y

    def compare(self, key, x, y):
        expected = self._given[key].pop(0)
        if self.weights.keeps_outputs(key):
            self.errors.append(((y - expected).norm() / expected.norm().clamp(min=1e-30)).item())
        return y

    def replace_norm(self, key, x, y):
        """A norm from which no dense layer takes is only nearly right: go on with what it should give."""
        expected = self._given[key].pop(0)
        stream = self.weights.student.group_of(key)
        if stream not in self.weights.maps.rotated or key in self.weights.stats.norm_of.values():
            return y
        return self.weights.map_stream(stream, expected)
