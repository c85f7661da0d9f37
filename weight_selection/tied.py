"""Tied tensors: one tensor under several keys, such as a language model's embedding that is its head as well."""

from collections.abc import Callable

import torch.nn as nn

from weight_selection.errors import InputError
from weight_selection.modules import tensors_of


def tied_keys(model: nn.Module) -> dict:
    """{key: the key that its tensor goes by}, of all keys of tied tensors but these.

    A tied tensor goes by its embedding's key if it has one, else by its first key. These are the keys that files of
    Hugging Face's tied models have.
    """
    embeddings = embedding_keys(model)
    keys = {}  # id of a tensor: its keys
    for key, value in tensors_of(model, keep_vars=True).items():
        keys.setdefault(id(value), []).append(key)
    tied = {}
    for some in keys.values():
        first = next((key for key in some if key in embeddings), some[0])
        tied |= {key: first for key in some if key != first}
    return tied


def embedding_keys(model: nn.Module) -> frozenset:
    """Keys of tables whose rows are looked up: of tokens, positions or buckets."""
    modules = model.named_modules(remove_duplicate=False)
    return frozenset(f"{name}.weight".lstrip(".") for name, module in modules if isinstance(module, nn.Embedding))


def not_taken(student_tied: dict, teacher_tied: dict, teacher_keys: dict) -> dict:
    """{student's key: teacher's key}, of the teacher's tensors that go as the student has one tensor for several.

    Args:
        student_tied, teacher_tied: of ``tied_keys``.
        teacher_keys: {student's key: key of the teacher's tensor in its place}, of those that the teacher has.
    """
    own = {key: teacher_tied.get(teacher_key, teacher_key) for key, teacher_key in teacher_keys.items()}
    return {key: teacher_keys[key] for key, first in student_tied.items() if key in own and own[key] != own.get(first)}


def check_classifier_is_not_tied(tied: dict, in_classifier: Callable) -> None:
    """Raise InputError if a tensor would be selected under one of its keys, and stay the student's own under another.

    Args:
        tied: of ``tied_keys``.
        in_classifier: says of a key whether it belongs to the classifier.
    """
    for key, first in tied.items():
        if in_classifier(key) != in_classifier(first):
            raise InputError(
                f"--classifier: {key} is of the classifier, but it is the tensor of {first}, which is not; name the "
                "modules of both, or untie them (tie_word_embeddings=False)"
            )
