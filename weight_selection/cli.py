"""The command: its options, and their checks, before torch is imported."""

import argparse
import os
import sys

from weight_selection import (
    CALIBRATION_IMAGES,
    ELEMENT_SELECTION,
    FITTED,
    LAYER_SELECTION,
    NOISE,
    SEEDED,
    check_calibration,
    check_exclude,
)
from weight_selection.arguments import Kwargs, Parser, check_kwargs
from weight_selection.errors import InputError, run_program
from weight_selection.files import begin_sha256, check_file
from weight_selection.sources.families import COMPONENTS, FAMILIES


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser("weight_selection.py", "Select a small model's first weights from a larger pretrained one.")
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
        action=Kwargs,
        metavar="K=V",
        help="such as embed_dim=96 num_heads=3",
    )
    add(
        "--student_config",
        metavar="FILE",
        help="instead: a YAML file of main.py --config, whose model, model_kwargs, input_size are the student's",
    )
    add("--teacher_kwargs", nargs="*", default={}, action=Kwargs, metavar="K=V", help="likewise for the teacher")
    add("--layer_selection", choices=LAYER_SELECTION, default="first_n")
    add(
        "--element_selection",
        choices=ELEMENT_SELECTION + FITTED,
        default="uniform",
        help="project (rotated) and greedy (coordinates) go beyond the paper, and need --calibration",
    )
    add(
        "--calibration",
        metavar=f"DIR|{NOISE}",
        help="images without labels for project and greedy: those of the task are best, any will do; or none, noise",
    )
    add(
        "--calibration_images",
        type=int,
        metavar="N",
        help=f"how many of them ({CALIBRATION_IMAGES}; of a smaller directory all)",
    )
    add(
        "--calibration_size",
        type=int,
        metavar="N",
        help="side in pixels of images for a model that takes any, such as a ResNet (that of timm or --student_config)",
    )
    add("--seed", type=int, help="of the random selections, of noise and of the choice of images (default: 0)")
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
    add(
        "--complete",
        action="store_true",
        help="write the student's own initialisation of all else too, a whole checkpoint (timm's checkpoint_path)",
    )
    add("--overwrite", action="store_true", help="replace an existing output file")
    add("--dry_run", action="store_true", help="print the plan; needs no weights and writes nothing")
    return parser


def check_options(args) -> None:
    """Fill in what follows from other options, and refuse what has no effect or cannot work."""
    args.student_input_size = None
    if args.student_config is not None:
        _read_student(args)
    if args.model_type is None and (args.student is None or args.pretrained_model is None):
        missing = "--student" if args.student is None else "--pretrained_model"
        raise InputError(
            f"{missing} is missing: name it, or give --model_type {{{','.join(FAMILIES)}}} for the defaults"
        )
    if args.model_type is not None:
        args.student = args.student or FAMILIES[args.model_type].student
        args.pretrained_model = args.pretrained_model or FAMILIES[args.model_type].teacher
    if args.seed is not None and args.element_selection not in SEEDED + FITTED and not args.complete:
        raise InputError(
            f"--seed {args.seed}: has no effect with --element_selection {args.element_selection}; leave it out"
        )
    args.seed = args.seed or 0
    if args.seed < 0:
        raise InputError(f"--seed {args.seed}: give a number from 0 up")
    _check_calibration(args)
    if args.output_dir is None and not args.dry_run:
        raise InputError("--output_dir is missing: name a directory or a file, or add --dry_run to only see the plan")
    if args.pretrained_path is not None:
        check_file(args.pretrained_path, "--pretrained_path")
    check_kwargs(args.student_kwargs, "--student_kwargs", {})
    check_kwargs(args.teacher_kwargs, "--teacher_kwargs", {})


def _check_calibration(args):
    fitted = args.element_selection in FITTED
    given = {
        "--calibration": args.calibration,
        "--calibration_images": args.calibration_images,
        "--calibration_size": args.calibration_size,
    }
    for option, value in given.items():
        if value is not None and not fitted:
            raise InputError(
                f"{option} {value}: has no effect with --element_selection {args.element_selection}; leave it out, or "
                f"choose {' or '.join(FITTED)}"
            )
    if fitted and args.calibration is None and not args.dry_run:
        raise InputError(
            f"--calibration is missing: --element_selection {args.element_selection} needs a directory of images (any, "
            f"without labels; those of the task are best), or {NOISE}"
        )
    if fitted:
        check_exclude(args.element_selection, args.exclude)
        check_calibration(args.calibration, args.calibration_images, args.calibration_size)


def _read_student(args):
    """The student of a configuration for main.py."""
    from training import options

    path = args.student_config
    for option, value in (("--student", args.student), ("--student_kwargs", args.student_kwargs)):
        if value:
            raise InputError(f"--student_config {path}: already names the student; leave {option} out")
    parser = options.get_args_parser()
    words = options.read_config(path, parser, "--student_config")
    if "--model" not in words:
        raise InputError(f"--student_config {path}: has no model; name one, such as model: vit_tiny")
    given = parser.parse_args(words)
    args.student, args.student_kwargs = given.model, given.model_kwargs
    args.student_input_size = given.input_size


def main(argv=None) -> None:
    args = get_args_parser().parse_args(argv)
    check_options(args)
    # To read all of a large file takes longer than to select from it, and torch takes seconds to import.
    digest = begin_sha256(args.pretrained_path) if args.pretrained_path and not args.dry_run else None
    from weight_selection.selection import run

    run(args, digest)


def run() -> None:
    """What ``weight-selection``, ``python -m weight_selection`` and ``python weight_selection.py`` do."""
    if not any(word.split("=")[-1] in FITTED for word in sys.argv):  # these compute; the others copy, which waits for
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # memory: more threads would wait for each other
    run_program("weight_selection.py", main)
