"""The directory that ``timm.create_model("local-dir:PATH", pretrained=True)`` opens."""

import copy
import inspect
import json
import tempfile
from pathlib import Path

import timm
import torch
import torch.nn as nn
from timm.models._hub import save_config_for_hf

from weight_selection.errors import InputError
from weight_selection.sources.facts import library_of
from weight_selection.sources.teachers import trained_config
from weight_selection.sources.timm_models import architecture_of
from weight_selection.sources.weight_files import first_mismatch


def configuration(selection) -> tuple:
    """The student without weights, with the teacher's image statistics, and the arguments that timm rebuilds it with.

    Args:
        selection: a ``Selection`` whose student has a name.

    Raises:
        InputError: timm cannot rebuild it from its name and arguments in JSON.
    """
    student, teacher, model = selection.student, selection.teacher, copy.copy(selection.models[1])
    arguments = architecture_of(student.model, student.option)[1] | student.kwargs
    if student.input_size is not None and model.pretrained_cfg.get("fixed_input_size"):
        arguments.setdefault("img_size", student.input_size)
    of_timm = inspect.signature(timm.create_model).parameters
    arguments = {key: value for key, value in arguments.items() if key not in of_timm and value is not None}
    for key, value in arguments.items():
        if not _in_json(value):
            raise _refused(student.model, f"JSON has no word for {key}={value}")
    config = model.pretrained_cfg | {"tag": "", "custom_load": False}
    if library_of(selection.models[0]) == "timm":
        trained = trained_config(selection.models[0], teacher.path, teacher.weights_option)
        config |= {key: trained[key] for key in ("mean", "std")}
    model.pretrained_cfg = config
    with tempfile.TemporaryDirectory() as directory:
        write_config((model, arguments), {}, Path(directory))
        try:
            with torch.device("meta"):
                rebuilt = timm.create_model(f"local-dir:{directory}")
        except (TypeError, ValueError, AssertionError, RuntimeError, LookupError, AttributeError) as error:
            raise _refused(student.model, error) from error
    if problem := first_mismatch(rebuilt.state_dict(), model):
        raise _refused(student.model, problem)
    return model, arguments


def write_config(configured: tuple, state_dict: dict, directory: Path) -> None:
    """Write config.json.

    Args:
        configured: of ``configuration``.
        state_dict: not needed; timm's models do not record a type of values.
    """
    model, arguments = configured
    save_config_for_hf(model, str(directory / "config.json"), model_args=arguments)


def stored_tensors(model: nn.Module, state_dict: dict) -> dict:
    """The tensors under the names that the directory's file has: timm's own."""
    return state_dict


def reopened(model: nn.Module, directory: Path) -> nn.Module:
    """The model that timm makes of a directory."""
    return timm.create_model(f"local-dir:{directory}", pretrained=True)


def _in_json(value):
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True


def _refused(name, reason):
    return InputError(
        f"--format hub: timm cannot rebuild {name} from a config.json: {reason}; leave the option out, and name a "
        ".safetensors file as the --output_dir"
    )
