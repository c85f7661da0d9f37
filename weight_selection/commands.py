"""The commands that come next: main.py's with a file of first weights, or weight_selection.py's for another student.

Imports no torch.
"""

import shlex
from pathlib import Path

from weight_selection.sources import MODEL_TYPES
from weight_selection.sources.recipe import INPUT_SIZE

ELSEWHERE = ("num_classes", "img_size", "drop_path_rate")  # arguments of a model that other options of main.py set


def model_words(name: str, kwargs: dict, input_size: int | None = None) -> list:
    """The options of main.py that name a model.

    Args:
        kwargs: of timm. ``img_size`` is the input size unless that is given.
        input_size: side of the square input in pixels.
    """
    side = input_size or kwargs.get("img_size")
    side = side[0] if isinstance(side, (list, tuple)) and side else side
    words = ["--model", name, *_assigned("--model_kwargs", {k: v for k, v in kwargs.items() if k not in ELSEWHERE})]
    if "drop_path_rate" in kwargs:
        words += ["--drop_path", str(kwargs["drop_path_rate"])]
    return words if side in (None, INPUT_SIZE) else [*words, "--input_size", str(side)]


def training_command(words: list, path: Path | str) -> str:
    """The command that trains a student from a file: ``words`` name it, as ``model_words`` does or as a recipe."""
    return shlex.join(["python", "main.py", *words, "--initialize", str(path)])


def selection_command(student: list, architecture: str, provenance: dict | None = None) -> str:
    """The command that selects first weights for another student.

    Args:
        student: options of weight_selection.py that name it.
        architecture: its name.
        provenance: of weights whose teacher is of that architecture too, which is taken again by the same rules.
    """
    if provenance is None:
        teacher = ["--pretrained_model", MODEL_TYPES[architecture][1] if architecture in MODEL_TYPES else "TEACHER"]
    else:
        made, options = provenance["teacher"], provenance["options"]
        teacher = ["--pretrained_model", str(made.get("name")), *_assigned("--teacher_kwargs", made.get("kwargs"))]
        if Path(str(made.get("source"))).exists() and not str(made.get("name")).endswith(str(made["source"])):
            teacher += ["--pretrained_path", str(made["source"])]
        for name, default in (("layer_selection", "first_n"), ("element_selection", "uniform")):
            if options.get(name, default) != default:
                teacher += [f"--{name}", str(options[name])]
        if "calibration" in options:
            teacher += ["--calibration", str(options["calibration"])]
    return shlex.join(["python", "weight_selection.py", *teacher, *student, "--output_dir", "NEW"])


def student_words(name: str, kwargs: dict) -> list:
    """The options of weight_selection.py that name a student."""
    return ["--student", name, *_assigned("--student_kwargs", kwargs)]


def _assigned(option, kwargs):
    """An option with arguments of a model as ``weight_selection.arguments.Kwargs`` reads them."""
    if not isinstance(kwargs, dict) or not kwargs:
        return []
    return [option, *(f"{name}={str(value).replace(' ', '')}" for name, value in kwargs.items())]
