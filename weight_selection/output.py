"""The file of first weights: written whole with its provenance beside it, read back and tried before it is left."""

import json
import sys
from concurrent.futures import Future
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn as nn

from weight_selection.errors import InputError
from weight_selection.files import SUFFIXES, check_writable, new_file, provenance_path, sha256
from weight_selection.sources.facts import facts_of
from weight_selection.sources.weight_files import first_mismatch, read_weights, write_weights


def output_file(output_dir: str, name: str, overwrite: bool) -> Path:
    """The file to write, after making sure that it can be written and that nothing is lost.

    Args:
        output_dir: a directory, in which NAME.pth is written, or a file.
    """
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
    return path


def write(path: Path, state_dict: dict, student: nn.Module, provenance: dict) -> None:
    """Write first weights and their provenance, both or neither.

    Args:
        student: to try the file with; its weights are replaced.
        provenance: of the weights. ``left_out`` are the keys that the file does not have. A value of ``teacher`` may be
            a future. The file's name, its SHA-256 and versions are added.

    Raises:
        InputError: the disk is full, or the file does not give back what was selected.
    """
    with new_file(provenance_path(path)) as record, new_file(path) as temporary:
        write_weights(state_dict, temporary)
        verify(temporary, state_dict, student, provenance["left_out"])
        teacher = provenance["teacher"].items()
        teacher = {key: value.result() if isinstance(value, Future) else value for key, value in teacher}
        versions = {"torch": torch.__version__, "timm": version("timm"), "python": sys.version.split()[0]}
        content = {"file": path.name, "sha256": sha256(temporary)} | provenance
        content |= {"teacher": teacher, "versions": versions}
        record.write_text(json.dumps(content, indent=2) + "\n")


def verify(path: Path, state_dict: dict, student: nn.Module, absent: list) -> None:
    """Read a written file back, load it into the student, which must have all of its keys but ``absent``, and run it.

    Raises:
        InputError: the file does not give back what was selected, or the student's output is not finite.
    """
    written = read_weights(path, "--output_dir")
    problem = first_mismatch(written, student, lambda key: key in absent)
    if not problem and not all(torch.equal(written[key], value) for key, value in state_dict.items()):
        problem = "other values"
    if problem:
        raise InputError(f"--output_dir: what was written cannot be loaded: {problem}")
    student.load_state_dict(written, strict=False)
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(value.shape, generator=generator) for value in facts_of(student).inputs]
    with torch.no_grad():
        if not student.eval()(*inputs).isfinite().all():
            raise InputError("--student: its output with the selected weights is not finite")
