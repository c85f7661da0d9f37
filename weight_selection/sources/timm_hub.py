"""The directory that ``timm.create_model("local-dir:PATH", pretrained=True)`` opens."""

import copy
import inspect
import json
import tempfile
from collections.abc import Sequence
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
    student, teacher = selection.student, selection.teacher
    config = {}
    if library_of(selection.models[0]) == "timm":
        trained = trained_config(selection.models[0], teacher.path, teacher.weights_option)
        config = {key: trained[key] for key in ("mean", "std")}
    named = student.model, student.kwargs, student.input_size
    remedy = "leave the option out, and name a .safetensors file as the --output_dir"
    return rebuildable(selection.models[1], *named, config, student.option, remedy)


def rebuildable(
    model: nn.Module, name: str, kwargs: dict, input_size: int | None, config: dict, option: str, remedy: str
) -> tuple:
    """A copy of a model, which shares its weights, and the arguments that timm rebuilds it with.

    Args:
        model: what ``timm_models.create_model`` makes of name, kwargs and input_size, perhaps on the meta device.
        config: entries for timm's configuration of the model, such as the mean and std of its images.
        option: what gave the name, for errors.
        remedy: what the user can do if timm cannot rebuild it, for errors.

    Raises:
        InputError: timm cannot rebuild it from its name and arguments in JSON.
    """
    model, arguments = copy.copy(model), architecture_of(name, option)[1] | kwargs
    if input_size is not None and model.pretrained_cfg.get("fixed_input_size"):
        arguments.setdefault("img_size", input_size)
    of_timm = inspect.signature(timm.create_model).parameters
    arguments = {key: value for key, value in arguments.items() if key not in of_timm and value is not None}
    refused = f"--format hub: timm cannot rebuild {name} from a config.json:"
    for key, value in arguments.items():
        try:
            json.dumps(value)
        except TypeError as error:
            raise InputError(f"{refused} JSON has no word for {key}={value}; {remedy}") from error
    model.pretrained_cfg = model.pretrained_cfg | {"tag": "", "custom_load": False} | config
    with tempfile.TemporaryDirectory() as directory:
        write_config((model, arguments), {}, Path(directory))
        try:
            with torch.device("meta"):
                rebuilt = timm.create_model(f"local-dir:{directory}")
        except (TypeError, ValueError, AssertionError, RuntimeError, LookupError, AttributeError) as error:
            raise InputError(f"{refused} {error}; {remedy}") from error
    if problem := first_mismatch(rebuilt.state_dict(), model):
        raise InputError(f"{refused} {problem}; {remedy}")
    return model, arguments


def write_config(configured: tuple, state_dict: dict, directory: Path, label_names: Sequence[str] = ()) -> None:
    """Write config.json.

    Args:
        configured: of ``configuration`` or ``rebuildable``.
        state_dict: not needed; timm's models do not record a type of values.
        label_names: names of the classes in the order of their labels, if they are known.
    """
    model, arguments = configured
    labels = {"label_names": list(label_names)} if label_names else None
    save_config_for_hf(model, str(directory / "config.json"), model_config=labels, model_args=arguments)


def stored_tensors(model: nn.Module, state_dict: dict) -> dict:
    """The tensors under the names that the directory's file has: timm's own."""
    return state_dict


def reopened(model: nn.Module, directory: Path) -> nn.Module:
    """The model that timm makes of a directory."""
    return timm.create_model(f"local-dir:{directory}", pretrained=True)
