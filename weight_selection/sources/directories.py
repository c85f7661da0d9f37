"""Directories as libraries save models in them: config.json, and weights in one file or in shards. Imports no torch.

A directory on disk (``Directory``) and a repository of the hub (``hub.Repository``) answer the same question: where is
the file of this name? All else is common to both.
"""

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from weight_selection.errors import InputError
from weight_selection.files import Damaged, StrPath, parse_json, read_text
from weight_selection.sources.hub import Repository

CONFIG, ADAPTER = "config.json", "adapter_config.json"
RUN = "checkpoint-best.pth"  # in the output directory of main.py
# Where weights may be, in this order. An index of shards is a JSON file.
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    RUN,
)


@dataclass(frozen=True)
class Directory:
    """A directory on disk.

    Attributes:
        path: of the directory.
        where: the option and the value that named it, for errors.
    """

    path: Path
    where: str

    def file(self, name: str, what: str = "weights") -> Path | None:
        """The file of this name, or None; ``what`` it is wanted for."""
        path = Path(self.path) / name
        return path if path.is_file() else None

    known = file  # of a repository: without a look at the network


def weight_files(place: Directory | Repository) -> list:
    """The files that hold the weights in a directory or repository: one, or several shards.

    Args:
        place: a ``Directory`` or a ``hub.Repository``.

    Raises:
        InputError: there are none, or only an adapter's; an index is damaged, or names a shard that is not there.
    """
    found = next((name for name in WEIGHTS if place.known(name)), None)
    found = found or next((name for name in WEIGHTS if place.file(name)), None)
    if found is None:
        refuse_adapter(place)
        raise InputError(f"{place.where}: no weights in it; there is no such file as {', '.join(WEIGHTS)}")
    path = place.file(found)
    return _shards(place, path) if found.endswith(".json") else [path]


def files_of(path: StrPath, option: str) -> list:
    """The files that hold the weights at a path: the file itself, or those in a directory, as of ``weight_files``.

    Raises:
        InputError: there is neither; the message names the option.
    """
    path = Path(path)
    if path.is_dir():
        return weight_files(Directory(path, f"{option} {path}"))
    if not path.is_file():
        raise InputError(f"{option} {path}: no such file or directory; name one with weights")
    return [path]


def read_config(place: Directory | Repository) -> dict:
    """What the config.json of a directory or repository says.

    Raises:
        InputError: there is none, or it is no JSON of names with values.
    """
    path = place.file(CONFIG, "configuration")
    if path is None:
        refuse_adapter(place)
        raise InputError(f"{place.where}: no {CONFIG} in it, which says what model it is; save the model again")
    try:
        content = parse_json(read_text(path))
    except Damaged as error:
        raise InputError(f"{place.where}: {CONFIG} cannot be read ({error}); save the model again") from error
    if not isinstance(content, dict):
        raise InputError(f"{place.where}: {CONFIG} holds no names with values; save the model again")
    return content


def refuse_adapter(place: Directory | Repository) -> None:
    """Raise InputError if a directory or repository holds an adapter (LoRA), which is no model by itself."""
    if place.file(ADAPTER, "configuration"):
        raise InputError(
            f"{place.where}: holds an adapter ({ADAPTER}), not a model; merge it into its base model (PEFT's "
            "merge_and_unload), save that with save_pretrained and name it"
        )


def _shards(place, index: Path) -> list:
    """The shards that an index names. It may be a stranger's: a name must not lead out of the directory."""
    where = f"{place.where}: {index.name}"
    try:
        content = parse_json(read_text(index))
    except Damaged as error:
        raise InputError(f"{where} cannot be read ({error}); copy it again") from error
    shards = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise InputError(f"{where} has no weight_map of tensors and files; copy it again")
    files = []
    for name in dict.fromkeys(shards.values()):
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\\" in name or "\0" in name:
            raise InputError(f"{where} names a file outside of the directory, {name!r:.80}; do not use it")
        path = place.file(name)
        if path is None:
            raise InputError(f"{where} names {name}, which is missing; copy it into the directory")
        files.append(path)
    return files
