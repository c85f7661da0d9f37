"""Tensors in files: found without reading the file, read one at a time when they are asked for.

Files of ``torch.save`` and TorchScript archives are zip files with a pickle of nested values beside the tensors' raw
bytes. Both are taken apart here without ``torch.load``, which would read them whole (and TorchScript not at all without
compiling the program in it), and without running anything that a stranger put into them.
"""

import argparse
import contextlib
import io
import pickle
import struct
import zipfile
import zlib
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import safetensors
import torch

from files import Damaged, check_file
from program import InputError
from untrusted import is_archive, is_plain, open_archive, pickle_operations

DTYPES = {
    f"{name}Storage": dtype
    for name, dtype in {
        "Half": torch.float16,
        "BFloat16": torch.bfloat16,
        "Float": torch.float32,
        "Double": torch.float64,
        "Bool": torch.bool,
        "Byte": torch.uint8,
        "Char": torch.int8,
        "Short": torch.int16,
        "Int": torch.int32,
        "Long": torch.int64,
    }.items()
}


@dataclass(frozen=True)
class Stored:
    """A tensor that has not been read.

    Attributes:
        shape: of the tensor.
        read: gives it, on the CPU; an InputError if its part of the file is damaged.
    """

    shape: tuple
    read: Callable[[], torch.Tensor]


def is_torchscript(path) -> bool:
    """Whether a file is a TorchScript archive: a zip file that holds a program's constants."""
    if not is_archive(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except Exception:  # a zip archive that is none makes zipfile raise nearly anything
        return False


def read_torchscript(path, option: str) -> dict:
    """The parameters and buffers of the module in a TorchScript archive.

    Args:
        path: the file.
        option: the command-line option that named it, for errors.

    Returns:
        {key: tensor}

    Raises:
        InputError: damaged, or more than modules, tensors and plain values in it.
    """
    what = f"{option} {path}: not a readable TorchScript archive"
    with _reasons(what):
        return {key: value.read() for key, value in _tensors(_unpickle(path, _find_in_torchscript, what))}


def find_tensors(path, option: str):
    """The nested values in a file of ``torch.save`` or safetensors, with a ``Stored`` for every tensor.

    Args:
        path: a .safetensors file, or a zip archive of ``torch.save``.
        option: the command-line option that named it, for errors.

    Raises:
        InputError: no such file, or damaged, or more than tensors and plain values in it.
    """
    check_file(path, option)
    if not is_archive(path):
        return _find_in_safetensors(path, f"{option} {path}: not a readable safetensors file")
    what = "not a readable PyTorch file of tensors and plain types (empty, truncated, or with code in it)"
    return _unpickle(path, _find_in_torch, f"{option} {path}: {what}")


def _find_in_safetensors(path, what):
    def read(key):  # opened anew for each: what one mapping of the file has read stays in memory as long as it does
        with _reasons(what), safetensors.safe_open(path, "pt") as file:
            return file.get_tensor(key).clone()

    with _reasons(what), safetensors.safe_open(path, "pt") as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118, it is no dict
    return {key: Stored(shape, lambda key=key: read(key)) for key, shape in shapes.items()}


def _unpickle(path, find_class, what):
    with _reasons(what):
        archive = open_archive(path)
        return _Unpickler(archive, find_class, what).load()


@contextlib.contextmanager
def _reasons(what):
    """Turn whatever reading a corrupt file raises, which is nearly anything, into one InputError. Nothing else runs."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:160]
        raise InputError(f"{what} ({reason})") from error


class _Module:
    """Stands for a module of any class: only holds its attributes."""


def _tensors(module, prefix=""):
    for name, value in vars(module).items():
        if isinstance(value, Stored):
            yield prefix + name, value
        elif isinstance(value, _Module):
            yield from _tensors(value, f"{prefix}{name}.")


@dataclass(frozen=True)
class _Storage:
    """Numbers in a record of an archive, from which tensors are cut."""

    archive: zipfile.ZipFile
    record: str
    dtype: torch.dtype
    what: str

    def tensor(self, offset, size, stride, *_):
        if not all(type(number) is int and number >= 0 for number in (offset, *size, *stride)):
            raise pickle.UnpicklingError("a tensor in it has no shape")
        return Stored(tuple(size), lambda: self.read(offset, size, stride))

    def read(self, offset, size, stride):
        with _reasons(self.what):
            content = _read_record(self.archive, self.record)
            numbers = content.view(self.dtype) if len(content) else torch.empty(0, dtype=self.dtype)
            tensor = numbers.as_strided(size, stride, offset)
            if not is_plain(tensor):
                raise Damaged("a tensor in it is larger than what it is stored in")
            return tensor


def _read_record(archive, name):
    """The bytes of a record, as a tensor; they are read straight into it where they are stored as they are."""
    entry = archive.getinfo(name)
    if entry.compress_type != zipfile.ZIP_STORED:
        return torch.frombuffer(bytearray(archive.read(name) or b"\0"), dtype=torch.uint8)[: entry.file_size]
    content = torch.empty(entry.file_size, dtype=torch.uint8)
    with open(archive.filename, "rb", buffering=0) as file:
        file.seek(entry.header_offset + 26)  # what is before the bytes: 30, and a name and an extra field of any length
        file.seek(entry.header_offset + 30 + sum(struct.unpack("<HH", file.read(4))))
        view = memoryview(content.numpy())
        done = 0
        while done < len(view) and (count := file.readinto(view[done:])):
            done += count
    if done < len(view) or zlib.crc32(view) != entry.CRC:
        raise Damaged(f"the check sum of {name} is wrong")
    return content


class _Unpickler(pickle.Unpickler):
    """Builds plain values, and a ``Stored`` for each tensor; refuses all else that a pickle may ask for."""

    def __init__(self, archive, find_class, what):
        self.archive, self.find, self.what = archive, find_class, what
        self.root = next(name for name in archive.namelist() if name.endswith("/data.pkl")).removesuffix(".pkl")
        content = archive.read(f"{self.root}.pkl")
        for _ in pickle_operations(content):
            pass
        super().__init__(io.BytesIO(content))

    def find_class(self, module, name):
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, *layout: storage.tensor(*layout)
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        return self.find(module, name)

    def persistent_load(self, pid):
        _, dtype, key, *_ = pid
        return _Storage(self.archive, f"{self.root}/{key}", dtype, self.what)


def _find_in_torchscript(module, name):
    if module.startswith("__torch__"):
        return _Module
    if module == "torch.jit._pickle":  # lists and dicts that remember their type
        return lambda value, *_: value
    raise pickle.UnpicklingError(f"it asks for {module}.{name}")


PLAIN = {
    ("builtins", "set"): set,
    ("__builtin__", "set"): set,
    ("collections", "Counter"): Counter,
    ("torch", "Size"): torch.Size,
    ("torch", "device"): torch.device,
    ("argparse", "Namespace"): argparse.Namespace,  # in which most training scripts keep their options
}


def _find_in_torch(module, name):
    if (module, name) in PLAIN:
        return PLAIN[module, name]
    if (module, name) in {("torch._utils", "_rebuild_parameter"), ("torch.nn.parameter", "Parameter")}:
        return lambda tensor, *_: tensor
    if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
        return getattr(torch, name)
    raise pickle.UnpicklingError(f"it asks for {module}.{name}")
