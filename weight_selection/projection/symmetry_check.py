"""Are streams and heads as free as they look? They are mixed at random in the teacher, which must change nothing."""

import copy

from torch import Tensor
from tqdm import tqdm

from weight_selection.errors import InputError
from weight_selection.plan import plan_selection
from weight_selection.projection.activation_stats import Side, Survey
from weight_selection.projection.fit import Fit, spaces_of
from weight_selection.projection.images import Tap
from weight_selection.projection.maps import mixed_writes
from weight_selection.projection.symmetries import ROTATED, Structure

TOLERANCE = 1e-2  # relative; where neurons are not free the difference is as large as what is compared


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
