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
from collections import Counter
from pathlib import Path

import huggingface_hub
import timm
import torch
import torch.nn as nn

import utils
from models import check_kwargs, create_model
from models.families import COMPONENTS, FAMILIES, Family, family_of
from models.weights import (
    SUFFIXES,
    create_pretrained,
    downloaded_file,
    first_mismatch,
    provenance_path,
    read_teacher,
    read_weights,
    write_weights,
)
from selection.plan import apply_plan, make_plan
from selection.rules import ELEMENT_SELECTION, LAYER_SELECTION, SEEDED
from utils import InputError


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
        teacher = create_pretrained(teacher, {}, "teacher", "give a loaded model")
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
    if args.pretrained_path is not None:
        utils.check_file(args.pretrained_path, "--pretrained_path")


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


def load_teacher(args, teacher: nn.Module, family: Family) -> tuple:
    """The teacher's weights and where they came from: (state_dict, provenance).

    The provenance says what of a file was left out, as {first word of the keys: number of tensors}.
    """
    cfg = teacher.pretrained_cfg
    model = ".".join(filter(None, (cfg["architecture"], args.pretrained_path is None and cfg.get("tag"))))
    origin = {"name": args.pretrained_model, "model": model, "kwargs": args.teacher_kwargs}
    if args.pretrained_path is not None:
        if Path(args.pretrained_path).suffix == ".npz":  # timm converts these only into a real model
            teacher = create_model(args.pretrained_model, option="--pretrained_model", **args.teacher_kwargs)
        weights, unused = read_teacher(args.pretrained_path, teacher, family, "--pretrained_path")
        if unused:
            origin["unused"] = dict(Counter(re.split("[./]", key)[0] for key in unused))
        file, source = Path(args.pretrained_path), str(args.pretrained_path)
    else:
        published = create_pretrained(
            args.pretrained_model, args.teacher_kwargs, "--pretrained_model", "give --pretrained_path FILE"
        )
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
    huggingface_hub.utils.logging.set_verbosity_error()  # a page of retries would hide the one line of an error
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
    if "unused" in origin:
        spare = ", ".join(f"{name} ({count})" for name, count in origin["unused"].items())
        print(f"{origin['source']}: left out, tensors that the teacher has no place for: {spare}")
    parameters = sum(value.numel() for value in state_dict.values())
    print(f"{path}: {args.student} from {args.pretrained_model}, {summary} tensors, {parameters:,} values")


if __name__ == "__main__":
    utils.run_program("weight_selection.py", main)
