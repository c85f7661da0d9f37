"""Positions: tensors that are resampled if the student's images, patches or windows have another size."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module

import torch
import torch.nn as nn
import torch.nn.functional as F

from weight_selection.errors import InputError


@dataclass(frozen=True)
class Resampling:
    """A change of a teacher's tensor before its elements are selected.

    Attributes:
        words: what it does, for the plan.
        apply: does it to the tensor.
    """

    words: str
    apply: Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Geometry:
    """Where a model keeps positions.

    Attributes:
        grid: (height, width) of the grid of patches, or None.
        embeddings: keys of position embeddings.
        windows: {key of a table of relative positions: (height, width) of the window}.
        images: keys of the convolutions that take the image.
        patches: those of them whose patches do not overlap.
    """

    grid: tuple | None
    embeddings: frozenset
    windows: dict
    images: frozenset
    patches: frozenset


def find_geometry(model: nn.Module, images: dict, grid: tuple | None, embeddings: tuple = ()) -> Geometry:
    """The geometry of a model on any device.

    Args:
        images, grid, embeddings: ``first_convolutions``, ``grid`` and ``position_embeddings`` of ``ModelFacts``.
    """
    windows = {}
    for name, module in model.named_modules():
        table = getattr(module, "relative_position_bias_table", None)
        if table is not None and getattr(module, "window_size", None) is not None:
            windows[f"{name}.relative_position_bias_table".lstrip(".")] = tuple(module.window_size)
    patches = {key for key, convolution in images.items() if convolution.stride == convolution.kernel_size}
    return Geometry(grid, frozenset(embeddings), windows, frozenset(images), frozenset(patches))


def resampling(
    teacher: Geometry, student: Geometry, teacher_key: str, key: str, shapes: tuple, dims: list, allow_unused: bool
) -> Resampling | None:
    """How a teacher's tensor of positions becomes one of the student's size; None if nothing has to be done.

    Args:
        teacher_key, key: keys of the teacher's and the student's tensor.
        shapes: of both.
        dims: the dimensions of positions or of image channels in which they differ; may be empty.
        allow_unused: drop prefix tokens that the student has no place for.

    Raises:
        InputError: there is no way; names the key and the dimension.
    """
    theirs, ours = shapes
    embedded = key in student.embeddings and teacher_key in teacher.embeddings
    prefixes = [_prefix(shape, geometry.grid) for shape, geometry in ((theirs, teacher), (ours, student))]
    if embedded and None not in prefixes:
        return _positions(teacher.grid, student.grid, key, *prefixes, allow_unused)
    if not dims:
        return None
    if embedded and (theirs[1:3], ours[1:3]) == (teacher.grid, student.grid) and set(dims) <= {1, 2}:
        return Resampling(_words(theirs[1:3], ours[1:3]), partial(_interpolate, size=ours[1:3]))
    if key in student.windows and teacher_key in teacher.windows and dims == [0]:
        old, new = teacher.windows[teacher_key], student.windows[key]
        extra = [rows - (2 * h - 1) * (2 * w - 1) for rows, (h, w) in ((theirs[0], old), (ours[0], new))]
        if extra[0] == extra[1] >= 0:
            resize = _of_timm(key, "resize_rel_pos_bias_table")
            known = {} if old[0] == old[1] else {"old_window_size": old}  # timm takes a table to be of a square
            return Resampling(
                f"resample relative positions of a {old[0]}x{old[1]} to a {new[0]}x{new[1]} window",
                lambda table: resize(table, new, (ours[0], table.shape[1]), **known),
            )
    if key in student.images and teacher_key in teacher.images:
        return _kernel(teacher, student, teacher_key, key, theirs, ours, dims)
    dim = dims[0]
    raise InputError(
        f"{key}, dimension {dim}: teacher's size {theirs[dim]}, student's {ours[dim]}: these are positions, not "
        "neurons, and there is no way to resample them; give the student the teacher's (--student_kwargs)"
    )


def _words(old, new):
    return "resample {}x{} to {}x{}".format(*old, *new)


def _prefix(shape, grid):
    """The number of prefix tokens (class, registers) in position embeddings ([1,] tokens, channels), or None."""
    count = shape[-2] - grid[0] * grid[1] if grid and len(shape) in (2, 3) else -1
    return count if 0 <= count < MANY else None


MANY = 32  # prefix tokens: then the positions are of something else


def _positions(old, new, key, t, s, allow_unused):
    if t < s or (t > s and not allow_unused):
        ways = "--student_kwargs to give it the teacher's" + (", --allow_unused" if t > s else "")
        raise InputError(f"{key}: teacher's has {t} prefix tokens, student's {s}: {ways} or --exclude pos_embed")
    if t == s and old == new:
        return None
    words = [f"first {s} of {t} prefix tokens"] * (t != s) + [_words(old, new)] * (old != new)

    def apply(weight):
        prefix, patches = weight[..., :s, :], weight[..., t:, :]
        if old != new:
            channels = weight.shape[-1]
            patches = _interpolate(patches.reshape(1, *old, channels), new).reshape(*weight.shape[:-2], -1, channels)
        return torch.cat([prefix, patches], dim=-2)

    return Resampling(", ".join(words), apply)


def _interpolate(embeddings, size):
    """Position embeddings (1, height, width, channels) of another height and width."""
    images = embeddings.float().permute(0, 3, 1, 2)
    images = F.interpolate(images, size=tuple(size), mode="bicubic", antialias=True)
    return images.permute(0, 2, 3, 1).to(embeddings.dtype)


def _of_timm(key, function, module="timm.layers"):
    """The function of timm that changes this tensor."""
    try:
        return getattr(import_module(module), function)
    except ImportError as error:
        raise InputError(
            f"{key}: teacher's and student's sizes differ, and timm resamples it; install timm "
            '(pip install "weight-selection[timm]"), or give the student the teacher\'s size'
        ) from error


def _kernel(teacher, student, teacher_key, key, theirs, ours, dims):
    words, steps = [], []
    if 1 in dims:
        if theirs[1] != 3:
            raise InputError(
                f"{key}, dimension 1: teacher's images have {theirs[1]} channels, student's {ours[1]}: only a kernel "
                "for 3 can be adapted to others; give the student as many (--student_kwargs in_chans=N)"
            )
        words.append(f"adapt 3 channels to {ours[1]}")
        steps.append(partial(_of_timm(key, "adapt_input_conv", "timm.models"), ours[1]))
    if {2, 3} & set(dims):
        if key not in student.patches or teacher_key not in teacher.patches:
            raise InputError(
                f"{key}: teacher's kernel is {theirs[2]}x{theirs[3]}, student's {ours[2]}x{ours[3]}, and their "
                "positions overlap: only kernels of patches are resampled; give the student the teacher's"
            )
        words.append(_words(theirs[2:], ours[2:]))
        steps.append(partial(_of_timm(key, "resample_patch_embed"), new_size=list(ours[2:])))

    def apply(weight):
        for step in steps:
            weight = step(weight)
        return weight

    return Resampling(", ".join(words), apply)
