"""The directory that ``from_pretrained(PATH)`` of Hugging Face opens."""

import copy
from pathlib import Path

import torch
import torch.nn as nn
from transformers.utils import logging

from weight_selection.errors import InputError

try:
    from transformers.core_model_loading import revert_weight_conversion
except ImportError:  # before version 5 a file has the names of the model
    revert_weight_conversion = None


def configuration(selection):
    """The configuration of the student, which names its class."""
    model = selection.models[1]
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    return config


def write_config(config, state_dict: dict, directory: Path) -> None:
    """Write config.json, which says the type of the values that stand beside it."""
    dtype = next(value.dtype for value in state_dict.values() if value.is_floating_point())
    setattr(config, "dtype" if hasattr(config, "dtype") else "torch_dtype", str(dtype).removeprefix("torch."))
    config.save_pretrained(directory)


def stored_tensors(model: nn.Module, state_dict: dict) -> dict:
    """The tensors under the names that from_pretrained reads.

    Args:
        state_dict: a tied tensor once.
    """
    return revert_weight_conversion(model, state_dict) if revert_weight_conversion else state_dict


def reopened(model: nn.Module, directory: Path) -> nn.Module:
    """The model that from_pretrained makes of a directory.

    Raises:
        InputError: it does not find a tensor there, or does not know what to do with one.
    """
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        opened, found = type(model).from_pretrained(directory, output_loading_info=True, local_files_only=True)
    finally:
        if shown:
            logging.enable_progress_bar()
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if found[problem]:
            raise InputError(
                f"--format hub: from_pretrained has {problem.replace('_', ' ')}: {next(iter(found[problem]))}"
            )
    return opened


def initialised(model: nn.Module, keys: list, seed: int) -> dict:
    """The own initialisation of some of a model's tensors; only the modules that hold them take memory.

    Args:
        model: on the meta device; it is not changed.
    """
    torch.manual_seed(seed)
    model = copy.deepcopy(model)
    for name in dict.fromkeys(key.rpartition(".")[0] for key in keys):
        module = model.get_submodule(name).to_empty(device="cpu", recurse=False)
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
        model._init_weights(module)
    state_dict = model.state_dict()
    return {key: state_dict[key] for key in keys}
