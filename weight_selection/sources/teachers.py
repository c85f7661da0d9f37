"""A teacher's weights from a file or directory: under the model's own names, or in any layout that timm accepts."""

import re
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from pkgutil import resolve_name
from typing import NamedTuple

import numpy as np
import torch.nn as nn

from weight_selection.errors import InputError, first_line
from weight_selection.files import StrPath
from weight_selection.sources.architectures import HALVES, IMAGENET, NO_KEYS
from weight_selection.sources.directories import files_of
from weight_selection.sources.facts import facts_of, library_of
from weight_selection.sources.safe_load import check_archive
from weight_selection.sources.weight_files import (
    StoredTensor,
    Weights,
    first_mismatch,
    open_files,
    read_weights,
    training_options,
    without_common_prefix,
)

QUANTISED = re.compile(r"(torch\.)?(u?int8|float[48]|[UI]8$|F[48]_)")  # kinds of numbers, as files name them


class Opened(NamedTuple):
    """A teacher's weights, and where they come from.

    Attributes:
        weights: {the model's key: tensor}, as far as possible read only when asked for.
        model: the name of the architecture, with the tag of published weights.
        source: a path, an address or a name of the hub's.
        files: the files on this machine, if they are known.
        unused: the files' names of tensors that the model has no place for.
    """

    weights: Mapping
    model: str
    source: str
    files: list
    unused: list


# ---------------------------------------------------------------------------------------------------------
# Under the model's own names, or timm's layouts


def open_weights(path: StrPath, model: nn.Module, option: str) -> Opened:
    """As ``names.open_weights``, of a model of timm or of no library that we know."""
    weights, unused = open_teacher(path, model, option)
    name = getattr(model, "pretrained_cfg", {}).get("architecture") or type(model).__name__
    return Opened(weights, name, str(path), files_of(path, option), unused)


def open_teacher(path: StrPath, model: nn.Module, option: str) -> tuple:
    """As ``read_teacher``, but if the file uses timm's names, a tensor is read only when it is asked for.

    Other layouts (those of publishers, .npz, TorchScript, ``torch.save`` before PyTorch 1.6) are read whole.
    """
    stored = stored_under_own_names(files_of(path, option), model, option)
    if stored is None:
        return read_teacher(path, model, option)
    refuse_quantised(stored, model, f"{option} {path}")
    expected = model.state_dict()
    known = {key: value for key, value in stored.items() if key in expected}
    return Weights(known), [key for key in stored if key not in known]


def read_teacher(path: StrPath, model: nn.Module, option: str) -> tuple:
    """Read a teacher's weights in any layout that timm accepts for this model: foreign names, JAX's .npz.

    Args:
        path: .pth, .pt, .bin, .safetensors or .npz file, or a directory that has one of the first four.
        model: the teacher; only a .npz file needs it off the meta device, and is loaded into it.
        option: the option that named the file, for errors.

    Returns:
        ({timm's key: tensor}, the file's names of tensors that the model has no place for). Classifier keys are as
        the file has them: of any number of classes, or absent.

    Raises:
        InputError: the file cannot be read, or its keys or shapes are not the model's; the message names the first.
    """
    architecture = facts_of(model).architecture
    if Path(path).suffix == ".npz":
        state_dict, unused = _read_npz(path, model, architecture, option)
    else:
        state_dict, unused = _converted(read_weights(path, option), model, architecture, f"{option} {path}")
    if problem := mismatch(state_dict, model):
        raise InputError(f"{option} {path}: not the weights of this teacher: {problem}; name another or set its kwargs")
    expected = model.state_dict()
    unused += [key for key in state_dict if key not in expected]  # of the classifier: all others fit
    return {key: value for key, value in state_dict.items() if key in expected}, unused


def load_into_teacher(model: nn.Module, path: StrPath, option: str) -> None:
    """Load a file of ``read_teacher`` into a whole teacher, classifier included unless the model has none.

    Raises:
        InputError: as ``read_teacher``, or the classifier is absent or of another size.
    """
    weights, _ = read_teacher(path, model, option)
    if problem := first_mismatch(weights, model):
        raise InputError(f"{option} {path}: does not fit a teacher of {model.num_classes} classes: {problem}")
    model.load_state_dict(weights)


def stored_under_own_names(files: list, model: nn.Module, option: str) -> dict | None:
    """{key: StoredTensor} of files whose tensors are the model's but for its classifier; None for another layout."""
    stored = open_files(files, option)
    if stored is None:
        return None
    return next((s for s in (stored, without_common_prefix(stored)) if mismatch(s, model) is None), None)


def mismatch(state_dict: Mapping, model: nn.Module) -> str | None:
    """As ``first_mismatch``, but the classifier may be of any number of classes, or absent."""
    pattern = classifier_of(model)
    backbone = {key: value for key, value in state_dict.items() if not re.search(pattern, key)}
    return first_mismatch(backbone, model, lambda key: re.search(pattern, key))


def classifier_of(model: nn.Module) -> str:
    """The pattern of a model's classifier; if it does not say, one that matches no key."""
    return facts_of(model).architecture.classifier or NO_KEYS


def refuse_quantised(stored: Mapping[str, StoredTensor], model: nn.Module, where: str) -> None:
    """Raise InputError if a file has integers of 8 bits, or smaller numbers, where a model has floating point."""
    for key, value in model.state_dict().items():
        if key in stored and value.is_floating_point() and QUANTISED.match(stored[key].dtype):
            raise InputError(
                f"{where}: {key} is quantised ({stored[key].dtype}); give the original weights, in float32, float16 or "
                "bfloat16"
            )


def _converted(state_dict, model, architecture, origin):
    """timm's names for a file's tensors, and the file's names of the tensors that may be left out."""
    if architecture.filter_fn is None:
        return state_dict, []
    state_dict, unused = _tower(state_dict, architecture)
    extras = [key for key in state_dict if architecture.extras and re.search(architecture.extras, key)]
    try:
        converted = resolve_name(architecture.filter_fn)(dict(state_dict), model, **architecture.filter_options)
    except Exception as error:  # they assume one of the layouts they know, and fail in their own ways on any other
        raise InputError(f"{origin}: timm cannot convert it for a {architecture.name} model ({error!r})") from error
    converted = {key: value for key, value in converted.items() if key not in extras}
    lost = len(state_dict) - len(extras) - len(converted)
    if lost > 0:  # timm drops keys that it does not know without a word
        raise InputError(
            f"{origin}: timm's conversion loses {lost} of its tensors; give a file of the image model alone"
        )
    return converted, unused + extras


def _tower(state_dict, architecture):
    """In a file of a larger whole: the image model under timm's prefix, and the names of everything else."""
    for prefix, timms in architecture.towers.items():
        inside = {key: value for key, value in state_dict.items() if key.startswith(prefix)}
        if inside:
            outside = [key for key in state_dict if key not in inside]
            return {timms + key.removeprefix(prefix): value for key, value in inside.items()}, outside
    return state_dict, []


def _read_npz(path, model, architecture, option):
    files_of(path, option)
    if not hasattr(model, "load_pretrained"):
        raise InputError(
            f"{option} {path}: timm reads no .npz for a {type(model).__name__}; convert it to .safetensors"
        )
    try:
        check_archive(path)
        with np.load(path, allow_pickle=False) as arrays:
            names = arrays.files
            classes = arrays["head/bias"].shape[0] if "head/bias" in names else 0
        model.load_pretrained(str(path))
    except Exception as error:  # the zip, numpy and timm layers each have their own errors for a file that is not one
        raise InputError(f"{option} {path}: timm cannot read it for this model ({first_line(error)})") from error
    state_dict = model.state_dict()
    deep = len({match[1] for match in map(re.compile(r"/encoderblock_(\d+)/").search, names) if match})
    shallow = len(getattr(model, "blocks", ()))
    if deep > shallow:  # timm fills the model's layers and does not look for more
        raise InputError(
            f"{option} {path}: not the weights of this teacher: it has {deep} layers, the model {shallow}; name another"
        )
    if classes != model.num_classes:  # then timm has left the classifier as it was: random
        state_dict = {key: value for key, value in state_dict.items() if not re.search(architecture.classifier, key)}
    return state_dict, [name for name in names if architecture.extras and re.search(architecture.extras, name)]


# ---------------------------------------------------------------------------------------------------------
# The images that a teacher was trained on


def normalization(imagenet: bool) -> tuple:
    """(mean, std) by channel that images are normalised with: ImageNet's, or 0.5 and 0.5."""
    return IMAGENET if imagenet else HALVES


def normalization_option(mean: Sequence, std: Sequence) -> str | None:
    """The value of main.py's ``--imagenet_default_mean_and_std`` that gives a mean and std; None: neither does."""
    values = {"true": normalization(True), "false": normalization(False)}
    return next((word for word, known in values.items() if known == (tuple(mean), tuple(std))), None)


def normalization_words(mean: Sequence, std: Sequence) -> str:
    """A mean and std by channel in words: "mean 0.5 0.5 0.5 and std 0.5 0.5 0.5"."""
    mean, std = (" ".join(f"{value:g}" for value in values) for values in (mean, std))
    return f"mean {mean} and std {std}"


def trained_normalization(model: nn.Module, path: StrPath | None, option: str) -> tuple | None:
    """(mean, std) by channel of the images that a model's weights were trained on; None if they are not known.

    Args:
        model: of any library.
        path, option: as of ``trained_config``.
    """
    library = library_of(model)
    if library == "transformers":  # its facts have what we assume if the model does not say
        return import_module("weight_selection.sources.transformers_models").recorded_normalization(model)
    if library != "timm":
        return facts_of(model).normalization
    config = trained_config(model, path, option)
    return (tuple(config["mean"]), tuple(config["std"])) if {"mean", "std"} <= config.keys() else None


def trained_config(model: nn.Module, path: StrPath | None, option: str) -> dict:
    """A timm model's configuration with the ``mean`` and ``std`` of the images that its weights were trained on.

    A checkpoint of main.py says itself which these were; of all other files timm's configuration is right.

    Args:
        model: of timm.
        path: file of the weights that ``option`` named, or None if they are timm's.
    """
    options = {} if path is None else training_options(path, option)
    if isinstance(options.get("imagenet_default_mean_and_std"), bool):
        mean, std = normalization(options["imagenet_default_mean_and_std"])
        return model.pretrained_cfg | {"mean": mean, "std": std}
    return model.pretrained_cfg
