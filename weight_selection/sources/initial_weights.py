"""A student's first weights, from weight_selection.py or from a trained model: every key is accounted for."""

import re
from pathlib import Path

import torch.nn as nn

from weight_selection.errors import InputError
from weight_selection.files import SUFFIXES, Damaged, parse_json, provenance_path, read_text, sha256
from weight_selection.sources.directories import WEIGHTS, Directory
from weight_selection.sources.facts import facts_of
from weight_selection.sources.weight_files import NESTED, first_mismatch, read_weights


def find_weights(path, model: nn.Module, option: str) -> Path:
    """``path`` itself, or the file that ``weight_selection.py`` wrote into that directory for the model.

    Of a directory without such a file, the one that a library or a run of main.py saved its weights in.

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
        raise InputError(f"{option} {path}: no {name}.pth in that directory; name the file")
    return saved


def load_initial(model: nn.Module, path, option: str, nested=NESTED) -> list:
    """Load first weights into a student, in place; returns the keys that keep its own initialisation.

    The file may lack the classifier, and the keys that the provenance beside it lists as left out, but nothing else.
    ``option`` named it, for errors; ``nested`` as in ``read_weights``.

    Raises:
        InputError: the file cannot be read, is for another architecture or of another shape (the message names the
            first key), or has changed since its provenance was written.
    """
    state_dict = read_weights(path, option, nested)
    provenance = read_provenance(path, option) or {"left_out": []}
    return _load(model, state_dict, provenance["left_out"], f"{option} {path}")


def load_finetune(model: nn.Module, path, option: str, nested) -> list:
    """Load the weights of a trained model; a classifier of another shape keeps the model's own initialisation.

    As ``load_initial``.
    """
    state_dict = read_weights(path, option, nested)
    classifier = facts_of(model).architecture.classifier
    for key, value in model.state_dict().items():
        if re.search(classifier, key) and key in state_dict and state_dict[key].shape != value.shape:
            del state_dict[key]
    return _load(model, state_dict, set(), f"{option} {path}")


def _load(model, state_dict, left_out, origin):
    """Load a state_dict that may lack the classifier and ``left_out``, nothing else; returns the keys that it lacks."""
    classifier = facts_of(model).architecture.classifier
    problem = first_mismatch(state_dict, model, lambda key: re.search(classifier, key) or key in left_out)
    if problem:
        raise InputError(f"{origin}: does not fit this model: {problem}")
    return list(model.load_state_dict(state_dict, strict=False).missing_keys)


def read_provenance(path, option: str) -> dict | None:
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
