"""The plan: what every student tensor is made from, decided from shapes alone; and carrying it out."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn as nn
from timm.layers import resample_abs_pos_embed, resample_patch_embed

from models.families import Family
from models.membership import family_of
from program import InputError
from selection.rules import layer_indices, select_elements


@dataclass(frozen=True)
class Entry:
    """Where one student tensor comes from.

    Attributes:
        key, shape: of the student's tensor.
        role: ``selected``, ``excluded`` (by request) or ``classifier``; the last two keep the student's own values.
        source, source_shape: the teacher's tensor, for what is selected.
        neurons: the dimensions along which elements are selected.
        parts: the first dimension is so many equal parts stacked; elements are selected inside each.
        grid: (teacher's, student's) height and width of what is spatial, where they differ: resampled.
        prefix: (teacher's, student's) number of prefix tokens in a position embedding.
    """

    key: str
    shape: tuple
    role: str
    source: str | None = None
    source_shape: tuple | None = None
    neurons: tuple = ()
    parts: int = 1
    grid: tuple | None = None
    prefix: tuple | None = None

    def describe(self, element_selection: str) -> str:
        """What happens to the tensor, in words."""
        if self.role != "selected":
            return f"{self.role}: student's own initialisation"
        words = []
        if self.prefix is not None and self.prefix[0] != self.prefix[1]:
            words.append(f"first {self.prefix[1]} of {self.prefix[0]} prefix tokens")
        if self.grid is not None:
            words.append("resample {}x{} to {}x{}".format(*self.grid[0], *self.grid[1]))
        if len(self.source_shape) != len(self.shape):
            words.append("reshape")
        if any(self.source_shape[dim] != self.shape[dim] for dim in self.neurons):
            words.append(element_selection + (f" in each of {self.parts} parts" if self.parts > 1 else ""))
        return ", ".join(words) or "copy"


def make_plan(
    teacher: nn.Module,
    student: nn.Module,
    *,
    layer_selection: str = "first_n",
    exclude=(),
    include_head: bool = False,
    include_head_norm: bool = False,
    allow_unused: bool = False,
) -> list:
    """Decide, from shapes alone, what every student tensor is made from.

    Args:
        teacher, student: timm models of one family; they may be on the meta device.
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
    family = family_of(student, "student")
    other = family_of(teacher, "teacher")
    if other is not family:
        raise InputError(f"teacher is of family {other.name}, student of {family.name}: weights need a common family")
    absent = [component for component in exclude if component not in family.components]
    if absent:
        raise InputError(
            f"--exclude {absent[0]}: {family.name} has no such component; it has {', '.join(family.components)}"
        )
    if include_head_norm and family.head_norm is None:
        raise InputError(f"--include_head_norm: no normalisation in the head of {family.name}; leave the option out")

    classes = [
        key for key in student.state_dict() if re.search(family.classifier, key) and not _in_head_norm(family, key)
    ]
    if include_head and not classes:
        raise InputError("--include_head: the student has no classifier; leave the option out")
    if include_head and not any(key in teacher.state_dict() for key in classes):
        raise InputError("--include_head: the teacher has no classifier; leave the option out")

    teacher_shapes = {key: tuple(value.shape) for key, value in teacher.state_dict().items()}
    student_shapes = {key: tuple(value.shape) for key, value in student.state_dict().items()}
    layers = _map_layers(family, teacher_shapes, student_shapes, layer_selection)
    _check_unused(family, teacher_shapes, student_shapes, allow_unused)

    plan = []
    for key, shape in student_shapes.items():
        source = _source_key(family, key, layers)
        kept_norm = include_head_norm and _in_head_norm(family, key)
        if re.search(family.classifier, key) and not include_head and not kept_norm:
            plan.append(Entry(key, shape, "classifier"))
        elif any(re.search(family.components[component], key) for component in exclude):
            plan.append(Entry(key, shape, "excluded"))
        elif source not in teacher_shapes:
            raise InputError(
                f"{key}: the teacher has no {source} to select it from; give the student the teacher's options"
            )
        else:
            plan.append(_entry(family, key, shape, source, teacher_shapes[source], teacher, student, allow_unused))
    return plan


def _map_layers(family: Family, teacher_shapes, student_shapes, method):
    """{(container, student layer): teacher layer}."""
    depths = []
    for shapes in (teacher_shapes, student_shapes):
        depth = {}
        for match in filter(None, (re.search(family.layers, key) for key in shapes)):
            depth[match[1]] = max(depth.get(match[1], 0), int(match[2]) + 1)
        depths.append(depth)
    if depths[0].keys() != depths[1].keys():
        raise InputError(f"teacher has layers in {', '.join(depths[0])}, student in {', '.join(depths[1])}")
    layers = {}
    for container, s in depths[1].items():
        t = depths[0][container]
        if t < s:
            raise InputError(f"{container}: teacher has {t} layers, student {s}: a teacher must be at least as deep")
        layers.update({(container, i): j for i, j in enumerate(layer_indices(method, t, s))})
    return layers


def _in_head_norm(family, key):
    return family.head_norm is not None and re.search(family.head_norm, key) is not None


def _source_key(family, key, layers):
    match = re.search(family.layers, key)
    if not match:
        return key
    return f"{key[: match.start(2)]}{layers[match[1], int(match[2])]}{key[match.end(2) :]}"


def _check_unused(family, teacher_shapes, student_shapes, allow_unused):
    """Refuse teacher tensors no student tensor corresponds to: a LayerScale, a token, a normalisation."""

    def component(key):
        match = re.search(family.layers, key)
        return key if not match else f"{key[: match.start(2)]}*{key[match.end(2) :]}"

    used = {component(key) for key in student_shapes}
    spare = [key for key in teacher_shapes if component(key) not in used and not re.search(family.classifier, key)]
    if spare and not allow_unused:
        raise InputError(
            f"{spare[0]}: the student has no such tensor, so the teacher's is lost; give the student one "
            "(--student_kwargs) or accept the loss (--allow_unused)"
        )


def _dimensions(family: Family, key: str, ndim: int) -> tuple:
    """The dimensions that hold neurons, and those that are resampled. Any other must be the same in both models."""
    if family.pos_embed and re.search(family.pos_embed, key):
        return (2,), (1,)
    if family.tokens and re.search(family.tokens, key):
        return (2,), ()
    if re.search(family.patch_kernel, key):
        return (0,), (2, 3)
    return tuple(range(min(ndim, 2))), ()


def _entry(family, key, shape, source, source_shape, teacher, student, allow_unused):
    """Compare one tensor of each model, dimension by dimension."""
    neurons, resampled = _dimensions(family, key, len(shape))
    compared = source_shape + (1, 1) if (len(source_shape), len(shape)) == (2, 4) else source_shape
    expected = shape + (1, 1) if (len(source_shape), len(shape)) == (4, 2) else shape  # 1x1 convolution = linear layer
    if len(compared) != len(expected):
        raise InputError(f"{key}: teacher's shape is {source_shape}, student's {shape}: not the same kind of tensor")
    if re.search(family.classifier, key) and not _in_head_norm(family, key) and compared[0] != shape[0]:
        raise InputError(
            f"--include_head: teacher has {compared[0]} classes, student {shape[0]} ({key}); give both the same "
            "(--student_kwargs num_classes=N)"
        )
    for dim, (t, s) in enumerate(zip(compared, expected, strict=True)):
        if dim in neurons and t < s:
            raise InputError(
                f"{key}, dimension {dim}: teacher's size {t} < student's {s}: a teacher must be at least as wide"
            )
        if dim not in (*neurons, *resampled) and t != s:
            raise InputError(f"{key}, dimension {dim}: teacher's size {t}, student's {s}: no neurons, must be the same")

    grid = prefix = None
    if family.pos_embed and re.search(family.pos_embed, key):
        prefix = tuple(0 if model.no_embed_class else model.num_prefix_tokens for model in (teacher, student))
        grid = tuple(tuple(model.patch_embed.grid_size) for model in (teacher, student))
        if prefix[0] < prefix[1] or (prefix[0] > prefix[1] and not allow_unused):
            ways = "--student_kwargs to give it the teacher's" + (", --allow_unused" if prefix[0] > prefix[1] else "")
            raise InputError(
                f"{key}: teacher's has {prefix[0]} prefix tokens, student's {prefix[1]}: {ways} or --exclude pos_embed"
            )
    elif resampled:
        grid = (tuple(compared[2:]), tuple(shape[2:]))
    if grid is not None and grid[0] == grid[1]:
        grid = None
    parts = next((count for pattern, count in family.stacked.items() if re.search(pattern, key)), 1)
    return Entry(key, shape, "selected", source, source_shape, neurons, parts, grid, prefix)


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
            weight = _checked(entry, weights.get(entry.source), option)
            selected[entry.key] = _apply(entry, weight, element_selection, seed)
    return selected


DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64)  # int64: counted batches


def _checked(entry, weight, option):
    if weight is None or tuple(weight.shape) != entry.source_shape:
        found = "absent" if weight is None else tuple(weight.shape)
        raise InputError(
            f"{option}: {entry.source} is {found}, {entry.source_shape} is needed; set --teacher_kwargs "
            "num_classes=N to the file's, or leave out --include_head"
        )
    if weight.dtype not in DTYPES:
        raise InputError(f"{option}: {entry.source} is of {weight.dtype}; convert it to float32")
    if weight.numel() and not torch.stack(weight.aminmax()).isfinite().all():  # NaN is both least and greatest
        raise InputError(f"{option}: {entry.source} has values that are not finite")
    return weight.detach()


def _apply(entry, weight, element_selection, seed):
    if entry.prefix is not None:
        t, s = entry.prefix
        weight = torch.cat([weight[:, :s], weight[:, t:]], dim=1)
        if entry.grid is not None:
            weight = resample_abs_pos_embed(weight, entry.grid[1], entry.grid[0], num_prefix_tokens=s)
    elif entry.grid is not None:
        weight = resample_patch_embed(weight, list(entry.grid[1]))
    if weight.ndim < len(entry.shape):
        weight = weight[:, :, None, None]
    elif weight.ndim > len(entry.shape):
        weight = weight[:, :, 0, 0]
    shape = (entry.shape[0] // entry.parts, *entry.shape[1:])
    chosen = [
        select_elements(element_selection, part, shape, seed, f"{entry.key}:{index}")
        for index, part in enumerate(weight.chunk(entry.parts))
    ]
    return torch.cat(chosen).contiguous()
