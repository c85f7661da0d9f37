"""A student's first weights, from weight_selection.py or from a trained model: every key is accounted for."""

import contextlib
import re
from pathlib import Path

import torch.nn as nn

from weight_selection.commands import model_words, selection_command
from weight_selection.errors import InputError
from weight_selection.files import SUFFIXES, Damaged, StrPath, parse_json, provenance_path, read_text, sha256
from weight_selection.sources.directories import WEIGHTS, Directory
from weight_selection.sources.facts import facts_of
from weight_selection.sources.names import create_model
from weight_selection.sources.weight_files import NESTED, first_mismatch, read_weights


def find_weights(path: StrPath, model: nn.Module, option: str, student: list = ()) -> Path:
    """``path`` itself, or the file that ``weight_selection.py`` wrote into that directory for the model.

    Of a directory without such a file, the one that a library or a run of main.py saved its weights in.

    Args:
        path, option: what was given, and the option that gave it, for errors.
        student: the options of weight_selection.py that name the model, for errors.

    Raises:
        InputError: there is no such file in the directory.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    name = facts_of(model).architecture.name
    for suffix in SUFFIXES:
        if (path / f"{name}{suffix}").is_file():
            return path / f"{name}{suffix}"
    place = Directory(path, f"{option} {path}")
    saved = next((place.file(file) for file in WEIGHTS if place.file(file)), None)
    if saved is None or saved.suffix == ".json":  # of several shards, whose origin nothing records
        held = _held(path, option)
        anew = f"; or make it: {selection_command(student, name)}" if held and student else ""
        raise InputError(f"{option} {path}: no {name}.pth in that directory{held}; name the file{anew}")
    return saved


def _held(directory, option):
    """Which file of ``weight_selection.py`` a directory holds instead, in words for an error."""
    for file in sorted(file for file in directory.iterdir() if file.suffix in SUFFIXES):
        with contextlib.suppress(InputError):
            if provenance := read_provenance(file, option):
                return f"; it holds {file.name}, and {_made_for(file, provenance)}"
    return ""


def _made_for(path, provenance):
    """The student that a provenance names, in words for an error."""
    student = provenance["student"]
    kwargs, size = student.get("kwargs"), student.get("input_size")
    words = model_words(str(student.get("name")), kwargs if isinstance(kwargs, dict) else {}, size)
    return f"{provenance_path(path).name} says that it was made for {' '.join(words)}"


def load_initial(model: nn.Module, path: StrPath, option: str, nested: tuple = NESTED, student: list = ()) -> list:
    """Load first weights into a student, in place; returns the keys that keep its own initialisation.

    The file may lack the classifier, and the keys that the provenance beside it lists as left out, but nothing else.

    Args:
        path, option, student: as of ``find_weights``.
        nested: as of ``read_weights``.

    Raises:
        InputError: the file cannot be read, is for another architecture or of another shape (the message names the
            first key, and says how to make the right one), or has changed since its provenance was written.
    """
    state_dict = read_weights(path, option, nested)
    provenance = read_provenance(path, option)
    left_out = provenance["left_out"] if provenance else []
    if problem := _mismatch(model, state_dict, left_out):
        remedy = _remedy(path, provenance, model, student) if provenance else ""
        raise InputError(f"{option} {path}: does not fit this model: {problem}{remedy}")
    return model.load_state_dict(state_dict, strict=False).missing_keys


def _remedy(path, provenance, model, student):
    """What to do about first weights of another model."""
    name = facts_of(model).architecture.name
    again = provenance if _architecture_name(provenance) == name else None
    anew = f", or make another file: {selection_command(student, name, again)}" if student else ""
    return f"; {_made_for(path, provenance)}: train that{anew}"


def _architecture_name(provenance):
    """The name of the architecture that weights were made for; None if the student's name is not known."""
    student = provenance["student"]
    try:
        model = create_model(str(student.get("name")), device="meta", **student.get("kwargs", {}))
    except (InputError, TypeError):
        return None
    return facts_of(model).architecture.name


def load_finetune(model: nn.Module, path: StrPath, option: str, nested: tuple) -> list:
    """Load the weights of a trained model; a classifier of another shape keeps the model's own initialisation.

    As ``load_initial``.
    """
    state_dict = read_weights(path, option, nested)
    classifier = facts_of(model).architecture.classifier
    for key, value in model.state_dict().items():
        if re.search(classifier, key) and key in state_dict and state_dict[key].shape != value.shape:
            del state_dict[key]
    if problem := _mismatch(model, state_dict, ()):
        raise InputError(f"{option} {path}: does not fit this model: {problem}")
    return model.load_state_dict(state_dict, strict=False).missing_keys


def _mismatch(model, state_dict, left_out):
    """What does not fit in a state_dict that may lack the classifier and ``left_out``, nothing else; or None."""
    classifier = facts_of(model).architecture.classifier
    return first_mismatch(state_dict, model, lambda key: re.search(classifier, key) or key in left_out)


def read_provenance(path: StrPath, option: str) -> dict | None:
    """What the file beside first weights says of them: teacher, student, options, left_out; None if there is no file.

    Raises:
        InputError: it is not weight_selection.py's, or the weights have changed since.
    """
    provenance = provenance_path(path)
    if not provenance.is_file():
        return None
    try:
        content = parse_json(read_text(provenance))
        digest, kinds = content["sha256"], [content[name] for name in ("teacher", "student", "options")]
        if not all(isinstance(kind, dict) for kind in kinds) or not isinstance(content["left_out"], list):
            raise TypeError("another layout")
    except (Damaged, KeyError, TypeError) as error:
        raise InputError(
            f"{option} {path}: the {provenance.name} beside it is not weight_selection.py's; move it"
        ) from error
    if digest != sha256(path):
        raise InputError(f"{option} {path}: changed since {provenance.name} beside it was written; make both anew")
    return content
