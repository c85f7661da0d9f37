"""The plan: what every student tensor is made from, decided from shapes alone; and carrying it out."""

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn

from weight_selection.errors import InputError
from weight_selection.geometry import Geometry, Resampling, find_geometry, resampling
from weight_selection.layers import Layers, source_keys
from weight_selection.rules import select_elements
from weight_selection.sources.families import Family
from weight_selection.sources.membership import family_of
from weight_selection.tracing.groups import Matching, Neurons, find_neurons
from weight_selection.tracing.tracer import Untraceable, trace


@dataclass(frozen=True)
class Entry:
    """Where one student tensor comes from.

    Attributes:
        key, shape: of the student's tensor.
        role: ``selected``, ``excluded`` (by request) or ``classifier``; the last two keep the student's own values.
        source, source_shape: the teacher's tensor, for what is selected.
        parts: for each dimension along which elements are selected, {dimension: [(teacher's indices, student's)]},
            inside each part by the same rule; indices have one dimension, or more where neurons come in blocks.
        resampling: what is done before, where positions or the channels of images differ; or None.
    """

    key: str
    shape: tuple
    role: str
    source: str | None = None
    source_shape: tuple | None = None
    parts: dict | None = None
    resampling: Resampling | None = None

    def describe(self, element_selection: str) -> str:
        """What happens to the tensor, in words."""
        if self.role != "selected":
            return f"{self.role}: student's own initialisation"
        words = [] if self.resampling is None else [self.resampling.words]
        if len(self.source_shape) != len(self.shape):
            words.append("reshape")
        smaller = [parts for parts in self.parts.values() if any(t.shape != s.shape for t, s in parts)]
        if smaller:
            inside = " x ".join(str(len(parts)) for parts in smaller if len(parts) > 1)
            words.append(element_selection + (f" in each of {inside} parts" if inside else ""))
            blocks = {f"{_blocks(t)} to {_blocks(s)}" for parts in smaller for t, s in parts if t.ndim > 1}
            if blocks:
                words.append("blocks of " + " and ".join(sorted(blocks)))
        return ", ".join(words) or "copy"


@dataclass(frozen=True)
class Anatomy:
    """What a plan needs to know of a model.

    Attributes:
        family: the declaration of its family.
        shapes: {key: shape} of its state_dict.
        layers, neurons, geometry: see there.
    """

    family: Family
    shapes: dict
    layers: Layers
    neurons: Neurons
    geometry: Geometry


def anatomy(model: nn.Module, name: str) -> Anatomy:
    """Take a model apart; its weights are not touched, so it may be on the meta device.

    Raises:
        InputError: the model is not timm's, or neurons cannot be followed through it; ``name`` is what to call it.
    """
    family = family_of(model, name)
    try:
        traced = trace(model)
    except Untraceable as reason:
        raise InputError(f"{name}: weight selection cannot take a {type(model).__name__} apart: {reason}") from reason
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    layers = Layers(model, shapes, traced.heights)
    return Anatomy(family, shapes, layers, find_neurons(traced), find_geometry(model))


def make_plan(teacher: nn.Module, student: nn.Module, **options) -> list:
    """Decide, from shapes alone, what every student tensor is made from.

    Args:
        teacher, student: timm models of one family; they may be on the meta device.
        **options: of ``plan_selection``.

    Returns, Raises: as ``plan_selection``, and InputError as ``anatomy``.
    """
    student = anatomy(student, "student")
    return plan_selection(anatomy(teacher, "teacher"), student, **options)


def plan_selection(
    teacher: Anatomy,
    student: Anatomy,
    *,
    layer_selection: str = "first_n",
    exclude=(),
    include_head: bool = False,
    include_head_norm: bool = False,
    allow_unused: bool = False,
) -> list:
    """Decide what every student tensor is made from.

    Args:
        layer_selection: one of ``LAYER_SELECTION``, applied to each container of layers (each stage).
        exclude: components left at the student's own initialisation.
        include_head: select the classifier too; both must have the same classes.
        include_head_norm: select the normalisation inside the head too (ConvNeXt; the release leaves it out).
        allow_unused: let teacher tensors without a counterpart in the student go.

    Returns:
        One ``Entry`` per student key, in the student's order.

    Raises:
        InputError: the student is not a smaller version of the teacher; says in which key and dimension.
    """
    family = student.family
    if teacher.family.name != family.name:
        raise InputError(
            f"teacher is of family {teacher.family.name}, student of {family.name}: weights need a common family"
        )
    _check_options(teacher, student, exclude, include_head, include_head_norm)
    sources = source_keys(teacher.layers, student.layers, layer_selection)
    _check_unused(teacher, student, allow_unused)

    matching = Matching(teacher.neurons, student.neurons)
    plan = []
    for key, shape in student.shapes.items():
        kept_norm = include_head_norm and _in_head_norm(family, key)
        if re.search(family.classifier, key) and not include_head and not kept_norm:
            plan.append(Entry(key, shape, "classifier"))
        elif any(re.search(family.components[component], key) for component in exclude):
            plan.append(Entry(key, shape, "excluded"))
        elif sources[key] not in teacher.shapes:
            raise InputError(
                f"{key}: the teacher has no {sources[key]} to select it from; give the student the teacher's options"
            )
        else:
            plan.append(_entry(teacher, student, matching, key, sources[key], allow_unused))
    return plan


def _check_options(teacher, student, exclude, include_head, include_head_norm):
    """Refuse options that name what the models do not have."""
    family = student.family
    absent = [component for component in exclude if component not in family.components]
    if absent:
        raise InputError(
            f"--exclude {absent[0]}: {family.name} has no such component; it has {', '.join(family.components)}"
        )
    if include_head_norm and family.head_norm is None:
        raise InputError(f"--include_head_norm: no normalisation in the head of {family.name}; leave the option out")
    classes = [key for key in student.shapes if re.search(family.classifier, key) and not _in_head_norm(family, key)]
    if include_head and not classes:
        raise InputError("--include_head: the student has no classifier; leave the option out")
    if include_head and not any(key in teacher.shapes for key in classes):
        raise InputError("--include_head: the teacher has no classifier; leave the option out")


def _in_head_norm(family, key):
    return family.head_norm is not None and re.search(family.head_norm, key) is not None


def _check_unused(teacher, student, allow_unused):
    """Refuse teacher tensors no student tensor corresponds to: a LayerScale, a token, a normalisation."""
    used = {student.layers.component(key) for key in student.shapes}
    spare = [
        key
        for key in teacher.shapes
        if teacher.layers.component(key) not in used and not re.search(teacher.family.classifier, key)
    ]
    if spare and not allow_unused:
        raise InputError(
            f"{spare[0]}: the student has no such tensor, so the teacher's is lost; give the student one "
            "(--student_kwargs) or accept the loss (--allow_unused)"
        )


def _entry(teacher, student, matching, key, source, allow_unused):
    """Compare one tensor of each model, dimension by dimension."""
    shape, source_shape = student.shapes[key], teacher.shapes[source]
    ours, theirs = student.neurons.parts[key], teacher.neurons.parts[source]
    compared, expected = source_shape, shape
    if (len(source_shape), len(shape)) in ((2, 4), (4, 2)):  # 1x1 convolution = linear layer
        compared, expected = ((*sizes, 1, 1)[:4] for sizes in (source_shape, shape))
    if len(compared) != len(expected) or compared[2:] != expected[2:] and len(source_shape) != len(shape):
        raise InputError(f"{key}: teacher's shape is {source_shape}, student's {shape}: not the same kind of tensor")
    family = student.family
    if re.search(family.classifier, key) and not _in_head_norm(family, key) and compared[0] != shape[0]:
        raise InputError(
            f"--include_head: teacher has {compared[0]} classes, student {shape[0]} ({key}); give both the same "
            "(--student_kwargs num_classes=N)"
        )
    common = range(min(len(shape), len(source_shape)))
    positions = [dim for dim in common if ours[dim] is None or theirs[dim] is None]
    parts = {
        dim: _pair_parts(matching, key, source, dim, source_shape[dim], shape[dim])
        for dim in common
        if dim not in positions
    }
    different = [dim for dim in positions if source_shape[dim] != shape[dim]]
    if different and key in student.neurons.unused:
        raise InputError(
            f"{key}, dimension {different[0]}: teacher's size {source_shape[different[0]]}, student's "
            f"{shape[different[0]]}: the model does not use it, so nothing says which elements belong together"
        )
    brought = resampling(
        teacher.geometry, student.geometry, source, key, (source_shape, shape), different, allow_unused
    )
    return Entry(key, shape, "selected", source, source_shape, parts, brought)


def _pair_parts(matching, key, source, dim, t, s):
    """[(teacher's indices, student's)] of a dimension."""
    where = f"{key}, dimension {dim}: teacher's size {t}"
    found = matching.parts(source, key, dim)
    if isinstance(found, str):
        if t < s:
            raise InputError(f"{where} < student's {s}: a teacher must be at least as wide")
        raise InputError(f"{where}, student's {s}: {found}")
    for large, small, (their_space, our_space) in found:
        if large.shape == small.shape:
            continue
        if large.size < small.size:
            raise InputError(f"{where} < student's {s}: a teacher must be at least as wide")
        if our_space.tangled or their_space.tangled:
            raise InputError(f"{where}, student's {s}: its neurons come in blocks that cross each other")
        for number, (n, m) in enumerate(zip(large.shape, small.shape, strict=True)):
            if n < m:
                raise InputError(
                    f"{where} = {_blocks(large)}, student's {s} = {_blocks(small)}: a teacher must be at least as "
                    "large in both"
                )
            fixed = len(their_space.fixed) == large.ndim and their_space.fixed[number]
            if n != m and fixed:
                raise InputError(
                    f"{where} = {_blocks(large)}, student's {s} = {_blocks(small)}: {n} and {m} are positions, "
                    "constants or image channels, not neurons, and must be the same"
                )
    return [(large, small) for large, small, _ in found]


def _blocks(indices):
    return "x".join(map(str, indices.shape))


def apply_plan(
    plan: list, weights: Mapping, *, element_selection: str = "uniform", seed: int = 0, option: str = "teacher"
) -> dict:
    """Carry out a plan.

    Args:
        plan: from ``make_plan``.
        weights: the teacher's state_dict; a mapping that reads a tensor when it is asked for needs no more memory than
            the largest.
        element_selection: one of ``ELEMENT_SELECTION``.
        seed: of the random selections.
        option: where the weights came from, for errors.

    Returns:
        The student's state_dict, in the student's order and the teacher's dtype, without what is not selected.

    Raises:
        InputError: a tensor is not there, of another shape (a classifier's) or kind of numbers, or not finite.
    """
    selected = {}
    for entry in plan:
        if entry.role == "selected":
            weight = checked_weight(entry.source, entry.source_shape, weights.get(entry.source), option)
            selected[entry.key] = _apply(entry, weight, element_selection, seed)
    return selected


DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64)  # int64: counted batches


def checked_weight(key: str, shape: tuple, weight: torch.Tensor | None, option: str) -> torch.Tensor:
    """A teacher's weight; InputError unless it is there, of that shape, of a known kind of numbers and finite."""
    if weight is None or tuple(weight.shape) != shape:
        found = "absent" if weight is None else tuple(weight.shape)
        raise InputError(
            f"{option}: {key} is {found}, {shape} is needed; give this teacher's weights, or "
            "for a classifier set --teacher_kwargs num_classes=N to the file's, or leave out --include_head"
        )
    if weight.dtype not in DTYPES:
        raise InputError(f"{option}: {key} is of {weight.dtype}; convert it to float32")
    if weight.numel() and not torch.stack(weight.aminmax()).isfinite().all():  # NaN is both least and greatest
        raise InputError(f"{option}: {key} has values that are not finite")
    return weight.detach()


def _apply(entry, weight, element_selection, seed):
    if entry.resampling is not None:
        weight = entry.resampling.apply(weight)
    if weight.ndim < len(entry.shape):
        weight = weight[:, :, None, None]
    elif weight.ndim > len(entry.shape):
        weight = weight[:, :, 0, 0]
    out = weight.new_empty(entry.shape)
    every = [entry.parts.get(dim, WHOLE) for dim in range(weight.ndim)]
    for number, block in enumerate(itertools.product(*every)):
        taken, large, small = weight, [], []
        for dim, (theirs, ours) in enumerate(block):
            if theirs is None:
                large.append(weight.shape[dim])
                small.append(weight.shape[dim])
                continue
            taken = _take(taken, dim, theirs.reshape(-1))
            large += theirs.shape
            small += ours.shape
        chosen = select_elements(element_selection, taken.reshape(large), small, seed, f"{entry.key}:{number}")
        places = [
            np.arange(size) if ours is None else ours.reshape(-1)
            for (_, ours), size in zip(block, out.shape, strict=True)
        ]
        chosen = chosen.reshape([len(place) for place in places])
        if chosen.shape == out.shape and all(np.array_equal(place, np.arange(len(place))) for place in places):
            return chosen.contiguous()
        out[np.ix_(*places)] = chosen
    return out


WHOLE = ((None, None),)  # a dimension of positions


def _take(weight, dim, indices):
    """``index_select``, without a copy where the indices are a range."""
    first = int(indices[0]) if len(indices) else 0
    if np.array_equal(indices, np.arange(first, first + len(indices))):
        return weight.narrow(dim, first, len(indices))
    return weight.index_select(dim, torch.from_numpy(indices).to(weight.device))
