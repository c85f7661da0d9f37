"""The tensors of a TorchScript archive, such as OpenAI's CLIP, without compiling or running the program in it.

``torch.jit.load`` would do both, and ``torch.load(weights_only=True)`` refuses such files. Yet an archive is a zip file
with a pickle of nested modules, whose attributes are tensors and plain values, beside the tensors' raw bytes.
"""

import io
import pickle
import zipfile
from collections import OrderedDict

import torch

from weight_selection.errors import InputError, first_line
from weight_selection.files import StrPath
from weight_selection.sources.safe_load import check_archive, is_archive, pickle_operations

DTYPES = {
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "ShortStorage": torch.int16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
}


def is_torchscript(path: StrPath) -> bool:
    """Whether a file is a TorchScript archive: a zip file that holds a program's constants."""
    if not is_archive(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except Exception:  # a zip archive that is none makes zipfile raise nearly anything
        return False


def read_torchscript(path: StrPath, option: str) -> dict:
    """The parameters and buffers of the module in a TorchScript archive, {key: tensor}.

    ``option`` is the command-line option that named the file, for errors.

    Raises:
        InputError: damaged, or more than modules, tensors and plain values in it.
    """
    try:
        check_archive(path)
        with zipfile.ZipFile(path) as archive:
            return dict(_tensors(_Unpickler(archive).load()))
    except Exception as error:  # corrupt input makes pickle raise nearly anything; nothing else runs in this block
        raise InputError(f"{option} {path}: not a readable TorchScript archive ({first_line(error)})") from error


class _Module:
    """Stands for a module of any class: only holds its attributes."""


def _tensors(module, prefix=""):
    for name, value in vars(module).items():
        if isinstance(value, torch.Tensor):
            yield prefix + name, value
        elif isinstance(value, _Module):
            yield from _tensors(value, f"{prefix}{name}.")


class _Unpickler(pickle.Unpickler):
    """Builds modules, tensors and plain values; refuses all else that a pickle may ask for."""

    def __init__(self, archive):
        self.archive = archive
        self.root = next(name for name in archive.namelist() if name.endswith("/data.pkl")).removesuffix(".pkl")
        self.storages = {}
        content = archive.read(f"{self.root}.pkl")
        for _ in pickle_operations(content):
            pass
        super().__init__(io.BytesIO(content))

    def find_class(self, module, name):
        if module.startswith("__torch__"):
            return _Module
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, stride, *_: storage.as_strided(size, stride, offset)
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch.jit._pickle":  # lists and dicts that remember their type
            return lambda value, *_: value
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")

    def persistent_load(self, pid):
        _, dtype, key, _, count = pid
        if key not in self.storages:
            content = bytearray(self.archive.read(f"{self.root}/{key}"))
            self.storages[key] = torch.frombuffer(content, dtype=dtype) if count else torch.empty(0, dtype=dtype)
        return self.storages[key]
