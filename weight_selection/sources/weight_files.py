"""Weights on disk: reading files that may come from strangers, writing ours, and loading that asserts every key."""

import argparse
import contextlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from pkgutil import resolve_name

import huggingface_hub
import numpy as np
import safetensors
import safetensors.torch
import torch
import torch.nn as nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from timm.models import clean_state_dict

from weight_selection.errors import InputError
from weight_selection.files import SUFFIXES, Damaged, check_file, parse_json, read_text, sha256
from weight_selection.sources.families import Family
from weight_selection.sources.membership import classifier_pattern, family_by_class, family_of
from weight_selection.sources.safe_load import check_archive, is_archive, is_plain, load_torch, map_torch, read_mapped
from weight_selection.sources.timm_models import create_model
from weight_selection.sources.torchscript import is_torchscript, read_torchscript

# Entries under which training scripts nest a state_dict, in the order in which timm's own loader looks for them; then
# DINO's: of its two networks the teacher, the moving average of the other, is what its authors publish and evaluate.
NESTED = ("state_dict_ema", "model_ema", "state_dict", "model", "teacher")
ALSO = (argparse.Namespace,)  # in which most training scripts keep their options, beside the weights


def read_weights(path, option: str, nested=NESTED) -> dict:
    """Read a state_dict from a .safetensors file, a TorchScript archive or any file of ``torch.save``.

    No code from the file is run.

    Args:
        path: the file.
        option: the command-line option that named it, for errors.
        nested: keys under which the state_dict may be nested; the first that is there and not None is taken.

    Returns:
        {key: tensor}, with the prefixes of DDP and torch.compile removed.

    Raises:
        InputError: missing, empty, truncated, with code in it, or no state_dict.
    """
    return _state_dict(_read(Path(path), option), nested, option, path)


def _state_dict(content, nested, option, path):
    """The state_dict in what a file holds."""
    if isinstance(content, dict):
        content = next((content[key] for key in nested if content.get(key) is not None), content)
    if not isinstance(content, dict) or not content or not all(map(_is_named_tensor, content.items())):
        raise InputError(
            f"{option} {path}: holds no state_dict (names with a tensor each), at the top or under {nested}"
        )
    return clean_state_dict(content)


def _is_named_tensor(item):
    return isinstance(item[0], str) and is_plain(item[1])


def training_options(path, option: str) -> dict:
    """The options of the run that a file is a checkpoint of, if main.py wrote it; else nothing."""
    content = {} if Path(path).suffix in (".npz", ".safetensors") else _read(Path(path), option)
    options = content.get("args") if isinstance(content, dict) else None
    return options if isinstance(options, dict) else {}


def normalization(imagenet: bool) -> tuple:
    """Mean and standard deviation, by channel, that images are normalised with: ImageNet's, or 0.5 and 0.5."""
    if imagenet:
        return IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    return IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD


def trained_config(model: nn.Module, path, option: str) -> dict:
    """A model's timm configuration, with the ``mean`` and ``std`` of images that its weights were trained with.

    A checkpoint of main.py says itself what these were.

    Args:
        model: of timm.
        path: file of the weights that ``option`` named, or None if they are timm's.
    """
    options = {} if path is None else training_options(path, option)
    if isinstance(options.get("imagenet_default_mean_and_std"), bool):
        mean, std = normalization(options["imagenet_default_mean_and_std"])
        return model.pretrained_cfg | {"mean": mean, "std": std}
    return model.pretrained_cfg


def _read(path, option):
    check_file(path, option)
    if path.suffix == ".safetensors":
        return _read_safetensors(path, option)
    if is_torchscript(path):
        return read_torchscript(path, option)
    return load_torch(path, option, ALSO)


def _read_safetensors(path, option):
    with _safetensors(path, option) as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, it is no dict


def write_weights(state_dict: dict, path) -> None:
    """Write a plain state_dict as .safetensors or, by any other suffix, with ``torch.save``.

    Use within ``files.new_file``, which turns the OSError of a full disk into an InputError and leaves no half a file.
    """
    if Path(path).suffix != ".safetensors":
        save_torch(state_dict, path)
        return
    try:
        safetensors.torch.save_file(state_dict, path)
    except safetensors.SafetensorError as error:
        raise OSError(str(error)) from error


def save_torch(value, path):
    """``torch.save``, with an OSError whatever the reason that the file cannot be written. Use within ``new_file``."""
    try:
        with open(path, "wb") as file:
            torch.save(value, file)
    except RuntimeError as error:  # torch hides a full disk behind a message about its archive writer
        raise OSError(f"is the disk full? {str(error).splitlines()[0]}") from error


def first_mismatch(state_dict: dict, model: nn.Module, may_be_missing=lambda key: False) -> str | None:
    """Compare keys and shapes of a state_dict with a model's; describe the first that differs, or None."""
    expected = model.state_dict()
    for key, value in expected.items():
        if key not in state_dict:
            if not may_be_missing(key):
                return f"{key} is missing"
        elif state_dict[key].shape != value.shape:
            return f"{key} is {tuple(state_dict[key].shape)}, the model's is {tuple(value.shape)}"
    extra = next((key for key in state_dict if key not in expected), None)
    return None if extra is None else f"{extra} is not a key of the model"


@dataclass(frozen=True)
class Stored:
    """A tensor in a file.

    Attributes:
        shape: of the tensor.
        read: gives it, on the CPU; an InputError if its part of the file is damaged.
    """

    shape: tuple
    read: Callable[[], torch.Tensor]


class Weights(Mapping):
    """A state_dict whose tensors are read from a file each time they are asked for, and not kept.

    Args:
        stored: {key: ``Stored``}.
    """

    def __init__(self, stored: dict):
        self.stored = stored

    def __getitem__(self, key):
        return self.stored[key].read()

    def __iter__(self):
        return iter(self.stored)

    def __len__(self):
        return len(self.stored)


def open_teacher(path, model: nn.Module, family: Family, option: str) -> tuple:
    """As ``read_teacher``, but of a file with timm's own names, tensors are read when they are asked for.

    Other layouts (those of publishers, .npz, TorchScript, ``torch.save`` before PyTorch 1.6) are read whole.
    """
    stored = _stored_under_timms_names(Path(path), model, option)
    if stored is None:
        return read_teacher(path, model, family, option)
    expected = model.state_dict()
    known = {key: value for key, value in stored.items() if key in expected}
    return Weights(known), [key for key in stored if key not in known]


def _stored_under_timms_names(path, model, option):
    """{key: Stored} of a file whose tensors are a model's but for its classifier; None for another layout."""
    check_file(path, option)
    stored = None
    if path.suffix == ".safetensors":
        stored = _stored_in_safetensors(path, option)
    elif path.suffix != ".npz" and is_archive(path) and not is_torchscript(path):
        stored = _stored_in_archive(path, option)
    if stored is None:
        return None
    pattern = classifier_pattern(model)
    backbone = {key: value for key, value in stored.items() if not re.search(pattern, key)}
    return stored if first_mismatch(backbone, model, lambda key: re.search(pattern, key)) is None else None


def _stored_in_safetensors(path, option):
    def read(key):  # opened anew for each: what one mapping of the file has read stays in memory as long as it does
        with _safetensors(path, option) as file:
            return file.get_tensor(key).clone()

    with _safetensors(path, option) as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118, it is no dict
    return clean_state_dict({key: Stored(shape, partial(read, key)) for key, shape in shapes.items()})


@contextlib.contextmanager
def _safetensors(path, option):
    try:
        with safetensors.safe_open(path, "pt") as file:
            yield file
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{option} {path}: not a readable safetensors file ({error})") from error


def _stored_in_archive(path, option):
    mapped = map_torch(path, option, ALSO)
    if mapped is None:
        return None
    content, sums = mapped
    return {
        key: Stored(tuple(value.shape), partial(read_mapped, value, sums, path, option))
        for key, value in _state_dict(content, NESTED, option, path).items()
    }


def read_teacher(path, model: nn.Module, family: Family | None, option: str) -> tuple:
    """Read a teacher's weights in any layout timm accepts for this architecture (foreign names, .npz of JAX).

    Args:
        path: .pth, .pt, .bin, .safetensors or .npz file.
        model: the architecture; only a .npz file needs it off the meta device, and is loaded into it.
        family: the family the model belongs to; a file for a model of none must have timm's own names.
        option: the option that named the file, for errors.

    Returns:
        ({timm key: tensor}, the file's names of what the model has no place for). Classifier keys of the model are as
        the file has them: of any number of classes, or absent.

    Raises:
        InputError: unreadable, or other keys or shapes than the architecture's; names the first.
    """
    if Path(path).suffix == ".npz":
        state_dict, unused = _read_npz(path, model, family, option)
    else:
        state_dict, unused = _converted(read_weights(path, option), model, family, f"{option} {path}")
    pattern = classifier_pattern(model)
    classifier = [key for key in state_dict if re.search(pattern, key)]
    backbone = {key: value for key, value in state_dict.items() if key not in classifier}
    problem = first_mismatch(backbone, model, lambda key: re.search(pattern, key))
    if problem:
        raise InputError(f"{option} {path}: not the weights of this teacher: {problem}; name another or set its kwargs")
    expected = model.state_dict()
    unused += [key for key in classifier if key not in expected]
    return {key: value for key, value in state_dict.items() if key in expected}, unused


def _converted(state_dict, model, family, origin):
    """timm's names for a file's tensors, and the file's names of what the declaration says may be left out."""
    if family is None or family.filter_fn is None:
        return state_dict, []
    state_dict, unused = _tower(state_dict, family)
    extras = [key for key in state_dict if family.extras and re.search(family.extras, key)]
    try:
        converted = resolve_name(family.filter_fn)(dict(state_dict), model, **family.filter_options)
    except Exception as error:  # they assume one of the layouts they know, and fail in their own ways on any other
        raise InputError(f"{origin}: timm cannot convert it for a {family.name} model ({error!r})") from error
    converted = {key: value for key, value in converted.items() if key not in extras}
    lost = len(state_dict) - len(extras) - len(converted)
    if lost > 0:  # timm drops what it does not know without a word
        raise InputError(
            f"{origin}: timm's conversion loses {lost} of its tensors; give a file of the image model alone"
        )
    return converted, unused + extras


def _tower(state_dict, family):
    """The image model, under the prefix timm knows it by, and the names of all else in a file of a larger whole."""
    for prefix, timms in family.towers.items():
        inside = {key: value for key, value in state_dict.items() if key.startswith(prefix)}
        if inside:
            outside = [key for key in state_dict if key not in inside]
            return {timms + key.removeprefix(prefix): value for key, value in inside.items()}, outside
    return state_dict, []


def _read_npz(path, model, family, option):
    check_file(path, option)
    if family is None or not hasattr(model, "load_pretrained"):
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
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"{option} {path}: timm cannot read it for this model ({reason})") from error
    state_dict = model.state_dict()
    deep = len({match[1] for match in map(re.compile(r"/encoderblock_(\d+)/").search, names) if match})
    shallow = len(getattr(model, "blocks", ()))
    if deep > shallow:  # timm fills the model's layers and does not look for more
        raise InputError(f"{option} {path}: not the weights of this teacher: it has {deep} layers, the model {shallow}")
    if classes != model.num_classes:  # then timm has left the classifier as it was: random
        state_dict = {key: value for key, value in state_dict.items() if not re.search(family.classifier, key)}
    return state_dict, [name for name in names if family.extras and re.search(family.extras, name)]


def load_into_teacher(model: nn.Module, path, option: str) -> None:
    """Load a file of ``read_teacher`` into a whole teacher, classifier included unless the model has none.

    Raises:
        InputError: as ``read_teacher``, or the classifier is absent or of another size.
    """
    weights, _ = read_teacher(path, model, family_by_class(model), option)
    problem = first_mismatch(weights, model)
    if problem:
        raise InputError(f"{option} {path}: does not fit a teacher of {model.num_classes} classes: {problem}")
    model.load_state_dict(weights)


def create_pretrained(name: str, kwargs: dict, option: str, remedy: str) -> nn.Module:
    """A model with its published weights, from the hub or its local cache.

    Args:
        name: timm name.
        kwargs: of ``create_model``.
        option: the command-line option that named it, for errors.
        remedy: what to do when it cannot be had, for errors.

    Raises:
        InputError: there are none, or they cannot be fetched.
    """
    if not create_model(name, option=option, **{**kwargs, "device": "meta"}).pretrained_cfg.get("tag"):
        raise InputError(f"{option} {name}: timm has no weights for it; {remedy}")
    try:
        return create_model(name, option=option, pretrained=True, **kwargs)
    except OSError as error:  # what requests, urllib and huggingface_hub raise without a network or such a file
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{option} {name}: cannot fetch its weights ({reason}); {remedy}") from error


def open_published(name: str, model: nn.Module, kwargs: dict, option: str, remedy: str) -> Mapping:
    """The published weights of a model, tensor by tensor if the hub's cache has them under timm's names.

    Args, Raises: as ``create_pretrained``, which gives them otherwise; ``model`` may be on the meta device. The hub is
    not asked whether there is a newer file than the one in the cache.
    """
    file = downloaded_file(model.pretrained_cfg)
    stored = file and _stored_under_timms_names(file, model, f"{option} {name}:")
    if stored:
        return Weights(stored)
    return create_pretrained(name, kwargs, option, remedy).state_dict()


def downloaded_file(pretrained_cfg: dict) -> Path | None:
    """The file in the local cache that timm took the pretrained weights from, or None if timm kept no such file."""
    repository = pretrained_cfg.get("hf_hub_id")
    for name in (pretrained_cfg.get("hf_hub_filename"), "model.safetensors", "pytorch_model.bin"):
        if repository and name:
            path = huggingface_hub.try_to_load_from_cache(repository, name)
            if isinstance(path, str):
                return Path(path)
    return None


def provenance_path(path) -> Path:
    """The .json beside an initial state_dict that says where it came from."""
    return Path(path).with_suffix(".json")


def load_initial(model: nn.Module, path, option: str) -> list:
    """Load first weights into a student and assert which keys the file may lack.

    Lacking may be the classifier, and what the .json of ``weight_selection.py`` beside the file says was left out.

    Args:
        model: the student, changed in place.
        path: file of a state_dict.
        option: the option that named the file.

    Returns:
        The keys that keep the model's own initialisation.

    Raises:
        InputError: unreadable, of another family or shape (names the first offending key), changed since its
            .json was written.
    """
    state_dict = read_weights(path, option)
    return _load(model, state_dict, _left_out(path, option), f"{option} {path}")


def load_finetune(model: nn.Module, path, option: str, nested) -> list:
    """Load the weights of a trained model; a classifier of another shape keeps the model's own initialisation.

    Args, Returns, Raises: as ``load_initial``; ``nested`` as in ``read_weights``.
    """
    state_dict = read_weights(path, option, nested)
    classifier = classifier_pattern(model)
    for key, value in model.state_dict().items():
        if re.search(classifier, key) and key in state_dict and state_dict[key].shape != value.shape:
            del state_dict[key]
    return _load(model, state_dict, set(), f"{option} {path}")


def _load(model, state_dict, left_out, origin):
    """Load a state_dict that may lack the classifier and ``left_out``, nothing else; returns the keys it lacks."""
    classifier = classifier_pattern(model)
    problem = first_mismatch(state_dict, model, lambda key: re.search(classifier, key) or key in left_out)
    if problem:
        raise InputError(f"{origin}: does not fit this model: {problem}")
    return list(model.load_state_dict(state_dict, strict=False).missing_keys)


def _left_out(path, option):
    record = provenance_path(path)
    if not record.is_file():
        return set()
    try:
        content = parse_json(read_text(record))
        left_out, digest = set(content["left_out"]), content["sha256"]
    except (Damaged, KeyError, TypeError) as error:
        raise InputError(
            f"{option} {path}: the {record.name} beside it is not weight_selection.py's; move it"
        ) from error
    if digest != sha256(path):
        raise InputError(f"{option} {path}: changed since {record.name} beside it was written; make both anew")
    return left_out


def find_weights(path, model: nn.Module, option: str) -> Path:
    """``path`` itself, or the file that ``weight_selection.py`` wrote into that directory for the model's family.

    Raises:
        InputError: no such file in the directory, or a model without a family.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    model_type = family_of(model, f"{option} {path}").name
    found = [path / f"{model_type}{suffix}" for suffix in SUFFIXES if (path / f"{model_type}{suffix}").is_file()]
    if not found:
        raise InputError(f"{option} {path}: no {model_type}.pth in that directory; name the file")
    return found[0]
