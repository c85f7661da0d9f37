"""Projection: a student's first weights, made from a teacher's by least squares on a few images.

The plan says which teacher tensor each student tensor comes from; least squares decides the values. Both models see the
images in two passes. In the first the teacher shows the moments of its activations (activation_stats.py). From these we
choose the down map of every neuron group (maps.py). In the second pass we fit the up map of every dense layer of the
student (up_maps.py), and what its layers give in place of layers that it leaves out (skipped_layers.py).
"""

import inspect
import re
from collections.abc import Callable, Iterable, Mapping

import torch
import torch.nn as nn
from tqdm import tqdm

from weight_selection.apply import checked_weight
from weight_selection.errors import InputError
from weight_selection.geometry import find_geometry
from weight_selection.plan import ModelStructure
from weight_selection.projection.activation_stats import ActivationStats
from weight_selection.projection.maps import choose_down_maps
from weight_selection.projection.skipped_layers import SkippedLayers, find_skipped
from weight_selection.projection.student_weights import StudentWeights
from weight_selection.projection.symmetries import Symmetries
from weight_selection.projection.symmetry_check import check_streams, check_symmetries
from weight_selection.projection.traced_model import TracedModel, paired_groups
from weight_selection.projection.up_maps import fit_up_maps
from weight_selection.report import role_words
from weight_selection.sources.facts import facts_of
from weight_selection.sources.timm_models import check_images, first_convolutions, input_size


def load_teacher(teacher: nn.Module, weights: Mapping, option: str, include_head: bool = False) -> None:
    """Load all of a teacher's weights, in single or double precision.

    Args:
        teacher: it is changed.
        weights: {key: tensor}.
        option: where the weights came from, for errors.
        include_head: the classifier is selected. If not, it may be missing or have other classes; then it is zero.

    Raises:
        InputError: as ``checked_weight``.
    """
    pattern = facts_of(teacher).architecture.classifier
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


def match_geometry(teacher: nn.Module, student: nn.Module) -> None:
    """Bring the teacher to the student's image size and patch size, if their positions differ.

    timm resamples what the teacher knows of positions. Call this before tracing, on the meta device too. A teacher that
    cannot be brought there stays as it is; ``project`` then refuses it.

    Args:
        teacher: it may be changed.
        student: only its geometry is used.
    """
    (channels, *_), (taken, *size) = input_size(teacher), input_size(student)
    if channels != taken or not hasattr(teacher, "set_input_size") or _has_same_positions(teacher, student):
        return
    patch = getattr(getattr(student, "patch_embed", None), "patch_size", None)
    accepted = inspect.signature(teacher.set_input_size).parameters
    teacher.set_input_size(img_size=tuple(size), **({"patch_size": patch} if "patch_size" in accepted else {}))
    teacher.pretrained_cfg = {**teacher.pretrained_cfg, "input_size": (taken, *size)}


@torch.no_grad()
def project(entries: dict, teacher: TracedModel, student: TracedModel, images: Iterable, method: str) -> dict:
    """Carry out a plan by projection.

    Args:
        entries: {student's key: its entry of the plan}, of the selected tensors.
        teacher, student: on one device, in evaluation mode. The student's weights are replaced.
        images: batches of normalised images, (n, channels, height, width); they are gone through three times.
        method: ``project`` rotates residual streams; ``greedy`` keeps coordinates of them.

    Returns:
        The selected part of the student's state_dict, in its order, on the CPU.

    Raises:
        InputError: the plan resamples positions, the teacher has no stream that can be rotated, a model cannot take the
            images, or activations are not finite.
    """
    rotate = method == "project"
    check_positions(entries, teacher.model, student.model)
    if rotate:
        check_streams(teacher.symmetries, type(teacher.model).__name__)
    batch = next(iter(images)).to(next(teacher.model.parameters()))
    _check_size(batch, teacher.model, student.model)
    stats = ActivationStats(teacher, _shown(images, "teacher", batch))
    check_symmetries(stats, student, batch, rotate)
    maps = choose_down_maps(entries, student, stats, rotate)
    weights = StudentWeights(entries, student, stats, maps)
    skipped = find_skipped(entries, teacher.structure.layers, student.structure.layers, weights.rows)
    fit_up_maps(weights, SkippedLayers(skipped, teacher, batch), _shown(images, "student", batch))
    return {key: weights.state[key].to("cpu", copy=True) for key in entries}


def check_positions(entries: dict, teacher: nn.Module, student: nn.Module) -> None:
    """Raise InputError if the plan resamples positions or channels: the teacher cannot see such images."""
    if input_size(teacher)[0] != input_size(student)[0]:
        raise InputError("in_chans: the teacher cannot see images of other channels than its own; select by a rule")
    resampled = next((key for key, entry in entries.items() if entry.resampling is not None), None)
    if resampled is not None:
        raise InputError(
            f"{resampled}: the teacher's images or patches are of another size than the student's; give the teacher "
            "the student's (--teacher_kwargs img_size=N)"
        )


def describer(
    entries: dict, symmetries: Symmetries, teacher: ModelStructure, student: ModelStructure, rotate: bool
) -> Callable:
    """A function that says in words how projection makes an entry of a plan. No weights are needed.

    Args:
        entries: {student's key: its entry of the plan}, of the selected tensors.
        symmetries: of the teacher.
        teacher, student: their structures.
        rotate: whether streams are going to be rotated.
    """
    takes = symmetries.dense
    up_mapped = {key for key, entry in entries.items() if takes.get(entry.teacher_key) in entry.slices}
    skipped = find_skipped(entries, teacher.layers, student.layers, up_mapped)
    treatments = {
        our: symmetries.treatment(their, rotate)
        for our, their in paired_groups(entries, teacher, student).items()
        if teacher.neurons.groups[their].size != student.neurons.groups[our].size
    }

    def describe(entry) -> str:
        if entry.role != "selected":
            return role_words(entry)
        words = [] if entry.resampling is None else [entry.resampling.words]
        for dim in entry.slices:
            if not (entry.key in up_mapped and dim == takes[entry.teacher_key]):
                groups = [part.group for part in student.neurons.slices[entry.key][dim]]
                words += [treatments[group] for group in groups if group in treatments]
        words += ["least-squares read"] * (entry.key in up_mapped)
        if entry.key in skipped:
            words.append(f"writes for the layers up to {skipped[entry.key].last} too, if it ends in a sum")
        return ", ".join(dict.fromkeys(words)) or "copy"

    return describe


def _has_same_positions(teacher, student):
    """Whether the teacher's position embeddings, windows and patches are of the student's size."""
    convolutions = [first_convolutions(model) for model in (teacher, student)]
    grids = [facts_of(model).grid for model in (teacher, student)]
    theirs, ours = map(find_geometry, (teacher, student), convolutions, grids)
    embedded = all(isinstance(getattr(model, "pos_embed", None), torch.Tensor) for model in (teacher, student))
    if embedded and theirs.grid != ours.grid:
        return False
    if any(theirs.windows.get(key, window) != window for key, window in ours.windows.items()):
        return False
    first, second = ({key: c.kernel_size for key, c in found.items()} for found in convolutions)
    return all(first.get(key, size) == size for key, size in second.items())


def _check_size(batch, teacher, student):
    """Raise InputError unless both models take images of this size."""
    height, width = batch.shape[2:]
    for name, model in (("student", student), ("teacher", teacher)):
        check_images(
            model,
            batch[:1],
            f"calibration: the {name} cannot take {height} x {width} pixels; give images of its size, or leave "
            "--calibration_size out",
        )


def _shown(images, name, like):
    """Batches in the device and precision of ``like``, with progress; ``name`` is the model that sees them."""
    with tqdm(images, desc=f"calibration, {name}", unit="batch", leave=False) as batches:
        for batch in batches:
            yield batch.to(like)
