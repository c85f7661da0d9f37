"""First weights on disk: written whole with their provenance, read back and tried before they are left.

WeightFile      a .pth, .pt or .safetensors file, and a .json beside it
HubDirectory    config.json, model.safetensors and model.json, which the student's library opens
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import suppress
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn as nn
from torch.utils._pytree import tree_leaves

from weight_selection.errors import InputError
from weight_selection.files import SUFFIXES, check_writable, new_directory, new_file, provenance_path, sha256
from weight_selection.modules import run_forward, skeleton_of
from weight_selection.options import KEEP
from weight_selection.sources.facts import facts_of, library_of
from weight_selection.sources.names import split_name
from weight_selection.sources.weight_files import Weights, first_mismatch, stored_in, write_weights
from weight_selection.tied import tied_keys

if TYPE_CHECKING:
    from weight_selection.selection import Selection

LARGE = 10**9  # bytes of values, from which a student is written without being built or run
HUB = {"timm": "timm_hub", "transformers": "transformers_hub"}  # library -> module that writes its directories
WEIGHTS = ("*.safetensors", "*.bin", "*.pth", "*.pt", "*.index.json", "config.json")  # what a model's directory has


class WeightFile:
    """A file of first weights.

    Args:
        output_dir: a directory, in which NAME.pth is written, or a file.
        overwrite: it may replace what is there.

    Raises:
        InputError: it cannot be written, or something would be lost.
    """

    def __init__(self, output_dir: str, name: str, overwrite: bool):
        path = Path(output_dir)
        if path.suffix in SUFFIXES:
            if path.is_dir():
                raise InputError(f"--output_dir {path}: is a directory; remove it or choose another name")
        else:
            path = path / f"{name}.pth"
        check_writable(path.parent, "--output_dir")
        for existing in (path, provenance_path(path)):
            if existing.exists() and not overwrite:
                raise InputError(f"--output_dir {output_dir}: {existing} exists; add --overwrite to replace it")
        self.path = path

    def check_not_the_teachers(self, selection: Selection) -> None:
        """Raise InputError if the file is the teacher's own."""
        if self.path.resolve() in {own.resolve() for own in _teachers_own(selection)}:
            raise InputError(f"--output_dir {self.path}: is the teacher's own file; choose another name")

    def write(self, state_dict: dict, student: nn.Module, provenance: dict) -> None:
        """Write first weights and their provenance, both or neither.

        Args:
            student: to try the file with, unless it is on the meta device; its weights are replaced.
            provenance: of the weights. ``left_out`` are the keys that the file does not have. A value of ``teacher``
                may be a future. The file's name, its SHA-256 and versions are added.

        Raises:
            InputError: the disk is full, or the file does not give back what was selected.
        """
        with new_file(provenance_path(self.path)) as record, new_file(self.path) as temporary:
            safetensors = self.path.suffix == ".safetensors"
            content = _finished(provenance, self.path.name, student) if safetensors else {}
            tensors = untied(state_dict, student) if safetensors else state_dict
            write_weights(tensors, temporary, provenance=json.dumps(content))
            check_written(temporary, tensors)
            if problem := first_mismatch(state_dict, student, lambda key: key in provenance["left_out"]):
                raise InputError(f"--output_dir: what was written cannot be loaded: {problem}")
            if not is_large(state_dict):
                student.load_state_dict(state_dict, strict=False)
                try_forward(student)
            content = content or _finished(provenance, self.path.name, student)
            record.write_text(_record(content, temporary))


class HubDirectory:
    """A directory that the student's library opens: timm's local-dir:PATH, or from_pretrained(PATH) of Hugging Face.

    Args:
        output_dir: the directory.
        selection: whose student it is for.
        overwrite: it may replace the files of a model that are there.

    Raises:
        InputError: the library cannot open a directory with this student, or something would be lost.
    """

    def __init__(self, output_dir: str, selection: Selection, overwrite: bool):
        self.path = Path(output_dir)
        self.model = selection.models[1]
        library = library_of(self.model)
        if library not in HUB:
            raise InputError(
                f"--format hub: only timm and Hugging Face open directories, and not of a {type(self.model).__name__}; "
                "leave it out, and name a .safetensors file as the --output_dir"
            )
        self.hub = import_module(f"weight_selection.sources.{HUB[library]}")
        self.config = self.hub.configuration(selection)
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"--output_dir {output_dir}: is a file; name a directory")
        existing = next((file for pattern in WEIGHTS for file in self.path.glob(pattern)), None)
        if existing and not overwrite:
            raise InputError(f"--output_dir {output_dir}: {existing.name} is in it; add --overwrite to replace it")
        check_writable(self.path.parent, "--output_dir")

    def check_not_the_teachers(self, selection: Selection) -> None:
        """Raise InputError if the directory holds the teacher's own weights."""
        own = _teachers_own(selection)
        if self.path.resolve() in {(path if path.is_dir() else path.parent).resolve() for path in own}:
            raise InputError(f"--output_dir {self.path}: holds the teacher's own weights; name another directory")

    def write(self, state_dict: dict, student: nn.Module, provenance: dict) -> None:
        """Write the directory, all of it or nothing; open it as its library does, and compare.

        Args, Raises: as ``WeightFile.write``. ``state_dict`` has all of the student's keys.
        """
        weights = self.hub.stored_tensors(self.model, untied(state_dict, self.model))
        with new_directory(self.path, "--output_dir", replace=True) as directory:
            file = directory / "model.safetensors"
            content = _finished(provenance, file.name, student)
            self.hub.write_config(self.config, state_dict, directory)
            write_weights(weights, file, provenance=json.dumps(content))
            check_written(file, weights)
            if not is_large(state_dict):
                opened = self.hub.reopened(self.model, directory)
                if problem := first_difference(opened.state_dict(), state_dict):
                    raise InputError(f"--format hub: what was written opens with other weights: {problem}")
                try_forward(opened.float())
            provenance_path(file).write_text(_record(content, file))


def _teachers_own(selection):
    """The files and directories that the teacher was named by or is read from."""
    teacher = selection.teacher
    scheme, name = split_name(teacher.model) if isinstance(teacher.model, str) else ("", "")
    named = [teacher.path, *selection.opened[2], Path(name) if scheme else None]
    return [path for path in named if path is not None and path.exists()]


# ---------------------------------------------------------------------------------------------------------
# The values


def is_large(state_dict: dict) -> bool:
    """Whether a student is so large that it is neither built nor run beside its weights."""
    return sum(value.nbytes for value in state_dict.values()) >= LARGE


def cast(state_dict: dict, dtype: str, tied: dict) -> dict:
    """Give the floating-point values another type, one of ``DTYPES``, one tensor after the other in the same dict.

    Args:
        tied: {key: the key that its tensor goes by}.

    Raises:
        InputError: a value is beyond the type's range.
    """
    for key, value in state_dict.items() if dtype != KEEP else ():
        if value.is_floating_point() and key not in tied:
            state_dict[key] = value.to(getattr(torch, dtype))
            if not state_dict[key].isfinite().all():
                raise InputError(f"--dtype {dtype}: {key} has values beyond its range; choose another")
    return {key: state_dict[tied.get(key, key)] for key in state_dict}


def untied(state_dict: dict, student: nn.Module) -> dict:
    """A tied tensor under one of its keys only: safetensors files do not share memory."""
    tied = tied_keys(student)
    return {key: value for key, value in state_dict.items() if key not in tied}


def value_type(state_dict: dict) -> str:
    """The type of the first floating-point values: "float32"."""
    return str(next(value.dtype for value in state_dict.values() if value.is_floating_point())).removeprefix("torch.")


def initialised_student(selection: Selection, state_dict: dict, seed: int) -> nn.Module:
    """The student with its own initialisation; if it is large, without values on the meta device."""
    if is_large(state_dict):
        return skeleton_of(selection.models[1])
    torch.manual_seed(seed)
    return selection.student.create()


def completed(state_dict: dict, student: nn.Module, selection: Selection, seed: int, dtype: str) -> dict:
    """First weights of all of the student's keys, in its order; those that are left out have its own initialisation.

    Args:
        student: of ``initialised_student``. If it is large, only the modules of Hugging Face that hold what is left out
            are initialised; of other libraries the whole student is.
        dtype: one of ``DTYPES``, of the values that are added.
    """
    absent = selection.plan.left_out
    if not absent or not next(student.parameters()).is_meta:
        own = student.state_dict()
    elif library_of(student) == "transformers":
        own = import_module("weight_selection.sources.transformers_hub").initialised(student, absent, seed)
    else:
        torch.manual_seed(seed)
        own = selection.student.create().state_dict()
    own = cast({key: own[key] for key in absent}, dtype, {})
    return {key: state_dict[key] if key in state_dict else own[key] for key in student.state_dict()}


# ---------------------------------------------------------------------------------------------------------
# Provenance


def _finished(provenance, name, student):
    """The provenance of a file, but for its SHA-256: with its name, the teacher's SHA-256 and versions."""
    teacher = provenance["teacher"].items()
    teacher = {key: value.result() if isinstance(value, Future) else value for key, value in teacher}
    versions = {"torch": torch.__version__}
    for package in dict.fromkeys(filter(None, ("timm", library_of(student)))):
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    versions["python"] = sys.version.split()[0]
    return {"file": name} | provenance | {"teacher": teacher, "versions": versions}


def _record(content, file):
    """The text of the .json beside a file."""
    return json.dumps({"file": content["file"], "sha256": sha256(file)} | content, indent=2) + "\n"


# ---------------------------------------------------------------------------------------------------------
# What was written


def check_written(path: Path, state_dict: dict) -> None:
    """Read a written file back, tensor by tensor, and raise InputError unless it has exactly these tensors."""
    if problem := first_difference(Weights(stored_in([path], "--output_dir")), state_dict):
        raise InputError(f"--output_dir: what was written cannot be loaded: {problem}")


def first_difference(opened: Mapping, state_dict: dict) -> str | None:
    """Describe the first of the tensors that another state_dict does not have, or None. It may be of a wider type."""
    for key in dict.fromkeys([*state_dict, *opened]):
        if key not in opened or key not in state_dict:
            return f"{key} is {'missing' if key not in opened else 'too much'}"
        if not torch.equal(opened[key].to(state_dict[key].dtype), state_dict[key]):
            return f"{key} has other values"
    return None


def try_forward(student: nn.Module) -> None:
    """Run a student on made-up inputs; raise InputError if an output is not finite."""
    with torch.no_grad():
        outputs = tree_leaves(run_forward(student.eval(), _made_up(facts_of(student).inputs)))
    if not all(value.isfinite().all() for value in outputs if isinstance(value, torch.Tensor)):
        raise InputError("--student: its output with the selected weights is not finite")


def _made_up(inputs):
    """Values for example inputs on the meta device: noise, the number 0 for tokens, and masks that hide nothing."""
    generator = torch.Generator().manual_seed(0)

    def values(name, tensor):
        if not isinstance(tensor, torch.Tensor) or not tensor.is_meta:
            return tensor
        if tensor.is_floating_point():
            return torch.randn(tensor.shape, generator=generator)
        fill = torch.ones if tensor.dtype == torch.bool or "mask" in name else torch.zeros
        return fill(tensor.shape, dtype=tensor.dtype)

    if isinstance(inputs, dict):
        return {name: values(name, tensor) for name, tensor in inputs.items()}
    return tuple(values("", tensor) for tensor in inputs)
