"""State_dicts in files and directories: read safely, as they may be a stranger's, lazily where possible; written."""

import argparse
import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import safetensors
import safetensors.torch
import torch
import torch.nn as nn

from weight_selection.errors import InputError, first_line
from weight_selection.files import StrPath
from weight_selection.sources.directories import files_of
from weight_selection.sources.safe_load import is_archive, is_plain, load_torch, map_torch, read_mapped
from weight_selection.sources.torchscript import is_torchscript, read_torchscript

# Entries under which training scripts nest a state_dict, in the order in which timm's own loader looks for them; then
# DINO's: of its two networks the teacher, the moving average of the other, is what its authors publish and evaluate.
NESTED = ("state_dict_ema", "model_ema", "state_dict", "model", "teacher")
WRAPPERS = ("_orig_mod.", "module.", "_orig_mod.")  # prefixes of keys; DDP may be inside torch.compile or around it
ALSO = (argparse.Namespace,)  # most training scripts keep their options in one, beside the weights


def read_weights(path: StrPath, option: str, nested: tuple = NESTED) -> dict:
    """Read a state_dict from a .safetensors file, a TorchScript archive, any file of ``torch.save``, or a directory.

    No code from a file is run.

    Args:
        path, option: the file or directory, and the option that named it, for errors.
        nested: keys under which the state_dict may be nested; the first that is there and not None is taken.

    Returns:
        {key: tensor}, with the prefixes of DDP and torch.compile removed.

    Raises:
        InputError: the file is missing, empty or truncated, has code in it, or holds no state_dict.
    """
    return read_files(files_of(path, option), option, nested)


def read_files(files: list, option: str, nested: tuple = NESTED) -> dict:
    """As ``read_weights``, of the shards of one state_dict."""
    state_dict = {}
    for file in files:
        state_dict |= _state_dict(_read(file, option), nested, option, file)
    return state_dict


def training_options(path: StrPath, option: str) -> dict:
    """The options of the run that a checkpoint of main.py belongs to; of any other file or directory an empty dict.

    The tensors of the checkpoint are not read.
    """
    files = files_of(path, option)
    other = len(files) > 1 or files[0].suffix == ".safetensors"
    mapped = None if other else _map(files[0], option)
    content = mapped and mapped[0]
    options = content.get("args") if isinstance(content, dict) else None
    return options if isinstance(options, dict) else {}


def write_weights(state_dict: dict, path: StrPath, **metadata: str) -> None:
    """Write a plain state_dict: as safetensors if the suffix says so, else with ``torch.save``.

    A safetensors file says in its metadata that it is PyTorch's, and what ``metadata`` says. The other kind has none.

    Use it within ``files.new_file``, which turns the OSError of a full disk into an InputError and leaves no half a
    file.
    """
    if Path(path).suffix != ".safetensors":
        save_torch(state_dict, path)
        return
    try:
        safetensors.torch.save_file(state_dict, path, {"format": "pt"} | metadata)
    except safetensors.SafetensorError as error:
        raise OSError(str(error)) from error


def save_torch(value: object, path: StrPath) -> None:
    """``torch.save`` that raises an OSError whatever keeps it from writing. Use it within ``files.new_file``."""
    try:
        with open(path, "wb") as file:
            torch.save(value, file)
    except RuntimeError as error:  # torch hides a full disk behind a message about its archive writer
        raise OSError(f"is the disk full? {first_line(error)}") from error


def first_mismatch(state_dict: Mapping, model: nn.Module, may_be_missing: Callable = lambda key: False) -> str | None:
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


def _read(path, option):
    if path.suffix == ".safetensors":
        with _safetensors(path, option) as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, it is no dict
    if is_torchscript(path):
        return read_torchscript(path, option)
    return load_torch(path, option, ALSO)


def _state_dict(content, nested, option, path):
    """The state_dict inside the content of a file."""
    if isinstance(content, dict):
        content = next((content[key] for key in nested if content.get(key) is not None), content)
    named = isinstance(content, dict) and all(isinstance(key, str) and is_plain(content[key]) for key in content)
    if not named or not content:
        raise InputError(
            f"{option} {path}: holds no state_dict (names with a tensor each), at the top or under {nested}"
        )
    return _without_wrappers(content)


def _without_wrappers(content):
    """The same content under names without the prefixes of DDP and torch.compile."""
    for prefix in WRAPPERS:
        content = {key.removeprefix(prefix): value for key, value in content.items()}
    return content


def without_common_prefix(state_dict: Mapping) -> Mapping:
    """The same without the first word of the keys, if all have the same: Lightning puts ``model.`` in front of all."""
    words = {key.partition(".")[0] for key in state_dict}
    if len(words) != 1:
        return state_dict
    return _without_wrappers({key.removeprefix(f"{min(words)}."): value for key, value in state_dict.items()})


def under_own_names(state_dict: Mapping, model: nn.Module) -> Mapping:
    """A state_dict in memory as the same in a file is read: taken out of what it is nested in, without prefixes.

    One that has a key of the model's is returned as it is.
    """
    expected = model.state_dict().keys()
    if expected & state_dict.keys():
        return state_dict
    nested = (state_dict[key] for key in NESTED if isinstance(state_dict.get(key), Mapping))
    bare = _without_wrappers(next(nested, state_dict))
    return bare if expected & bare.keys() else without_common_prefix(bare)


# ---------------------------------------------------------------------------------------------------------
# Lazily: a tensor is read each time it is asked for, and not kept


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        shape: of the tensor.
        read: gives it on the CPU, or raises an InputError if its part of the file is damaged.
        dtype: the file's name for the kind of its numbers, such as F32 or float32.
    """

    shape: tuple
    read: Callable[[], torch.Tensor]
    dtype: str


class Weights(Mapping):
    """A state_dict of ``StoredTensor``, {key: tensor}, which are read each time they are asked for."""

    def __init__(self, stored: dict):
        self.stored = stored

    def __getitem__(self, key):
        return self.stored[key].read()

    def __iter__(self):
        return iter(self.stored)

    def __len__(self):
        return len(self.stored)


def open_files(files: list, option: str) -> dict | None:
    """{key: ``StoredTensor``} of the shards of a state_dict; None if one has to be read whole to find its tensors.

    Raises:
        InputError: as ``read_weights``.
    """
    stored = {}
    for file in files:
        shard = _open_safetensors(file, option) if file.suffix == ".safetensors" else _open_torch(file, option)
        if shard is None:
            return None
        stored |= shard
    return stored


def stored_in(files: list, option: str) -> dict:
    """As ``open_files``; what cannot be opened is read whole."""
    stored = open_files(files, option)
    if stored is None:
        whole = read_files(files, option)
        stored = {key: StoredTensor(tuple(v.shape), lambda v=v: v, str(v.dtype)) for key, v in whole.items()}
    return stored


def _open_torch(path, option):
    if (mapped := _map(path, option)) is None:
        return None
    content, sums = mapped
    return {
        key: StoredTensor(tuple(value.shape), partial(read_mapped, value, sums, path, option), str(value.dtype))
        for key, value in _state_dict(content, NESTED, option, path).items()
    }


def _map(path, option):
    """As ``map_torch``; None of a file that is in no archive of ``torch.save``."""
    if path.suffix == ".npz" or not is_archive(path) or is_torchscript(path):
        return None
    return map_torch(path, option, ALSO)


def _open_safetensors(path, option):
    def read(key):  # opened anew each time: a mapping keeps everything that was read through it in memory
        with _safetensors(path, option) as file:
            return file.get_tensor(key).clone()

    stored = {}
    with _safetensors(path, option) as file:
        for key in file.keys():  # noqa: SIM118, it is no dict
            values = file.get_slice(key)
            stored[key] = StoredTensor(tuple(values.get_shape()), partial(read, key), values.get_dtype())
    return _without_wrappers(stored)


@contextlib.contextmanager
def _safetensors(path, option):
    try:
        with safetensors.safe_open(path, "pt") as file:
            yield file
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{option} {path}: not a readable safetensors file ({error}); copy it again") from error
