"""What ``weight_selection.py`` does once its options are checked: plan, read the teacher, select, write, read back."""

import copy
import json
import os
import re
import sys
from collections import Counter
from concurrent.futures import Future
from pathlib import Path

import huggingface_hub
import timm
import torch
import torch.nn as nn

from weight_selection import ELEMENT_SELECTION, FITTED, NOISE, check_exclude
from weight_selection.errors import InputError
from weight_selection.files import SUFFIXES, begin_sha256, check_writable, new_file, sha256
from weight_selection.plan import anatomy, apply_plan, plan_selection
from weight_selection.sources.families import Family
from weight_selection.sources.membership import family_of
from weight_selection.sources.timm_models import create_model
from weight_selection.sources.weight_files import (
    downloaded_file,
    first_mismatch,
    open_published,
    open_teacher,
    provenance_path,
    read_weights,
    write_weights,
)
from weight_selection.tracing.tracer import input_size


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
        check_exclude(element_selection, plan_options.get("exclude"))
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
    from weight_selection.plan import apply_plan, make_plan
    from weight_selection.sources.membership import family_of
    from weight_selection.sources.weight_files import create_pretrained, open_teacher

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
    from weight_selection.projection.project import fit_weights, load_teacher
    from weight_selection.sources.weight_files import trained_config

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


def output_file(output_dir: str, model_type: str, overwrite: bool) -> Path:
    """The file to write, after making sure that it can be written and nothing is lost by it."""
    path = Path(output_dir)
    if path.suffix in SUFFIXES:
        if path.is_dir():
            raise InputError(f"--output_dir {path}: is a directory; remove it or choose another name")
    else:
        path = path / f"{model_type}.pth"
    check_writable(path.parent, "--output_dir")
    for existing in (path, provenance_path(path)):
        if existing.exists() and not overwrite:
            raise InputError(f"--output_dir {output_dir}: {existing} exists; add --overwrite to replace it")
    return path


def load_teacher(args, teacher: nn.Module, family: Family) -> tuple:
    """The teacher's weights and where they came from: (mapping of keys to tensors, provenance, file or None).

    The provenance says what of a file was left out, as {first word of the keys: number of tensors}.
    """
    cfg = teacher.pretrained_cfg
    model = ".".join(filter(None, (cfg["architecture"], args.pretrained_path is None and cfg.get("tag"))))
    origin = {"name": args.pretrained_model, "model": model, "kwargs": args.teacher_kwargs}
    if args.pretrained_path is not None:
        if Path(args.pretrained_path).suffix == ".npz":  # timm converts these only into a real model
            teacher = create_model(args.pretrained_model, option="--pretrained_model", **args.teacher_kwargs)
        weights, unused = open_teacher(args.pretrained_path, teacher, family, "--pretrained_path")
        if unused:
            origin["unused"] = dict(Counter(re.split("[./]", key)[0] for key in unused))
        return weights, origin | {"source": str(args.pretrained_path)}, Path(args.pretrained_path)
    if args.include_head and teacher.num_classes != cfg["num_classes"]:  # timm drops the published one
        raise InputError(
            f"--include_head: the published classifier has {cfg['num_classes']} classes; leave num_classes out of "
            "--teacher_kwargs"
        )
    weights = open_published(
        args.pretrained_model, teacher, args.teacher_kwargs, "--pretrained_model", "give --pretrained_path FILE"
    )
    return weights, origin | {"source": cfg.get("hf_hub_id") or cfg.get("url")}, downloaded_file(cfg)


def verify(path: Path, state_dict: dict, student: nn.Module, left_out: list) -> None:
    """Read a written file back, load it into the student, all of whose keys but ``left_out`` it has, and run it once.

    Raises:
        InputError: the file does not give back what was selected, or the student's output is not finite.
    """
    written = read_weights(path, "--output_dir")
    problem = first_mismatch(written, student, lambda key: key in left_out)
    if not problem and not all(torch.equal(written[key], value) for key, value in state_dict.items()):
        problem = "other values"
    if problem:
        raise InputError(f"--output_dir: what was written cannot be loaded: {problem}")
    student.load_state_dict(written, strict=False)
    images = torch.randn(1, *input_size(student), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        if not student.eval()(images).isfinite().all():
            raise InputError("--student: its output with the selected weights is not finite")


def print_plan(plan: list, describe) -> None:
    """The plan as a table, with what ``describe`` says of each entry."""
    rows = [("student key", "shape", "teacher key", "shape", "rule")]
    for entry in plan:
        shapes = [
            "x".join(map(str, shape)) if shape is not None else "-" for shape in (entry.shape, entry.source_shape)
        ]
        rows.append((entry.key, shapes[0], entry.source or "-", shapes[1], describe(entry)))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows:
        print("  ".join([*(text.ljust(width) for text, width in zip(row, widths, strict=False)), row[4]]))


class _Fitting:
    """Selection by one of ``FITTED``; what can be refused is refused at once.

    Args:
        args: checked options.
        plan: of the selection.
        teacher, whole: on the meta device, and its anatomy.
        student, taken_apart: likewise.
    """

    def __init__(self, args, plan, teacher, whole, student, taken_apart):
        from weight_selection.projection.images import Calibration
        from weight_selection.projection.maps import check_heads
        from weight_selection.projection.symmetry_check import check_streams
        from weight_selection.projection.traced_model import TracedModel
        from weight_selection.sources.weight_files import trained_config

        self.args = args
        self.traced = TracedModel.of(teacher, whole), TracedModel.of(student, taken_apart)
        if args.element_selection == "project":
            check_streams(self.traced[0].symmetries, args.pretrained_model)
        if args.calibration is not None:
            self.images = Calibration(
                args.calibration,
                args.calibration_images,
                args.calibration_size,
                input_size(student),
                trained_config(teacher, args.pretrained_path, "--pretrained_path"),
                args.seed,
            )
        check_heads({entry.key: entry for entry in plan if entry.role == "selected"}, *self.traced)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"

    def record(self):
        """What the provenance says of it."""
        return {
            "calibration": self.args.calibration,
            "calibration_images": self.images.count,
            "calibration_size": list(self.images.size[1:]),
            "calibration_sha256": self.images.sha256,
            "calibration_device": self.device,
        }

    def describe(self, plan):
        from weight_selection.projection.project import describer

        structures = (traced.structure for traced in self.traced)
        return describer(plan, self.traced[0].symmetries, *structures, self.args.element_selection == "project")

    def fit(self, weights, student_options, plan_options, option):
        from weight_selection.projection.project import fit_weights, load_teacher

        args = self.args
        teacher = create_model(args.pretrained_model, option="--pretrained_model", **args.teacher_kwargs)
        load_teacher(teacher, weights, option, args.include_head)
        student = create_model(args.student, **student_options)
        return fit_weights(
            teacher.to(self.device), student, method=args.element_selection, calibration=self.images, **plan_options
        )


def run(args, digest: Future | None) -> None:
    """Select, or with ``--dry_run`` only print the plan.

    Args:
        args: checked options.
        digest: SHA-256 of the teacher's file, if that is known already and being read.
    """
    huggingface_hub.utils.logging.set_verbosity_error()  # a page of retries would hide the one line of an error
    student_options = {"option": "--student", "input_size": args.student_input_size, **args.student_kwargs}
    student = create_model(args.student, device="meta", **student_options)
    teacher = create_model(args.pretrained_model, option="--pretrained_model", device="meta", **args.teacher_kwargs)
    family = family_of(student, f"--student {args.student}")
    if args.model_type not in (None, family.name):
        raise InputError(f"--model_type {args.model_type}: but --student {args.student} is of family {family.name}")
    plan_options = {
        "layer_selection": args.layer_selection,
        "exclude": args.exclude,
        "include_head": args.include_head,
        "include_head_norm": args.include_head_norm,
        "allow_unused": args.allow_unused,
    }
    taken_apart = anatomy(student, f"--student {args.student}")
    whole = anatomy(teacher, f"--pretrained_model {args.pretrained_model}")
    plan = plan_selection(whole, taken_apart, **plan_options)
    fitting = _Fitting(args, plan, teacher, whole, student, taken_apart) if args.element_selection in FITTED else None
    counts = {role: sum(entry.role == role for entry in plan) for role in ("selected", "excluded", "classifier")}
    summary = ", ".join(f"{count} {role}" for role, count in counts.items() if count)
    if args.dry_run:
        if fitting is None:
            print_plan(plan, lambda entry: entry.describe(args.element_selection))
        else:
            print_plan(plan, fitting.describe(plan))
        print(f"{args.student} from {args.pretrained_model}: {summary}; nothing written")
        return

    path = output_file(args.output_dir, family.name, args.overwrite)
    weights, origin, file = load_teacher(args, teacher, family)
    option = "--pretrained_model" if args.pretrained_path is None else "--pretrained_path"
    if digest is None and file is not None:
        digest = begin_sha256(file)
    option = f"{option} {args.pretrained_path or args.pretrained_model}"
    if fitting is None:
        state_dict = apply_plan(plan, weights, element_selection=args.element_selection, seed=args.seed, option=option)
    else:
        state_dict = fitting.fit(weights, student_options, plan_options, option)
    left_out = [entry.key for entry in plan if entry.role != "selected"]
    torch.manual_seed(args.seed)
    student = create_model(args.student, **student_options)
    if args.complete:
        own = student.state_dict()
        state_dict = {entry.key: state_dict.get(entry.key, own[entry.key]) for entry in plan}
    absent = [] if args.complete else left_out
    with new_file(provenance_path(path)) as record, new_file(path) as temporary:
        write_weights(state_dict, temporary)
        verify(temporary, state_dict, student, absent)
        provenance = {
            "file": path.name,
            "sha256": sha256(temporary),
            "teacher": origin | {"sha256": digest and digest.result()},
            "student": {"name": args.student, "kwargs": args.student_kwargs}
            | ({"input_size": args.student_input_size} if args.student_input_size else {}),
            "options": {**plan_options, "element_selection": args.element_selection, "seed": args.seed}
            | (fitting.record() if fitting is not None else {}),
            "left_out": absent,
            **({"random": left_out} if args.complete else {}),
            "versions": {"torch": torch.__version__, "timm": timm.__version__, "python": sys.version.split()[0]},
        }
        record.write_text(json.dumps(provenance, indent=2) + "\n")
    if "unused" in origin:
        spare = ", ".join(f"{name} ({count})" for name, count in origin["unused"].items())
        print(f"{origin['source']}: left out, tensors that the teacher has no place for: {spare}")
    parameters = sum(value.numel() for value in state_dict.values())
    print(f"{path}: {args.student} from {args.pretrained_model}, {summary} tensors, {parameters:,} values")
