"""Reading files that may come from strangers: none runs code, or takes more memory than its size allows."""

import contextlib
import ctypes
import mmap
import pickletools
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

from weight_selection.errors import InputError, first_line
from weight_selection.files import Damaged, StrPath, check_file

# Containers that copy what they are called with.
COPYING = {"collections OrderedDict", "collections Counter", "builtins set", "__builtin__ set"}
# All that a file of torch.save may ask for. ``torch.load(weights_only=True)`` runs no code, but it would let a file of
# a few bytes ask for a bytearray or a tensor of any size.
GLOBALS = COPYING | {
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    "torch.nn.parameter Parameter",
    "torch Size",
    "torch device",
}
EXPANSION = 20  # times its size that a file may unpack to: weights hardly shrink when they are compressed
MAGIC = b"PK\x03\x04"
DEPTH_LIMIT = 5000  # of values in values; Python and torch recurse into them without a net


def is_archive(path: StrPath) -> bool:
    """Whether a file is a zip archive, as torch sees it: by its first bytes."""
    with open(path, "rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def open_archive(path: StrPath) -> zipfile.ZipFile:
    """Open a zip archive (torch.save, TorchScript, .npz) after a look at its directory.

    Reading a record of it raises ``zipfile.BadZipFile`` if its check sum is wrong.

    Raises:
        Damaged: truncated, or it would unpack to many times its size.
    """
    try:
        archive = zipfile.ZipFile(path)
        unpacked, packed = sum(entry.file_size for entry in archive.infolist()), Path(path).stat().st_size
        names = [name.lower() for name in archive.namelist()]  # torch does not tell upper from lower case
    except Exception as error:  # a zip archive that is none makes zipfile raise nearly anything
        raise Damaged(str(error) or type(error).__name__) from error
    if unpacked > EXPANSION * packed:
        raise Damaged(f"its {packed:,} bytes unpack to {unpacked:,}")
    if len(set(names)) < len(names):
        raise Damaged("two records of it have one name")
    return archive


def check_archive(path: StrPath) -> None:
    """Check the sizes and check sums of all that is in a zip archive.

    Raises:
        Damaged: truncated, changed since it was written, or it would unpack to many times its size.
    """
    with open_archive(path) as archive:
        try:
            bad = archive.testzip()
        except Exception as error:  # as above
            raise Damaged(str(error) or type(error).__name__) from error
    if bad is not None:
        raise Damaged(f"the check sum of {bad} is wrong")


def _check_pickles(path, also: tuple) -> None:
    """Raise Damaged if the pickles in a file of ``torch.save`` ask for more than tensors, plain types and ``also``.

    The file is a zip archive, or of the older format: five pickles and then the numbers. Bytes that are not pickles
    raise nearly anything, as in ``torch.load``.
    """
    allowed = GLOBALS | {f"{cls.__module__} {cls.__name__}" for cls in also}
    if is_archive(path):
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.lower().rpartition("/")[2] == "data.pkl":
                    _check_pickle(archive.read(name), allowed)
    else:
        with open(path, "rb") as file:
            for _ in range(5):
                _check_pickle(file, allowed)


def _check_pickle(pickle, allowed):
    for operation, argument in pickle_operations(pickle):
        if operation == "GLOBAL" and argument not in allowed and not _is_torch_type(argument):
            raise Damaged(f"it asks for {argument.replace(' ', '.')}")


class _Copying(int):
    """The depth of a class of containers, which copies what it is called with."""


class _Again(int):
    """The depth of a value that the pickle has had before, or of a tuple with such a value."""


def pickle_operations(pickle: bytes | BinaryIO) -> Iterator[tuple]:
    """Yield the operations of a pickle, (name, argument), while they nest and remember no more than they may.

    Raises:
        Damaged: they do, or one container is copied, perhaps again and again.
    """
    stack, memo, mark = [], {}, object()  # of how deep each value is, or a little more
    for number, (operation, argument, _) in enumerate(pickletools.genops(pickle)):
        if "PUT" in operation.name:
            if argument > number:
                raise Damaged("it remembers more values than it has")
            memo[argument] = stack[-1]
        elif "GET" in operation.name:
            value = memo[argument]
            stack.append(value if isinstance(value, _Copying) else _Again(value))
        elif operation.name == "MARK":
            stack.append(mark)
        else:
            taken = []
            for kind in reversed(operation.stack_before):
                if kind is pickletools.stackslice:
                    while stack[-1] is not mark:
                        taken.append(stack.pop())
                else:
                    taken.append(stack.pop())
            depth = 1 + max((value for value in taken if value is not mark), default=0)
            if depth > DEPTH_LIMIT:
                raise Damaged("its values are nested too deeply")
            again = bool(taken) and isinstance(taken[0], _Again)  # the last argument
            if again and (operation.name == "BUILD" or operation.name == "REDUCE" and isinstance(taken[1], _Copying)):
                raise Damaged("it copies a value that it has had before")
            if operation.name == "GLOBAL" and argument in COPYING:
                depth = _Copying(depth)
            elif "TUPLE" in operation.name and any(isinstance(value, _Again) for value in taken):
                depth = _Again(depth)
            stack += [depth] * len(operation.stack_after)
        yield operation.name, argument


def _is_torch_type(name):
    module, _, name = name.partition(" ")
    if module != "torch" or "." in name:
        return False
    return name.endswith("Storage") or isinstance(getattr(torch, name, None), torch.dtype)


def load_torch(path: StrPath, option: str, also: tuple = ()) -> Any:
    """``torch.load(weights_only=True)`` with check sums, and errors of one line.

    Args:
        path, option: the file, and the command-line option that named it, for errors.
        also: classes that may be in it, beside tensors and plain types.

    Raises:
        InputError: no such file, or not a file that holds only these, or it is damaged.
    """
    check_file(path, option)
    with _one_line(path, option):
        if is_archive(path):
            check_archive(path)
        content = _load(path, also)
        _check_storages(content, Path(path))
        return content


def map_torch(path: StrPath, option: str, also: tuple = ()) -> tuple | None:
    """As ``load_torch`` of a zip archive, but the tensors stay in the file until ``read_mapped`` reads them.

    Returns:
        (content, the check sums that ``read_mapped`` needs), or None of an archive whose records are compressed.
    """
    check_file(path, option)
    with _one_line(path, option), open_archive(path) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            return None
        sums = {(entry.file_size, entry.CRC) for entry in archive.infolist()}
        content = _load(path, also, mmap=True)
        _check_storages(content, Path(path))
        return content, sums


def read_mapped(tensor: torch.Tensor, sums: set, path: StrPath, option: str) -> torch.Tensor:
    """A copy of a tensor from ``map_torch``; memory holds no more of the file afterwards than before.

    Raises:
        InputError: its record is damaged.
    """
    storage = tensor.untyped_storage()
    with _one_line(path, option):
        view = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr()) if storage.nbytes() else b""
        if (storage.nbytes(), zlib.crc32(view)) not in sums:
            raise Damaged("a check sum is wrong")
        copy = tensor.clone()
        if storage.nbytes():
            # Pages that have been read count as this process's memory until it gives them back.
            begin = storage.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
            length = ctypes.c_size_t(storage.data_ptr() + storage.nbytes() - begin)
            ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), length, mmap.MADV_DONTNEED)
        return copy


def _load(path, also, **options):
    _check_pickles(path, also)
    with torch.serialization.safe_globals(list(also)):
        content = torch.load(path, map_location="cpu", weights_only=True, **options)
    return _only_plain(content, also)


@contextlib.contextmanager
def _one_line(path, option):
    """Turn whatever corrupt input makes torch raise, nearly anything, into an InputError. Nothing else runs."""
    try:
        yield
    except Exception as error:
        raise InputError(
            f"{option} {path}: not a readable PyTorch file of tensors and plain types (empty, truncated, or with "
            f"code in it: {first_line(error):.160})"
        ) from error


def _only_plain(value, also, depth=0):
    """A copy of nested values with the containers that they say they are, and nothing attached to these.

    Raises:
        Damaged: anything else is in it.
    """
    if depth > 50:
        raise Damaged("its values are nested too deeply")
    if isinstance(value, dict):
        if not all(isinstance(key, (str, int, float, bool, type(None))) for key in value):
            raise Damaged("a key in it is neither text nor number")
        return {key: _only_plain(item, also, depth + 1) for key, item in dict.items(value)}
    if isinstance(value, torch.Size):
        return value
    if isinstance(value, (list, tuple, set)):
        kind = next(kind for kind in (list, tuple, set) if isinstance(value, kind))
        return kind([_only_plain(item, also, depth + 1) for item in value])
    if isinstance(value, tuple(also)):
        return _only_plain(vars(value), also, depth + 1)
    if isinstance(value, (torch.Tensor, torch.dtype, torch.device, str, int, float, bytes, type(None))):
        return value
    raise Damaged(f"it holds a {type(value).__name__}")


def _check_storages(content, path):
    """Raise Damaged if the tensors have more numbers than the file, from which they came."""
    sizes, values = {}, [content]
    while values:
        value = values.pop()
        if isinstance(value, dict):
            values += value.values()
        elif isinstance(value, (list, tuple, set)):
            values += value
        elif isinstance(value, torch.Tensor) and value.layout == torch.strided and value.device.type == "cpu":
            sizes[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    size = path.stat().st_size
    if sum(sizes.values()) > (EXPANSION * size if is_archive(path) else size):
        raise Damaged(f"its {size:,} bytes hold no {sum(sizes.values()):,} bytes of tensors")


def is_plain(value: object) -> bool:
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
