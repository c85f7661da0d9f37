#!/usr/bin/env python3
"""Weight selection: the first weights of a small model, picked from a larger pretrained one of its family.

"Initializing Models with Larger Ones" (ICLR 2024), section 3. Three steps: select layers, match components, select
elements. A plan is made first, from shapes alone: for every student key the teacher's key and what to take along
each dimension. Applying it touches the weights.

    python weight_selection.py --output_dir init/ --model_type vit --pretrained_model vit_small_patch16_224_in21k

    from weight_selection import select_weights
    state_dict = select_weights(teacher, student)
"""

import argparse
import json
import re
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn as nn
from timm.layers import resample_abs_pos_embed, resample_patch_embed

import utils
from models import check_kwargs, create_model
from models.families import COMPONENTS, FAMILIES, Family, family_of
from models.weights import (
    SUFFIXES,
    downloaded_file,
    first_mismatch,
    provenance_path,
    read_teacher,
    read_weights,
    write_weights,
)
from utils import InputError

LAYER_SELECTION = ("first_n", "mid_n", "last_n", "uniform")
ELEMENT_SELECTION = ("uniform", "consecutive", "random", "random_inconsistent", "l1", "magnitude")
SEEDED = ("random", "random_inconsistent")


# ---------------------------------------------------------------------------------------------------------
# Which indices: of a layer among layers, of a neuron along one dimension


def uniform_indices(t: int, s: int) -> torch.Tensor:
    """``s`` evenly spaced of ``t`` indices: every (t/s)-th, or rounded points of a grid if s does not divide t."""
    if t % s == 0:
        return torch.arange(s) * (t // s)
    return torch.linspace(0, t - 1, s).round().long()


def layer_indices(method: str, t: int, s: int) -> list:
    """The teacher layer, of ``t``, that each of the student's ``s`` layers starts from (section 3.1, Appendix B)."""
    if method not in LAYER_SELECTION:
        raise InputError(f"--layer_selection {method}: choose one of {', '.join(LAYER_SELECTION)}")
    if method == "uniform":
        return uniform_indices(t, s).tolist()
    start = {"first_n": 0, "mid_n": (t - s) // 2, "last_n": t - s}[method]
    return list(range(start, start + s))


def random_indices(t: int, s: int, *entropy: int) -> torch.Tensor:
    """A sorted draw of ``s`` of ``t`` indices without replacement, the same whenever the arguments are."""
    draw = np.random.RandomState(np.random.SeedSequence((t, s, *entropy)).generate_state(4))
    return torch.from_numpy(np.sort(draw.permutation(t)[:s]))


def element_indices(method: str, weight: torch.Tensor, dim: int, s: int, seed: int = 0, name: str = "") -> torch.Tensor:
    """The ``s`` slices of ``weight`` along ``dim`` that the student keeps (section 3.2), ascending, shape (s,).

    ``uniform``, ``consecutive`` and ``random`` look at nothing but the two sizes, so tensors that share a dimension
    keep the same neurons: the paper's consistency. ``random_inconsistent`` draws anew for every ``name`` and ``dim``;
    ``l1`` keeps the slices of largest L1 norm.
    """
    if method not in ELEMENT_SELECTION or method == "magnitude":
        raise InputError(f"{method}: does not select slices; choose one of uniform, consecutive, random, l1")
    t = weight.shape[dim]
    if t == s:
        return torch.arange(t)
    if method == "uniform":
        return uniform_indices(t, s)
    if method == "consecutive":
        return torch.arange(s)
    if method == "random":
        return random_indices(t, s, seed)
    if method == "random_inconsistent":
        return random_indices(t, s, seed, zlib.crc32(name.encode()), dim)
    norms = weight.movedim(dim, 0).reshape(t, -1).double().abs().sum(dim=1)
    return norms.argsort(descending=True, stable=True)[:s].sort().values


def select_elements(method: str, weight: torch.Tensor, shape, seed: int = 0, name: str = "") -> torch.Tensor:
    """Reduce ``weight`` to ``shape``, which is no larger in any dimension, by one of ``ELEMENT_SELECTION``.

    ``magnitude`` keeps the largest entries wherever they are, in their order, and reshapes them (Table 7).
    """
    if method not in ELEMENT_SELECTION:
        raise InputError(f"--element_selection {method}: choose one of {', '.join(ELEMENT_SELECTION)}")
    if method == "magnitude":
        largest = weight.abs().flatten().argsort(descending=True, stable=True)
        kept = largest[: int(np.prod(shape))].sort().values
        return weight.flatten()[kept].reshape(shape)
    picks = [element_indices(method, weight, dim, size, seed, name) for dim, size in enumerate(shape)]
    for dim, pick in enumerate(picks):
        weight = weight.index_select(dim, pick)
    return weight


# ---------------------------------------------------------------------------------------------------------
# The plan: what every student tensor is made from


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


def apply_plan(plan: list, weights: dict, *, element_selection: str = "uniform", seed: int = 0) -> dict:
    """Carry out a plan.

    Args:
        plan: from ``make_plan``.
        weights: the teacher's state_dict.
        element_selection: one of ``ELEMENT_SELECTION``.
        seed: of the random selections.

    Returns:
        The student's state_dict, in the student's order and the teacher's dtype, without what is not selected.
    """
    return {
        entry.key: _apply(entry, weights[entry.source].detach(), element_selection, seed)
        for entry in plan
        if entry.role == "selected"
    }


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


def select_weights(
    teacher: nn.Module | str,
    student: nn.Module | str,
    *,
    element_selection: str = "uniform",
    seed: int = 0,
    **plan_options,
) -> dict:
    """Select a student's first weights from a teacher.

    Args:
        teacher: a pretrained timm model, or a name whose published weights are loaded.
        student: a smaller model of the same family, or a name; only its shapes matter, it may be on the meta device.
        element_selection: one of ``ELEMENT_SELECTION``.
        seed: of the random selections.
        **plan_options: of ``make_plan``: layer_selection, exclude, include_head, include_head_norm, allow_unused.

    Returns:
        A state_dict for ``student.load_state_dict(..., strict=False)``, without classifier and excluded components.

    Raises:
        InputError: unknown name, or a student that is no smaller version of the teacher.
    """
    if isinstance(teacher, str):
        teacher = pretrained_teacher(teacher, {})
    if isinstance(student, str):
        student = create_model(student, option="student", device="meta")
    plan = make_plan(teacher, student, **plan_options)
    return apply_plan(plan, teacher.state_dict(), element_selection=element_selection, seed=seed)


# ---------------------------------------------------------------------------------------------------------
# The command line


def get_args_parser() -> argparse.ArgumentParser:
    parser = utils.Parser("weight_selection.py", "Select a small model's first weights from a larger pretrained one.")
    add = parser.add_argument
    add(
        "--output_dir",
        metavar="PATH",
        help="a directory, in which MODEL_TYPE.pth is written, or a .pth, .pt or .safetensors file",
    )
    add(
        "--model_type",
        choices=list(FAMILIES),
        help="sets the default student and teacher; not needed when both are named",
    )
    add("--pretrained_model", metavar="NAME", help="teacher: a timm name, old or new")
    add(
        "--pretrained_path",
        metavar="FILE",
        help="teacher's weights from disk, not from the hub (.pth .safetensors .npz ...); moving average first",
    )
    add("--student", metavar="NAME", help="vit_tiny, convnext_femto, another model of the paper, or any timm name")
    add(
        "--student_kwargs",
        nargs="*",
        default={},
        action=utils.Kwargs,
        metavar="K=V",
        help="such as embed_dim=96 num_heads=3",
    )
    add("--teacher_kwargs", nargs="*", default={}, action=utils.Kwargs, metavar="K=V", help="likewise for the teacher")
    add("--layer_selection", choices=LAYER_SELECTION, default="first_n")
    add("--element_selection", choices=ELEMENT_SELECTION, default="uniform")
    add("--seed", type=int, help="of the random selections (default: 0)")
    add(
        "--exclude",
        nargs="+",
        choices=COMPONENTS,
        default=[],
        help="components left at the student's own initialisation",
    )
    head = parser.add_mutually_exclusive_group()
    head.add_argument("--include_head", action="store_true", help="select the classifier too (same classes needed)")
    head.add_argument(
        "--include_head_norm", action="store_true", help="select ConvNeXt's head.norm, which the release leaves out"
    )
    add("--allow_unused", action="store_true", help="let teacher tensors go that the student has no counterpart of")
    add("--overwrite", action="store_true", help="replace an existing output file")
    add("--dry_run", action="store_true", help="print the plan; needs no weights and writes nothing")
    return parser


def check_options(args) -> None:
    """Fill in what follows from other options, and refuse what has no effect or cannot work."""
    if args.model_type is None and (args.student is None or args.pretrained_model is None):
        missing = "--student" if args.student is None else "--pretrained_model"
        raise InputError(
            f"{missing} is missing: name it, or give --model_type {{{','.join(FAMILIES)}}} for the defaults"
        )
    if args.model_type is not None:
        args.student = args.student or FAMILIES[args.model_type].student
        args.pretrained_model = args.pretrained_model or FAMILIES[args.model_type].teacher
    if args.seed is not None and args.element_selection not in SEEDED:
        raise InputError(
            f"--seed {args.seed}: has no effect with --element_selection {args.element_selection}; leave it out"
        )
    args.seed = args.seed or 0
    if args.seed < 0:
        raise InputError(f"--seed {args.seed}: give a number from 0 up")
    if args.output_dir is None and not args.dry_run:
        raise InputError("--output_dir is missing: name a directory or a file, or add --dry_run to only see the plan")
    if args.pretrained_path is not None and not Path(args.pretrained_path).is_file():
        raise InputError(f"--pretrained_path {args.pretrained_path}: no such file")


def output_file(output_dir: str, model_type: str, overwrite: bool) -> Path:
    """The file to write, after making sure that it can be written and nothing is lost by it."""
    path = Path(output_dir)
    if path.suffix in SUFFIXES:
        if path.is_dir():
            raise InputError(f"--output_dir {path}: is a directory; remove it or choose another name")
    else:
        path = path / f"{model_type}.pth"
    utils.check_writable(path.parent, "--output_dir")
    for existing in (path, provenance_path(path)):
        if existing.exists() and not overwrite:
            raise InputError(f"--output_dir {output_dir}: {existing} exists; add --overwrite to replace it")
    return path


def pretrained_teacher(name: str, kwargs: dict) -> nn.Module:
    """A teacher with its published weights, from the hub or its local cache.

    Raises:
        InputError: there are none, or they cannot be fetched.
    """
    if not create_model(name, option="--pretrained_model", device="meta", **kwargs).pretrained_cfg.get("tag"):
        raise InputError(f"--pretrained_model {name}: timm has no weights for it; give --pretrained_path FILE")
    try:
        return create_model(name, option="--pretrained_model", pretrained=True, **kwargs)
    except OSError as error:  # what requests, urllib and huggingface_hub raise without a network or such a file
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"--pretrained_model {name}: cannot fetch its weights ({reason}); give --pretrained_path FILE"
        ) from error


def load_teacher(args, teacher: nn.Module, family: Family) -> tuple:
    """The teacher's weights and where they came from: (state_dict, provenance)."""
    cfg = teacher.pretrained_cfg
    model = ".".join(filter(None, (cfg["architecture"], args.pretrained_path is None and cfg.get("tag"))))
    origin = {"name": args.pretrained_model, "model": model, "kwargs": args.teacher_kwargs}
    if args.pretrained_path is not None:
        if Path(args.pretrained_path).suffix == ".npz":  # timm converts these only into a real model
            teacher = create_model(args.pretrained_model, option="--pretrained_model", **args.teacher_kwargs)
        weights = read_teacher(args.pretrained_path, teacher, family, "--pretrained_path")
        file, source = Path(args.pretrained_path), str(args.pretrained_path)
    else:
        published = pretrained_teacher(args.pretrained_model, args.teacher_kwargs)
        if args.include_head and published.num_classes != cfg["num_classes"]:  # timm has dropped the published one
            raise InputError(
                f"--include_head: the published classifier has {cfg['num_classes']} classes; leave num_classes out of "
                "--teacher_kwargs"
            )
        weights = published.state_dict()
        file, source = downloaded_file(cfg), cfg.get("hf_hub_id") or cfg.get("url")
    return weights, {**origin, "source": source, "sha256": file and utils.sha256(file)}


def check_teacher(plan: list, weights: dict, option: str) -> None:
    """Refuse a teacher without the classifier that is asked for, or with broken values.

    Args:
        plan: says what is needed.
        weights: the teacher's state_dict.
        option: the option and value that the weights came from.

    Raises:
        InputError: names the first tensor.
    """
    for entry in plan:
        if entry.role != "selected":
            continue
        if entry.source not in weights or tuple(weights[entry.source].shape) != entry.source_shape:
            found = tuple(weights[entry.source].shape) if entry.source in weights else "absent"
            raise InputError(
                f"{option}: {entry.source} is {found}, {entry.source_shape} is needed; set --teacher_kwargs "
                "num_classes=N to the file's, or leave out --include_head"
            )
        if not weights[entry.source].isfinite().all():
            raise InputError(f"{option}: {entry.source} has values that are not finite")


def verify(path: Path, state_dict: dict, student_name: str, student_kwargs: dict, left_out: list) -> None:
    """Read a written file back, load it into the student and run it once.

    Raises:
        InputError: the file does not give back what was selected, or the student's output is not finite.
    """
    written = read_weights(path, "--output_dir")
    student = create_model(student_name, option="--student", **student_kwargs).eval()
    problem = first_mismatch(written, student, lambda key: key in left_out)
    if not problem and not all(torch.equal(written[key], value) for key, value in state_dict.items()):
        problem = "other values"
    if problem:
        raise InputError(f"--output_dir: what was written cannot be loaded: {problem}")
    student.load_state_dict(written, strict=False)
    size = getattr(student.patch_embed, "img_size", None) if hasattr(student, "patch_embed") else None
    size = size or student.pretrained_cfg["input_size"][1:]
    channels = next(module for module in student.modules() if isinstance(module, nn.Conv2d)).in_channels
    images = torch.randn(1, channels, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        if not student(images).isfinite().all():
            raise InputError(f"--student {student_name}: its output with the selected weights is not finite")


def print_plan(plan: list, element_selection: str) -> None:
    """The plan as a table."""
    rows = [("student key", "shape", "teacher key", "shape", "rule")]
    for entry in plan:
        shapes = [
            "x".join(map(str, shape)) if shape is not None else "-" for shape in (entry.shape, entry.source_shape)
        ]
        rows.append((entry.key, shapes[0], entry.source or "-", shapes[1], entry.describe(element_selection)))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows:
        print("  ".join([*(text.ljust(width) for text, width in zip(row, widths, strict=False)), row[4]]))


def main(argv=None) -> None:
    args = get_args_parser().parse_args(argv)
    check_options(args)
    check_kwargs(args.student_kwargs, "--student_kwargs", {})
    check_kwargs(args.teacher_kwargs, "--teacher_kwargs", {})
    student = create_model(args.student, option="--student", device="meta", **args.student_kwargs)
    teacher = create_model(args.pretrained_model, option="--pretrained_model", device="meta", **args.teacher_kwargs)
    family = family_of(student, f"--student {args.student}")
    family_of(teacher, f"--pretrained_model {args.pretrained_model}")
    if args.model_type not in (None, family.name):
        raise InputError(f"--model_type {args.model_type}: but --student {args.student} is of family {family.name}")
    plan_options = {
        "layer_selection": args.layer_selection,
        "exclude": args.exclude,
        "include_head": args.include_head,
        "include_head_norm": args.include_head_norm,
        "allow_unused": args.allow_unused,
    }
    plan = make_plan(teacher, student, **plan_options)
    counts = {role: sum(entry.role == role for entry in plan) for role in ("selected", "excluded", "classifier")}
    summary = ", ".join(f"{count} {role}" for role, count in counts.items() if count)
    if args.dry_run:
        print_plan(plan, args.element_selection)
        print(f"{args.student} from {args.pretrained_model}: {summary}; nothing written")
        return

    path = output_file(args.output_dir, family.name, args.overwrite)
    weights, origin = load_teacher(args, teacher, family)
    from_file = args.pretrained_path is not None
    check_teacher(
        plan, weights, f"--pretrained_path {origin['source']}" if from_file else f"--pretrained_model {origin['name']}"
    )
    state_dict = apply_plan(plan, weights, element_selection=args.element_selection, seed=args.seed)
    left_out = [entry.key for entry in plan if entry.role != "selected"]
    with utils.new_file(provenance_path(path)) as record, utils.new_file(path) as temporary:
        write_weights(state_dict, temporary)
        verify(temporary, state_dict, args.student, args.student_kwargs, left_out)
        provenance = {
            "file": path.name,
            "sha256": utils.sha256(temporary),
            "teacher": origin,
            "student": {"name": args.student, "kwargs": args.student_kwargs},
            "options": {**plan_options, "element_selection": args.element_selection, "seed": args.seed},
            "left_out": left_out,
            "versions": {"torch": torch.__version__, "timm": timm.__version__, "python": sys.version.split()[0]},
        }
        record.write_text(json.dumps(provenance, indent=2) + "\n")
    parameters = sum(value.numel() for value in state_dict.values())
    print(f"{path}: {args.student} from {args.pretrained_model}, {summary} tensors, {parameters:,} values")


if __name__ == "__main__":
    utils.run_program("weight_selection.py", main)
