"""Files: whole or not at all when written, of known size and kind when read. Imports no torch."""

import contextlib
import errno
import hashlib
import json
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from weight_selection.errors import InputError

StrPath = str | os.PathLike
SUFFIXES = (".pth", ".pt", ".safetensors")  # of files of weights that are written
TEXT_LIMIT = 64 << 20  # bytes: a log of a million epochs


class Damaged(ValueError):
    """A file is not what its kind must be; the message says in what way."""


def sha256(path: StrPath) -> str:
    """SHA-256 of a file as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):  # large: a thread waits for the interpreter after each
            digest.update(chunk)
    return digest.hexdigest()


def begin_sha256(*paths: StrPath) -> Future:
    """A future of ``sha256(path)``, of several paths of {name: digest}."""

    def compute():
        try:
            digests = {Path(path).name: sha256(path) for path in paths}
        except OSError as error:
            raise InputError(f"cannot read {error.filename}: {error.strerror or error}") from error
        return digests if len(paths) > 1 else digests.popitem()[1]

    return in_background(compute)


def in_background(function: Callable) -> Future:
    """A future of what ``function()`` returns or raises. Nothing waits for its thread when the program ends."""
    future = Future()

    def run():
        try:
            future.set_result(function())
        except Exception as error:  # the future raises it
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def check_file(path: StrPath, option: str) -> None:
    """Raise an InputError that names ``option`` unless ``path`` is a file."""
    if not Path(path).is_file():
        raise InputError(f"{option} {path}: no such file")


def check_directory(path: StrPath, option: str, remedy: str) -> None:
    """Raise an InputError that names ``option`` and says the remedy unless ``path`` is a directory."""
    if not Path(path).is_dir():
        raise InputError(f"{option} {path}: no such directory; {remedy}")


# Of files: a new directory has no such name unless somebody meant a file.
FILE_SUFFIXES = (*SUFFIXES, ".bin", ".ckpt", ".npz", ".json", ".txt")


def check_no_file(directory: StrPath, option: str) -> None:
    """Raise an InputError that names ``option`` if ``directory``, existing or new, can only be meant as a file."""
    path = Path(directory)
    if not str(directory):
        raise InputError(f"{option}: is empty; give a directory, or leave the option out")
    if path.exists() and not path.is_dir():
        kind = "a file" if path.is_file() else "a device"
        raise InputError(f"{option} {path}: cannot write there, as it is {kind}; name another directory")
    if not path.exists() and path.suffix in FILE_SUFFIXES:
        raise InputError(f"{option} {path}: has the name of a {path.suffix} file; name a directory")


def provenance_path(path: StrPath) -> Path:
    """The .json beside a file of first weights that says where they came from."""
    return Path(path).with_suffix(".json")


PARTIAL = ".partial-"  # begins the name of a file that is being written


@contextlib.contextmanager
def new_file(path: StrPath) -> Iterator[Path]:
    """Give a temporary path beside ``path`` to write to; it takes the place of ``path`` only if the block succeeds.

    At every moment, even when the power fails, ``path`` is the whole old file or the whole new one.

    Raises:
        InputError: the operating system refused (permissions, full disk, a directory of that name), or it is a device.
    """
    path = Path(path)
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise InputError(f"cannot write {path}: it is no file but a device or a pipe; name another")
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=PARTIAL, suffix=f"-{path.name}")
        os.close(handle)
        yield Path(temporary)
        _give_usual_mode(temporary)
        _to_disk(temporary)
        os.replace(temporary, path)
        try:
            _to_disk(path.parent)
        except OSError as error:  # some network file systems know no such thing
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)


@contextlib.contextmanager
def new_directory(path: StrPath, option: str, replace: bool = False) -> Iterator[Path]:
    """Give a temporary directory beside ``path`` to fill; it becomes ``path`` only if the block succeeds.

    Args:
        replace: if ``path`` is a directory already, let the new files take the places of those of the same names.

    Raises:
        InputError: ``path`` cannot be written (permissions, full disk); the message names ``option``.
    """
    path = Path(path).resolve()
    check_writable(path.parent, option)
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as temporary:
            whole = Path(temporary) / path.name
            whole.mkdir()
            yield whole
            if replace:
                for file in whole.iterdir():
                    _give_usual_mode(file)
                    _to_disk(file)
            if replace and path.is_dir():
                for file in whole.iterdir():
                    os.replace(file, path / file.name)
            else:
                whole.rename(path)
    except OSError as error:
        raise InputError(f"{option} {path}: cannot be written ({error.strerror or error})") from error


def _give_usual_mode(path):
    """Let others read a file as the umask says; mkstemp and safetensors hide what they write even from the group."""
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(path, 0o666 & ~umask)


def _to_disk(path):
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: StrPath, value: object) -> None:
    """Write ``value`` as indented JSON, all of it or nothing."""
    with new_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")


def check_writable(directory: StrPath, option: str) -> None:
    """Create ``directory`` if need be and make sure files can be made in it.

    Raises:
        InputError: they cannot, or it can only be meant as a file; the message names ``option``.
    """
    check_no_file(directory, option)
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise InputError(
            f"{option} {directory}: cannot write there ({error.strerror}); name another directory"
        ) from error


@contextlib.contextmanager
def without_empty_directories(*paths: StrPath | None) -> Iterator[None]:
    """If the block fails, remove the directories that it made on the way to these paths and left empty."""
    new = [place for path in paths if path for place in (Path(path), *Path(path).parents) if not place.exists()]
    try:
        yield
    except BaseException:
        for place in new:
            with contextlib.suppress(OSError):  # it was not made, or something is in it
                place.rmdir()
        raise


def read_text(path: StrPath, limit: int = TEXT_LIMIT) -> str:
    """Text of a file of at most ``limit`` bytes.

    Raises:
        Damaged: not a file, too large, or not text.
    """
    path = Path(path)
    if not path.is_file():
        raise Damaged("not a file")
    if path.stat().st_size > limit:
        raise Damaged(f"larger than {limit:,} bytes")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Damaged(str(error)) from error


def parse_json(text: str) -> Any:
    """What a text in JSON says.

    Raises:
        Damaged: it is none.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"not JSON: {error}") from error
