#!/usr/bin/env python3
"""Weight selection: the first weights of a small model, picked from a larger pretrained one of its family.

"Initializing Models with Larger Ones" (ICLR 2024), section 3. Three steps: select layers, match components, select
elements. A plan is made first, from shapes alone: for every student key the teacher's key and what to take along
each dimension. Applying it touches the weights.

    python weight_selection.py --output_dir init/ --model_type vit --pretrained_model vit_small_patch16_224_in21k

    from weight_selection import select_weights
    student.load_state_dict(select_weights(teacher, student), strict=False)
"""

import argparse
import copy
import os
import sys

from files import begin_sha256, check_file
from models.families import COMPONENTS, FAMILIES
from program import InputError, Kwargs, Parser, check_kwargs, run_program
from selection import CALIBRATION_IMAGES, ELEMENT_SELECTION, FITTED, LAYER_SELECTION, NOISE, SEEDED, check_calibration


def select_weights(
    teacher,
    student,
    *,
    weights=None,
    element_selection: str = "uniform",
    seed: int = 0,
    calibration=None,
    calibration_images: int | None = None,
    calibration_size: int | None = None,
    **plan_options,
) -> dict:
    """Select a student's first weights from a teacher, or project the teacher's onto it.

    Args:
        teacher: a timm model, or the name of one; its own weights are taken (of a name the published ones), unless
            ``weights`` are given: then it may be on the meta device.
        student: a smaller model of the same family, or a name; only its shapes matter, it may be on the meta device.
        weights: the teacher's weights apart from it: a state_dict with timm's keys, or a file that
            ``--pretrained_path`` would take.
        element_selection: one of ``ELEMENT_SELECTION``, or of ``FITTED``: these run both models, so none is on the meta
            device, and work where the teacher is.
        seed: of the random selections, of noise, and of the draw of images.
        calibration, calibration_images, calibration_size: of ``selection.calibrated.fit_weights``, for ``FITTED``.
        **plan_options: of ``plan_selection``: layer_selection, exclude, include_head, include_head_norm, allow_unused.

    Returns:
        A state_dict for ``student.load_state_dict(..., strict=False)``, without classifier and excluded components.

    Raises:
        InputError: unknown name, weights that are not this teacher's, or a student that is no smaller version of it.
    """
    if element_selection not in ELEMENT_SELECTION + FITTED:
        raise InputError(
            f"element_selection={element_selection}: choose one of {', '.join(ELEMENT_SELECTION + FITTED)}"
        )
    fitted = element_selection in FITTED
    if fitted:
        _check_exclude(element_selection, plan_options.get("exclude"))
        if calibration is None:
            raise InputError(f"calibration is missing: a directory of images, batches of images, or {NOISE}")
    of_images = {
        "calibration": calibration,
        "calibration_images": calibration_images,
        "calibration_size": calibration_size,
    }
    for option, value in of_images.items():
        if value is not None and not fitted:
            raise InputError(f"{option}: has no effect with element_selection={element_selection}; leave it out")
    from models.create import create_model
    from models.membership import family_of
    from models.weights import create_pretrained, open_teacher
    from selection.plan import apply_plan, make_plan

    device = "cpu" if fitted else "meta"
    file = weights if isinstance(weights, (str, os.PathLike)) else None
    if isinstance(teacher, str) and weights is None:
        teacher = create_pretrained(teacher, {}, "teacher", "give a loaded model, or weights")
    elif isinstance(teacher, str):
        jax = str(file).endswith(".npz")  # which timm converts only into a real model
        teacher = create_model(teacher, option="teacher", device="cpu" if jax else device)
    if isinstance(student, str):
        student = create_model(student, option="student", device=device)
    plan = None if fitted else make_plan(teacher, student, **plan_options)
    if weights is None:
        weights = teacher.state_dict()
    elif file is not None:
        weights, _ = open_teacher(weights, teacher, family_of(teacher, "teacher"), "weights")
    if not fitted:
        return apply_plan(plan, weights, element_selection=element_selection, seed=seed, option="weights")
    from datasets import trained_config
    from selection.calibrated import fit_weights, load_teacher

    for name, model in (("teacher", teacher), ("student", student)):
        if next(model.parameters()).is_meta:
            raise InputError(f"{name}: is on the meta device, but projection runs it; give a real one")
    teacher, student = copy.deepcopy(teacher), copy.deepcopy(student)
    teacher.pretrained_cfg = trained_config(teacher, file, "weights")
    load_teacher(teacher, weights, "weights", plan_options.get("include_head", False))
    return fit_weights(
        teacher,
        student,
        method=element_selection,
        **of_images,
        seed=seed,
        **plan_options,
    )


# ---------------------------------------------------------------------------------------------------------
# The command line


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


def _check_exclude(method, exclude):
    if exclude:
        raise InputError(
            f"--exclude {exclude[0]}: {method} fits layers to what those before them give, which must not be random; "
            "leave it out, or select by another rule"
        )


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
        _check_exclude(args.element_selection, args.exclude)
        check_calibration(args.calibration, args.calibration_images, args.calibration_size)


def _read_student(args):
    """The student of a configuration for main.py."""
    import options

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
    from selection.command import run

    run(args, digest)


if __name__ == "__main__":
    if not any(word.split("=")[-1] in FITTED for word in sys.argv):  # these compute; the others copy, which waits for
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # memory: more threads would wait for each other
    run_program("weight_selection.py", main)
