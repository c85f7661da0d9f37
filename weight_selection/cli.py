"""The command: its options and their checks, before torch is imported; then it plans, selects and writes.

weight-selection, python -m weight_selection, python weight_selection.py: all three are this.
"""

import argparse
import os
import sys
from concurrent.futures import Future
from dataclasses import fields

from weight_selection.arguments import Kwargs, Parser, check_kwargs
from weight_selection.errors import InputError, run_program
from weight_selection.files import begin_sha256, check_file
from weight_selection.options import (
    CALIBRATION_IMAGES,
    ELEMENT_SELECTION,
    LAYER_SELECTION,
    NOISE,
    PROJECTION,
    SEEDED,
    SelectionOptions,
)
from weight_selection.sources import COMPONENTS, MODEL_TYPES
from weight_selection.sources.recipe import read_student

# The options that stand in the provenance of a written file, in this order.
RECORDED = ("layer_selection", "exclude", "include_head", "include_head_norm", "allow_unused", "element_selection",
            "seed")  # fmt: skip


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser("weight_selection.py", "Select a small model's first weights from a larger pretrained one.")
    add = parser.add_argument
    head = parser.add_mutually_exclusive_group()
    # fmt: off
    add("--output_dir", metavar="PATH",
        help="a directory, in which MODEL_TYPE.pth is written, or a .pth, .pt or .safetensors file")
    add("--model_type", choices=list(MODEL_TYPES),
        help="sets the default student and teacher; not needed when both are named")
    add("--pretrained_model", metavar="NAME", help="teacher: a timm name, old or new")
    add("--pretrained_path", metavar="FILE",
        help="teacher's weights from disk, not from the hub (.pth .safetensors .npz ...); moving average first")
    add("--student", metavar="NAME", help="vit_tiny, convnext_femto, another model of the paper, or any timm name")
    add("--student_kwargs", nargs="*", default={}, action=Kwargs, metavar="K=V",
        help="such as embed_dim=96 num_heads=3")
    add("--student_config", metavar="FILE",
        help="instead: a recipe of main.py, FILE or FILE:SECTION, whose model, arguments and size are the student's")
    add("--teacher_kwargs", nargs="*", default={}, action=Kwargs, metavar="K=V", help="likewise for the teacher")
    add("--layer_selection", choices=LAYER_SELECTION, default="first_n")
    add("--element_selection", choices=ELEMENT_SELECTION + PROJECTION, default="uniform",
        help="project (rotated) and greedy (coordinates) go beyond the paper, and need --calibration")
    add("--calibration", metavar=f"DIR|{NOISE}",
        help="images without labels for project and greedy: those of the task are best, any will do; or none, noise")
    add("--calibration_images", type=int, metavar="N",
        help=f"how many of them ({CALIBRATION_IMAGES}; of a smaller directory all)")
    add("--calibration_size", type=int, metavar="N",
        help="side in pixels of images for a model that takes any, such as a ResNet (that of timm or --student_config)")
    add("--seed", type=int, help="of the random selections, of noise and of the choice of images (default: 0)")
    add("--exclude", nargs="+", choices=COMPONENTS, default=[],
        help="components left at the student's own initialisation")
    head.add_argument("--include_head", action="store_true", help="select the classifier too (same classes needed)")
    head.add_argument("--classifier", nargs="+", metavar="MODULE",
                      help="modules left at the student's own initialisation (default: those that the library knows)")
    head.add_argument("--include_head_norm", action="store_true",
                      help="select ConvNeXt's head.norm, which the release leaves out")
    add("--allow_unused", action="store_true", help="let teacher tensors go that the student has no counterpart of")
    add("--complete", action="store_true",
        help="write the student's own initialisation of all else too, a whole checkpoint (timm's checkpoint_path)")
    add("--overwrite", action="store_true", help="replace an existing output file")
    add("--dry_run", action="store_true", help="print the plan; needs no weights and writes nothing")
    add("--verbose", action="store_true", help="with --dry_run: a line for every tensor too")
    # fmt: on
    return parser


def check_options(args) -> SelectionOptions:
    """Fill in what follows from other options, and refuse what has no effect or cannot work."""
    args.student_input_size = None
    if args.student_config is not None:
        for option, value in (("--student", args.student), ("--student_kwargs", args.student_kwargs)):
            if value:
                raise InputError(
                    f"--student_config {args.student_config}: already names the student; leave {option} out"
                )
        args.student, args.student_kwargs, args.student_input_size = read_student(
            args.student_config, "--student_config"
        )
    if args.model_type is None and (args.student is None or args.pretrained_model is None):
        missing = "--student" if args.student is None else "--pretrained_model"
        types = ",".join(MODEL_TYPES)
        raise InputError(f"{missing} is missing: name it, or give --model_type {{{types}}} for the defaults")
    if args.model_type is not None:
        student, teacher = MODEL_TYPES[args.model_type]
        args.student, args.pretrained_model = args.student or student, args.pretrained_model or teacher
    if args.seed is not None and args.element_selection not in SEEDED + PROJECTION and not args.complete:
        raise InputError(
            f"--seed {args.seed}: has no effect with --element_selection {args.element_selection}; leave it out"
        )
    args.seed = args.seed or 0
    values = {field.name: getattr(args, field.name) for field in fields(SelectionOptions)}
    options = SelectionOptions(**values | {"exclude": tuple(args.exclude)})
    options.check(plan_only=args.dry_run)
    if args.verbose and not args.dry_run:
        raise InputError("--verbose: has no effect without --dry_run; leave it out")
    if args.output_dir is None and not args.dry_run:
        raise InputError("--output_dir is missing: name a directory or a file, or add --dry_run to only see the plan")
    if args.pretrained_path is not None:
        check_file(args.pretrained_path, "--pretrained_path")
    check_kwargs(args.student_kwargs, "--student_kwargs", {})
    check_kwargs(args.teacher_kwargs, "--teacher_kwargs", {})
    return options


def main(argv=None) -> None:
    args = get_args_parser().parse_args(argv)
    options = check_options(args)
    # To hash a large file takes longer than to select from it, and torch takes seconds to import.
    digest = begin_sha256(args.pretrained_path) if args.pretrained_path and not args.dry_run else None
    from huggingface_hub.utils import logging

    from weight_selection.selection import Selection, Student, Teacher

    logging.set_verbosity_error()  # a page of retries would hide the one line of an error
    student = Student(args.student, args.student_kwargs, args.student_input_size, "--student")
    named = "--pretrained_model", "--pretrained_path", "give --pretrained_path FILE"
    teacher = Teacher(args.pretrained_model, args.teacher_kwargs, args.pretrained_path, *named)
    selection = Selection(teacher, student, options)
    name = selection.student_structure.architecture.name
    if args.model_type not in (None, name):
        raise InputError(f"--model_type {args.model_type}: but --student {args.student} is a {name} model")
    if args.dry_run:
        print_plan(args, selection)
    else:
        select(args, selection, name, digest)


def print_plan(args, selection) -> None:
    """Print the plan: neuron groups, layers, with --verbose every tensor, and totals."""
    from weight_selection import report

    plan, projection = selection.plan, selection.projection
    lines = report.group_lines(plan, projection and projection.describe_group)
    lines += report.layer_lines(plan, selection.teacher_structure.layers, selection.student_structure.layers)
    if args.verbose:
        lines += report.tensor_lines(plan, projection and projection.describer())
    print("\n".join(lines))
    print(f"{args.student} from {args.pretrained_model}: {report.summary(plan)}; nothing written")


def select(args, selection, name: str, digest: Future | None) -> None:
    """Select, write the file with its provenance, and say what was written.

    Args:
        name: of the file in a directory, without its suffix.
        digest: SHA-256 of the teacher's file, if one was named.
    """
    import torch

    from weight_selection import output, report

    path = output.output_file(args.output_dir, name, args.overwrite)
    _, origin, file = selection.opened
    if digest is None and file is not None:
        digest = begin_sha256(file)
    state_dict = selection.weights()
    torch.manual_seed(args.seed)
    student = selection.student.create()
    absent = selection.plan.left_out
    provenance = {
        "teacher": origin | {"sha256": digest},
        "student": {"name": args.student, "kwargs": args.student_kwargs}
        | ({"input_size": args.student_input_size} if args.student_input_size else {}),
        "options": {name: getattr(args, name) for name in RECORDED}
        | ({"classifier": args.classifier} if args.classifier else {})
        | (selection.projection.provenance() if selection.projection is not None else {}),
        "left_out": absent,
    } | ({"left_behind": selection.plan.left_behind} if selection.plan.left_behind else {})
    if args.complete:
        own = student.state_dict()
        state_dict = {key: state_dict.get(key, value) for key, value in own.items()}
        provenance |= {"left_out": [], "random": absent}
    output.write(path, state_dict, student, provenance)
    if "unused" in origin:
        spare = ", ".join(f"{name} ({count})" for name, count in origin["unused"].items())
        print(f"{origin['source']}: left out, tensors that the teacher has no place for: {spare}")
    parameters = sum(value.numel() for value in state_dict.values())
    counts = report.summary(selection.plan)
    print(f"{path}: {args.student} from {args.pretrained_model}, {counts} tensors, {parameters:,} values")


def run() -> None:
    """Run the command with the words of the command line, and exit."""
    if not any(word.split("=")[-1] in PROJECTION for word in sys.argv):  # a projection computes; the others copy, which
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # waits for memory: more threads would wait for each other
    run_program("weight_selection.py", main)
