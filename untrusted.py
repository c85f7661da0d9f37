"""Reading files that may come from strangers: none runs code, or takes more memory than its size allows."""

import json
import pickletools
import zipfile
from pathlib import Path

import torch

from utils import InputError, check_file

# All that a file of torch.save may ask for. ``torch.load(weights_only=True)`` runs no code, but it would let a file of
# a few bytes ask for a bytearray or a tensor of any size.
GLOBALS = {
    "collections OrderedDict",
    "collections Counter",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    "torch.nn.parameter Parameter",
    "torch Size",
    "torch device",
    "__builtin__ set",
    "builtins set",
    "_codecs encode",
}
EXPANSION = 20  # times its size that a file may unpack to: weights hardly shrink when they are compressed
MAGIC = b"PK\x03\x04"
TEXT_LIMIT = 64 << 20  # bytes: a log of a million epochs


class Damaged(ValueError):
    """A file is not what its kind must be; the message says in what way."""


def is_archive(path) -> bool:
    """Whether a file is a zip archive, as torch sees it: by its first bytes."""
    with open(path, "rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def check_archive(path) -> None:
    """Check the sizes and check sums of all that is in a zip archive (torch.save, TorchScript, .npz).

    Raises:
        Damaged: truncated, changed since it was written, or it would unpack to many times its size.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked, packed = sum(entry.file_size for entry in archive.infolist()), Path(path).stat().st_size
            if unpacked > EXPANSION * packed:
                raise Damaged(f"its {packed:,} bytes unpack to {unpacked:,}")
            bad = archive.testzip()
    except Damaged:
        raise
    except Exception as error:  # a zip archive that is none makes zipfile raise nearly anything
        raise Damaged(str(error) or type(error).__name__) from error
    if bad is not None:
        raise Damaged(f"the check sum of {bad} is wrong")


def check_pickles(path, also: tuple) -> None:
    """Check that the pickles in a file of ``torch.save`` ask for nothing but tensors and plain types.

    Args:
        path: the file, a zip archive or of the format before that, which is five pickles and then the numbers.
        also: classes that they may ask for too.

    Raises:
        Damaged: they do, or are no pickles.
    """
    allowed = GLOBALS | {f"{cls.__module__} {cls.__name__}" for cls in also}
    try:
        if is_archive(path):
            with zipfile.ZipFile(path) as archive:
                for name in archive.namelist():
                    if name.rpartition("/")[2] == "data.pkl":
                        _check_pickle(archive.read(name), allowed)
        else:
            with open(path, "rb") as file:
                for _ in range(5):
                    _check_pickle(file, allowed)
    except Damaged:
        raise
    except Exception as error:  # what is no pickle makes pickletools raise nearly anything
        raise Damaged(str(error) or type(error).__name__) from error


def _check_pickle(pickle, allowed):
    for operation, argument, _ in pickletools.genops(pickle):
        if operation.name == "GLOBAL" and argument not in allowed and not _is_torch_type(argument):
            raise Damaged(f"it asks for {argument.replace(' ', '.')}")


def _is_torch_type(name):
    module, _, name = name.partition(" ")
    return module == "torch" and (name.endswith("Storage") or isinstance(getattr(torch, name, None), torch.dtype))


def load_torch(path, option, also=()):
    """``torch.load(weights_only=True)`` with check sums, and errors of one line.

    Args:
        path: the file.
        option: the command-line option that named it, for errors.
        also: classes that may be in it, beside tensors and plain types.

    Raises:
        InputError: no such file, or not a file that holds only these, or it is damaged.
    """
    check_file(path, option)
    try:
        if is_archive(path):
            check_archive(path)
        check_pickles(path, also)
        with torch.serialization.safe_globals(list(also)):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # corrupt input makes torch raise nearly anything; nothing else runs in this block
        reason = (str(error) or type(error).__name__).splitlines()[0][:160]
        raise InputError(
            f"{option} {path}: not a readable PyTorch file of tensors and plain types (empty, truncated, or with "
            f"code in it: {reason})"
        ) from error


def is_plain(value) -> bool:
    """Whether a value is a tensor of numbers as large as it says.

    A forged one may be on no device, or repeat one number in memory a billion times.
    """
    return (
        isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not (value.is_quantized or value.is_complex())
        and value.numel() * value.element_size() <= value.untyped_storage().nbytes()
    )


def read_text(path) -> str:
    """Text of a file of moderate size.

    Raises:
        Damaged: not a file, too large, or not text.
    """
    path = Path(path)
    if not path.is_file():
        raise Damaged("not a file")
    if path.stat().st_size > TEXT_LIMIT:
        raise Damaged(f"larger than {TEXT_LIMIT:,} bytes")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Damaged(str(error)) from error


def parse_json(text: str):
    """What a text in JSON says.

    Raises:
        Damaged: it is none.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"not JSON: {error}") from error
