"""First weights by projection, from two models and images: what they are made from is planned as ever, how is fitted.

Two passes over the images: in the first the teacher shows the moments of what its layers take (survey.py), from which
the write of every set of neurons is chosen (writes.py); in the second the student's layers learn to read (fitting.py),
and to write for layers that are left out (gaps.py).
"""

import inspect
import re
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn as nn
from tqdm import tqdm

from weight_selection.errors import InputError
from weight_selection.plan import Anatomy, anatomy, checked_weight, plan_selection
from weight_selection.projection.activation_stats import Side, Survey
from weight_selection.projection.fit import Fit, spaces_of
from weight_selection.projection.images import Calibration, check_batches
from weight_selection.projection.maps import choose_writes
from weight_selection.projection.skipped_layers import Gaps, find_gaps
from weight_selection.projection.symmetries import Structure
from weight_selection.projection.symmetry_check import check_free, check_streams
from weight_selection.sources.architectures import classifier_pattern
from weight_selection.sources.timm_models import check_images, input_size


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
    calibration_size: int | None = None,
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
        calibration_images, calibration_size: ``count`` and ``side`` of noise or a directory, as for ``Calibration``.
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
    teacher.eval()
    whole, plan = _at_geometry(teacher, student, taken_apart, plan_options)
    if isinstance(calibration, str | Path):
        calibration = Calibration(
            calibration, calibration_images, calibration_size, input_size(student), teacher.pretrained_cfg, seed
        )
    else:
        calibration = check_batches(calibration, input_size(student)[0], calibration_images, calibration_size)
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
    some = next(iter(images)).to(next(teacher.model.parameters()))
    height, width = some.shape[2:]
    for who, side in (("student", student), ("teacher", teacher)):
        check_images(
            side.model,
            some[:1],
            f"calibration: the {who} cannot take {height} x {width} pixels; give images of its size, or leave "
            "--calibration_size out",
        )
    survey = Survey(teacher, _shown(images, "teacher", teacher))
    check_free(teacher, student, survey, some, rotate)
    entries = {entry.key: entry for entry in plan if entry.role == "selected"}
    pairs = spaces_of(plan, teacher.anatomy, student.anatomy)
    writes = choose_writes(entries, pairs, teacher, student, survey, rotate)
    fit = Fit(entries, teacher, student, survey, writes)
    gaps = find_gaps(entries, teacher.anatomy.layers, student.anatomy.layers, fit.rows)
    fit.fit_reads(_shown(images, "student", teacher), Gaps(gaps, teacher, some))
    return {key: fit.state[key].to("cpu", copy=True) for key in entries}


def _at_geometry(teacher, student, taken_apart, plan_options):
    """Bring the teacher to the student's images: its anatomy, and a plan without resampling."""
    if input_size(teacher)[0] != input_size(student)[0]:
        raise InputError("in_chans: the teacher cannot see images of other channels than its own; select by a rule")

    def planned():
        whole = anatomy(teacher, "teacher")
        plan = plan_selection(whole, taken_apart, **plan_options)
        return whole, plan, [entry.key for entry in plan if entry.resampling is not None]

    whole, plan, resampled = planned()
    if resampled and hasattr(teacher, "set_input_size"):
        patch = getattr(getattr(student, "patch_embed", None), "patch_size", None)
        accepted = inspect.signature(teacher.set_input_size).parameters
        sizes = {"img_size": input_size(student)[1:]} | ({"patch_size": patch} if "patch_size" in accepted else {})
        teacher.set_input_size(**sizes)
        whole, plan, resampled = planned()
    if resampled:
        raise InputError(
            f"{resampled[0]}: the teacher's images or patches are of another size than the student's; give the teacher "
            "the student's (--teacher_kwargs img_size=N)"
        )
    return whole, plan


def _shown(images, who, teacher):
    """Batches on the teacher's device and in its precision, with progress."""
    with tqdm(images, desc=f"calibration, {who}", unit="batch", leave=False) as batches:
        for batch in batches:
            yield batch.to(next(teacher.model.parameters()))


def describer(plan: list, structure: Structure, teacher: Anatomy, student: Anatomy, rotate: bool):
    """A function that says of an entry of a plan, in words, what is done with it."""
    reads = {entry.key for entry in plan if entry.source in structure.dense and 1 in entry.parts}
    entries = {entry.key: entry for entry in plan if entry.role == "selected"}
    gaps = find_gaps(entries, teacher.layers, student.layers, reads)
    pairs = spaces_of(plan, teacher, student)
    roles = {our: structure.role(their, rotate) for our, their in pairs.items()}
    sizes = {our: (teacher.neurons.spaces[t].size, student.neurons.spaces[our].size) for our, t in pairs.items()}

    def describe(entry):
        if entry.role != "selected":
            return entry.describe("")
        words = [] if entry.resampling is None else [entry.resampling.words]
        for dim in entry.parts:
            if not (entry.key in reads and dim == 1):
                spaces = [part.space for part in student.neurons.parts[entry.key][dim]]
                words += [roles[space] for space in spaces if len(set(sizes[space])) > 1]
        words += ["least-squares read"] * (entry.key in reads)
        if entry.key in gaps:
            words.append(f"writes for the layers up to {gaps[entry.key].last} too, if it ends in a sum")
        return ", ".join(dict.fromkeys(words)) or "copy"

    return describe
