"""Projection: a student's first weights, made from a teacher's by least squares on a few images.

The plan says which teacher tensor each student tensor comes from; least squares decides the values. First the teacher
sees some of the images and shows the moments of its activations (activation_stats.py). From these we choose the down
map of every neuron group (maps.py). Then both models see all images, and we fit the student's layers one after the
other (up_maps.py).
"""

import inspect
import re
from collections.abc import Callable, Collection, Iterable, Mapping

import torch
import torch.nn as nn
from tqdm import tqdm

from weight_selection.apply import checked_weight
from weight_selection.errors import InputError
from weight_selection.geometry import find_geometry
from weight_selection.modules import tensors_of
from weight_selection.projection.activation_stats import ActivationStats
from weight_selection.projection.images import first_images, image_shape, images_in
from weight_selection.projection.maps import choose_down_maps
from weight_selection.projection.skipped_layers import find_skipped
from weight_selection.projection.student_weights import StudentWeights
from weight_selection.projection.symmetry_check import check_symmetries
from weight_selection.projection.traced_model import TracedModel
from weight_selection.projection.up_maps import fit_up_maps
from weight_selection.report import role_words
from weight_selection.sources.architectures import NO_KEYS
from weight_selection.sources.facts import facts_of, library_of
from weight_selection.structure import ModelStructure

STATS_IMAGES = 64  # down maps need fewer images than least squares do
CHECK_IMAGES = 4


def load_teacher(
    teacher: nn.Module, structure: ModelStructure, weights: Mapping, option: str, include_head: bool = False
) -> dict:
    """Load all of a teacher's weights, in single or double precision.

    Args:
        teacher: it is changed.
        structure: of the teacher.
        weights: {key: tensor}.
        option: where the weights came from, for errors.
        include_head: the classifier is selected. If not, it may be missing or have other classes; then it is zero.

    Returns:
        {key: type of the given weight}.

    Raises:
        InputError: as ``checked_weight``.
    """
    may_be_absent = [structure.architecture.classifier or NO_KEYS, structure.facts.spare or NO_KEYS]
    state = {}
    for key, own in tensors_of(teacher).items():
        weight = weights.get(key, weights.get(structure.tied.get(key)))
        optional = any(re.search(pattern, key) for pattern in may_be_absent)
        if not include_head and optional and (weight is None or weight.shape != own.shape):
            state[key] = torch.zeros_like(own)
            continue
        state[key] = checked_weight(key, tuple(own.shape), weight, option)
    if all(value.dtype != torch.float64 for value in state.values()):
        teacher.float()
    teacher.load_state_dict({**teacher.state_dict(), **state})
    return {key: value.dtype for key, value in state.items()}


def match_geometry(teacher: nn.Module, student: nn.Module) -> None:
    """Bring the teacher to the student's image size and patch size, if their positions differ.

    timm resamples what the teacher knows of positions. Call this before tracing, on the meta device too. A teacher that
    cannot be brought there stays as it is; ``project`` then refuses it.

    Args:
        teacher: it may be changed.
        student: only its geometry is used.
    """
    if not library_of(teacher) == library_of(student) == "timm":
        return
    from weight_selection.sources.timm_models import input_size

    (channels, *_), (taken, *size) = input_size(teacher), input_size(student)
    if channels != taken or not hasattr(teacher, "set_input_size") or _has_same_positions(teacher, student):
        return
    patch = getattr(getattr(student, "patch_embed", None), "patch_size", None)
    accepted = inspect.signature(teacher.set_input_size).parameters
    teacher.set_input_size(img_size=tuple(size), **({"patch_size": patch} if "patch_size" in accepted else {}))
    teacher.pretrained_cfg = {**teacher.pretrained_cfg, "input_size": (taken, *size)}


@torch.no_grad()
def project(
    entries: dict,
    teacher: TracedModel,
    student: TracedModel,
    images: Iterable,
    method: str,
    left_out: Collection = (),
) -> dict:
    """Carry out a plan by projection.

    Args:
        entries: {student's key: its entry of the plan}, of the selected tensors.
        teacher, student: on one device, in evaluation mode. The student gets the values of all entries.
        images: batches of normalised images, (n, channels, height, width), or of other inputs, dicts of tensors. They
            are iterated three times. The first ``STATS_IMAGES`` of them decide the down maps.
        method: ``project`` rotates residual streams; ``greedy`` keeps coordinates of them.
        left_out: keys of entries of a classifier that is fitted too, but not returned.

    Returns:
        The student's values of all entries but ``left_out``, in the order of its state_dict, on the CPU.

    Raises:
        InputError: a model cannot take the images, or activations are not finite.
    """
    rotate = method == "project"
    batch = teacher.placed(next(iter(images)))
    for name, traced in (("student", student), ("teacher", teacher)):
        _check_takes(traced, batch, name)
    stats = ActivationStats(teacher, _shown(images, teacher))
    check_symmetries(stats, student, first_images(batch, CHECK_IMAGES), rotate)
    maps = choose_down_maps(entries, student, stats, rotate)
    weights = StudentWeights(entries, student, stats, maps)
    skipped = find_skipped(entries, teacher.structure.layers, student.structure.layers, weights.mapped)
    fit_up_maps(weights, skipped, map(teacher.placed, images))
    return {key: value.to("cpu", copy=True) for key, value in weights.without(left_out).items()}


def check_positions(entries: dict, teacher: ModelStructure, student: ModelStructure) -> None:
    """Raise InputError if the plan resamples positions or channels: the teacher cannot see such images."""
    theirs, ours = (image_shape(structure.facts.inputs) for structure in (teacher, student))
    if theirs and ours and theirs[1] != ours[1]:
        raise InputError("in_chans: the teacher cannot see images of other channels than its own; select by a rule")
    resampled = next((key for key, entry in entries.items() if entry.resampling is not None), None)
    if resampled is not None:
        raise InputError(
            f"{resampled}: the teacher's images or patches are of another size than the student's; give the teacher "
            "the student's (--teacher_kwargs img_size=N)"
        )


def describer(
    entries: dict, takes: dict, teacher: ModelStructure, student: ModelStructure, treatments: dict
) -> Callable:
    """A function that says in words how projection makes an entry of a plan. No weights are needed.

    Args:
        entries: {student's key: its entry of the plan}, of the selected tensors.
        takes: ``Symmetries.dense`` of the teacher.
        teacher, student: their structures.
        treatments: {number of a student's group that gets smaller: what is done with it}.
    """
    up_mapped = {key for key, entry in entries.items() if takes.get(entry.teacher_key) in entry.slices}
    skipped = find_skipped(entries, teacher.layers, student.layers, up_mapped)

    def describe(entry) -> str:
        if entry.role != "selected":
            return role_words(entry)
        words = [] if entry.resampling is None else [entry.resampling.words]
        for dim in entry.slices:
            if not (entry.key in up_mapped and dim == takes[entry.teacher_key]):
                groups = [pair.group for pair in entry.slices[dim]]
                words += [treatments[group] for group in groups if group in treatments]
        words += ["least-squares up map"] * (entry.key in up_mapped)
        if entry.key in skipped:
            words.append(f"also gives what the layers up to {skipped[entry.key].last} add, if it ends in a sum")
        return ", ".join(dict.fromkeys(words)) or "copy"

    return describe


def _has_same_positions(teacher, student):
    """Whether the teacher's position embeddings, windows and patches are of the student's size."""
    facts = [facts_of(model) for model in (teacher, student)]
    convolutions, grids = [one.first_convolutions for one in facts], [one.grid for one in facts]
    theirs, ours = map(find_geometry, (teacher, student), convolutions, grids)
    embedded = all(isinstance(getattr(model, "pos_embed", None), torch.Tensor) for model in (teacher, student))
    if embedded and theirs.grid != ours.grid:
        return False
    if any(theirs.windows.get(key, window) != window for key, window in ours.windows.items()):
        return False
    first, second = ({key: c.kernel_size for key, c in found.items()} for found in convolutions)
    return all(first.get(key, size) == size for key, size in second.items())


def _check_takes(traced, batch, name):
    """Raise InputError unless a model takes such a batch."""
    if isinstance(batch, torch.Tensor) and batch.ndim < 4:
        words = f"take batches of {tuple(batch.shape)}; give what its forward takes, or dicts with its arguments' names"
    elif isinstance(batch, torch.Tensor):
        words = "take {} x {} pixels; give images of its size, or leave --calibration_size out".format(*batch.shape[2:])
    else:
        words = f"take batches of {', '.join(batch)}; give what its forward takes"
    try:
        traced.run(first_images(batch, 1))
    except (RuntimeError, AssertionError, ValueError, TypeError, LookupError) as error:  # too small, other arguments
        raise InputError(f"calibration: the {name} cannot {words}: {error}") from error


def _shown(images, teacher):
    """The first batches, on the models' device, with a progress bar."""
    count = 0
    with tqdm(images, desc="calibration, teacher", unit="batch", leave=False) as batches:
        for batch in map(teacher.placed, batches):
            yield batch
            count += images_in(batch)
            if count >= STATS_IMAGES:
                break
