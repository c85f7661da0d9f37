"""The command. It checks its options before it imports torch; then it plans, selects and writes.

``weight-selection``, ``python -m weight_selection`` and ``python weight_selection.py`` all run it.
"""

from __future__ import annotations

import argparse
import os
import sys
from concurrent.futures import Future
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from weight_selection.arguments import Kwargs, Parser, check_kwargs, one_of
from weight_selection.commands import model_words, training_command
from weight_selection.errors import InputError, run_program
from weight_selection.files import SUFFIXES, begin_sha256, check_no_file, without_empty_directories
from weight_selection.options import (
    CALIBRATION_IMAGES,
    DTYPES,
    ELEMENT_SELECTION,
    FUSED_QKV,
    KEEP,
    LAYER_SELECTION,
    NOISE,
    PARTS,
    PROJECTION,
    SEEDED,
    SelectionOptions,
)
from weight_selection.sources import COMPONENTS, MODEL_TYPES
from weight_selection.sources.directories import files_of
from weight_selection.sources.names import SCHEMES, TIMM, arguments_of, check_name, split_name
from weight_selection.sources.recipe import read_student
from weight_selection.sources.widths import fraction, shown, smaller_arguments

if TYPE_CHECKING:
    from weight_selection.selection import Selection

TRAINER = Path(__file__).parents[1] / "main.py"  # beside the package in a clone; pip does not install it
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
    add("--format", **one_of(["hub"]),
        help="PATH becomes a directory with a whole checkpoint, which timm's local-dir:PATH or from_pretrained(PATH) "
        "opens")
    add("--dtype", **one_of(DTYPES), default=KEEP, help="type of the written values; keep: the teacher's")
    add("--model_type", **one_of(MODEL_TYPES),
        help="sets the default student and teacher; not needed when both are named")
    add("--pretrained_model", metavar="NAME",
        help="the teacher: a timm name, old or new; timm's hf-hub:ORG/NAME, timm/NAME or local-dir:DIR; "
        "transformers:ORG/NAME or transformers:DIR; torchvision:NAME[.WEIGHTS]")
    add("--pretrained_path", metavar="PATH",
        help="the teacher's weights on disk: a file (.pth .safetensors .npz ...; if it holds a moving average, that is "
        "taken); a directory that a library saved; or that of a run of main.py, which says what its model is")
    add("--student", metavar="NAME",
        help="the student: vit_tiny, convnext_femto, another model of the paper, or any name that --pretrained_model "
        "takes")
    add("--student_kwargs", nargs="*", default={}, action=Kwargs, metavar="K=V",
        help="arguments of the student, such as embed_dim=96 num_heads=3; without --student, those in which it differs "
        "from the teacher")
    add("--student_config", metavar="FILE",
        help="in place of --student: a recipe of main.py, FILE or FILE:SECTION, with the student's model, arguments "
        "and size of images")
    add("--width", type=fraction, metavar="W",
        help="in place of --student: the teacher's model W times as wide, such as 0.5 or 1/3; heads keep their size")
    add("--depth", type=fraction, metavar="D",
        help="in place of --student: the teacher's model D times as deep, rounded up; may go with --width")
    add("--teacher_kwargs", nargs="*", default={}, action=Kwargs, metavar="K=V", help="arguments of the teacher")
    add("--layer_selection", **one_of(LAYER_SELECTION), default="first_n",
        help="which of the teacher's layers the student gets")
    add("--element_selection", **one_of(ELEMENT_SELECTION + PROJECTION), default="uniform",
        help="which neurons the student gets; project and greedy go beyond the paper, and need --calibration")
    add("--fused_qkv", **one_of(FUSED_QKV), default=PARTS,
        help="uniform selection spreads its indices over each part of a fused q, k, v, or over the whole, as the "
        "paper's release does; this differs only if the student's width does not divide the teacher's")
    add("--calibration", metavar=f"DIR|{NOISE}",
        help="images without labels, for project and greedy; any will do, those of the task are best; "
        f"{NOISE} needs none")
    add("--calibration_images", type=int, metavar="N",
        help="how many images of the directory, or of noise "
        f"(default: {CALIBRATION_IMAGES}, or all if there are fewer)")
    add("--calibration_size", type=int, metavar="N",
        help="side of these images in pixels, for a model that takes any size, such as a ResNet (default: that of timm "
        "or of --student_config)")
    add("--seed", type=int, help="seed of random selection, of noise and of the choice of images (default: 0)")
    add("--exclude", nargs="+", **one_of(COMPONENTS), default=[],
        help="components that keep the student's own initialisation")
    head.add_argument("--include_head", action="store_true",
                      help="select the classifier too; both models must have the same classes")
    head.add_argument("--classifier", nargs="+", metavar="MODULE",
                      help="modules that belong to the task and keep the student's own initialisation (default: the "
                      "classifier that the library knows)")
    head.add_argument("--include_head_norm", action="store_true",
                      help="select ConvNeXt's head.norm, which the paper's release leaves out")
    add("--allow_unused", action="store_true", help="drop teacher tensors that the student has no place for")
    add("--complete", action="store_true",
        help="write a whole checkpoint (timm's checkpoint_path): all else has the student's own initialisation")
    add("--overwrite", action="store_true", help="replace what --output_dir names, if it exists")
    add("--dry_run", action="store_true", help="print the plan; needs no weights and writes nothing")
    add("--verbose", action="store_true", help="with --dry_run: a line for every tensor too")
    # fmt: on
    return parser


def check_options(args: argparse.Namespace) -> SelectionOptions:
    """Fill in options that follow from others. Refuse options that have no effect or cannot work."""
    _check_student(args)
    whole = args.complete or args.format == "hub"
    if args.complete and args.format == "hub":
        raise InputError("--complete: --format hub writes a whole checkpoint already; leave --complete out")
    if args.seed is not None and args.element_selection not in SEEDED + PROJECTION and not whole:
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
    if args.format == "hub" and args.output_dir is not None and args.output_dir.endswith(SUFFIXES):
        raise InputError(f"--output_dir {args.output_dir}: --format hub writes a directory; leave the suffix out")
    if args.output_dir is not None and not args.output_dir.endswith(SUFFIXES):
        check_no_file(args.output_dir, "--output_dir")
    if args.pretrained_path is not None:
        files_of(args.pretrained_path, "--pretrained_path")
    for option, name in (("--pretrained_model", args.pretrained_model), ("--student", args.student)):
        if name is not None:
            check_name(name, option, TIMM if args.student_config and option == "--student" else tuple(SCHEMES))
    check_kwargs(args.student_kwargs, "--student_kwargs", {})
    check_kwargs(args.teacher_kwargs, "--teacher_kwargs", {})
    return options


def _check_student(args):
    """Find out what the student is: a name, a recipe's model, a model type's default, or like the teacher."""
    named = {"--student": args.student, "--student_config": args.student_config, "--model_type": args.model_type}
    for option, value in (("--width", args.width), ("--depth", args.depth)):
        for other, given in (named | {"--student_kwargs": args.student_kwargs}).items() if value is not None else ():
            if given:
                raise InputError(f"{option} {shown(value)}: {other} says already what the student is; leave one out")
        if value is not None and not 0 < value < 1:
            raise InputError(f"{option} {shown(value)}: give a number between 0 and 1")
    config, args.student_input_size = args.student_config, None
    if config is not None:
        for option, value in (("--student", args.student), ("--student_kwargs", args.student_kwargs)):
            if value:
                raise InputError(f"--student_config {config}: already names the student; leave {option} out")
        args.student, args.student_kwargs, args.student_input_size = read_student(config, "--student_config")
    types = ",".join(MODEL_TYPES)
    if args.model_type is not None:
        student, teacher = MODEL_TYPES[args.model_type]
        args.student, args.pretrained_model = args.student or student, args.pretrained_model or teacher
    if args.pretrained_model is None and args.pretrained_path is None:  # a run of main.py names its model
        raise InputError(f"--pretrained_model is missing: name it, or give --model_type {{{types}}} for the defaults")
    if args.student is None and not (args.width or args.depth or args.student_kwargs):
        raise InputError(
            "--student is missing: name it; or say by --width, --depth or --student_kwargs how it differs from the "
            f"teacher's architecture; or give --model_type {{{types}}} for the defaults"
        )


def main(argv: list[str] | None = None) -> None:
    """Run the command with these words; None: those of the command line."""
    args = get_args_parser().parse_args(argv)
    options = check_options(args)
    # To hash a large file takes longer than to select from it, and torch takes seconds to import.
    files = files_of(args.pretrained_path, "--pretrained_path") if args.pretrained_path else []
    digest = begin_sha256(*files) if files and not args.dry_run else None
    for library in ("HF_HUB", "TRANSFORMERS"):  # a page of warnings would hide the one line of an error
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    from weight_selection.selection import Selection, Student, Teacher

    named = "--pretrained_model", "--pretrained_path", "give --pretrained_path PATH"
    teacher = Teacher(args.pretrained_model, args.teacher_kwargs, args.pretrained_path, *named)
    args.pretrained_model = teacher.model
    option = "--student"
    if args.student is None:
        option = "--pretrained_model"
        _take_after(teacher, args)
    student = Student(args.student, args.student_kwargs, args.student_input_size, option)
    selection = Selection(teacher, student, options)
    name = selection.student_structure.architecture.name
    if args.model_type not in (None, name):
        raise InputError(f"--model_type {args.model_type}: --student {args.student} is a {name} model; leave one out")
    if args.dry_run:
        print_plan(args, selection)
    else:
        with without_empty_directories(args.output_dir):
            select(args, selection, name, digest)


def _take_after(teacher, args) -> None:
    """Make the student a model like the teacher, with the arguments that were given, or with smaller ones."""
    if args.width or args.depth:
        arguments = arguments_of(teacher.model, teacher.kwargs, teacher.option)
        args.student_kwargs = smaller_arguments(arguments, args.width, args.depth)
    args.student, args.student_input_size = teacher.model, teacher.input_size
    args.student_kwargs = teacher.kwargs | args.student_kwargs


def print_plan(args: argparse.Namespace, selection: Selection) -> None:
    """Print the plan: neuron groups, layers, with --verbose every tensor, the student's cost, and totals."""
    from weight_selection import report

    plan, projection = selection.plan, selection.projection
    lines = report.group_lines(plan, projection and projection.describe_group)
    lines += report.layer_lines(plan, selection.teacher_structure.layers, selection.student_structure.layers)
    if args.verbose:
        lines += report.tensor_lines(plan, projection and projection.describer())
    lines.append(report.student_line(args.student_kwargs, selection.models[1], selection.student_structure.facts))
    print("\n".join(lines + report.head_warnings(plan)))
    print(f"{args.student} from {args.pretrained_model}: {report.summary(plan)}; nothing written")


def select(args: argparse.Namespace, selection: Selection, name: str, digest: Future | None) -> None:
    """Select, write the file or the directory with its provenance, and say what was written.

    Args:
        name: of the file in a directory, without its suffix.
        digest: SHA-256 of the teacher's file, if one was named.
    """
    from weight_selection import output, report

    if args.format == "hub":
        written = output.HubDirectory(args.output_dir, selection, args.overwrite)
    else:
        written = output.WeightFile(args.output_dir, name, args.overwrite)
    written.check_not_the_teachers(selection)
    _, origin, files = selection.opened
    if digest is None and files:
        digest = begin_sha256(*files)
    state_dict = output.cast(selection.weights(), args.dtype, selection.plan.tied)
    absent = selection.plan.left_out
    compared, agreement = agreement_of(selection)
    taught = selection.normalization
    provenance = {
        "teacher": origin | {"sha256": digest},
        "student": {"name": args.student, "kwargs": args.student_kwargs}
        | ({"input_size": args.student_input_size} if args.student_input_size else {}),
        **({"not_taken": selection.plan.not_taken} if selection.plan.not_taken else {}),
        "options": {name: getattr(args, name) for name in RECORDED}
        | ({"classifier": args.classifier} if args.classifier else {})
        | ({"fused_qkv": args.fused_qkv} if args.fused_qkv != PARTS else {})
        | ({"dtype": args.dtype} if args.dtype != KEEP else {})
        | (selection.projection.provenance() if selection.projection is not None else {}),
        **({"agreement": agreement} if agreement else {}),
        **({"normalization": dict(zip(("mean", "std"), taught, strict=True))} if taught is not None else {}),
        "left_out": absent,
    } | ({"left_behind": selection.plan.left_behind} if selection.plan.left_behind else {})
    student = output.initialised_student(selection, state_dict, args.seed)
    if args.complete or args.format == "hub":
        dtype = output.value_type(state_dict) if args.format == "hub" else args.dtype  # a hub's directory has one type
        state_dict = output.completed(state_dict, student, selection, args.seed, dtype)
        provenance |= {"left_out": [], "random": absent}
    written.write(state_dict, student, provenance)
    for line in report.head_warnings(selection.plan):
        print(line)
    if output.is_large(state_dict):
        print(f"not run: only a student of less than {output.LARGE / 1e9:g} GB is tried in a forward pass")
    if "unused" in origin:
        spare = ", ".join(f"{name} ({count})" for name, count in origin["unused"].items())
        print(f"{origin['source']}: left out, tensors that the teacher has no place for: {spare}")
    counts = report.summary(selection.plan)
    values = report.value_words(state_dict)
    print(f"{written.path}: {args.student} from {args.pretrained_model}, {counts} tensors, {values}")
    if compared:
        print(compared)
    print_next(args, selection, written.path)


def agreement_of(selection: Selection) -> tuple:
    """How well a projected student agrees with its teacher.

    Returns:
        (a line for the screen, a dict for the provenance). If the agreement cannot be measured, the line says why and
        the dict is None. If nothing was projected, both are None.
    """
    from weight_selection.report import agreement_words

    if selection.projection is None:
        return None, None
    try:
        percent, images = selection.projection.agreement()
    except InputError as error:
        return f"how well the student agrees with its teacher is not known: {error}", None
    left_out = "classifier" in {entry.role for entry in selection.plan.entries}
    return agreement_words(percent, images, not left_out), {"percent": percent, "held_out_images": images}


def print_next(args: argparse.Namespace, selection: Selection, path: Path) -> None:
    """Print the command that trains the student from the written weights, if main.py can train it."""
    if split_name(args.student)[0] not in ("", *TIMM) or not TRAINER.is_file():
        return
    words = ["--config", args.student_config]
    if args.student_config is None:
        *_, height, width = selection.student_structure.facts.inputs[0].shape
        if height != width:
            return
        words = model_words(args.student, args.student_kwargs, width)
    words += words_of_normalization(selection)
    print(f"to train it, with --data_set, --data_path and --output_dir: {training_command(words, path)}")


def words_of_normalization(selection: Selection) -> list:
    """The option that makes main.py normalise images as the teacher's were; empty if it does so anyway.

    A line is printed if the teacher's images were not normalised by ImageNet's mean and deviation.
    """
    from weight_selection.sources.teachers import normalization_option, normalization_words

    if selection.normalization is None or (value := normalization_option(*selection.normalization)) == "true":
        return []
    what = f"the teacher's images were normalised with {normalization_words(*selection.normalization)}, not ImageNet's"
    if value is None:
        print(f"{what}; main.py has no option for that")
        return []
    print(f"{what}; train with --imagenet_default_mean_and_std {value}, as features are worse otherwise")
    return ["--imagenet_default_mean_and_std", value]


def run() -> None:
    """Run the command on the words of the command line, and exit."""
    if not any(word.split("=")[-1].lower() in PROJECTION for word in sys.argv):
        # A projection computes. The others copy, which waits for memory: more threads would wait for each other.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    run_program("weight_selection.py", main)
