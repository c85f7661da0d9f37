"""Which family a model belongs to."""

import re
from pkgutil import resolve_name

import torch.nn as nn

from models.families import FAMILIES, Family
from program import InputError


def family_of(model: nn.Module, name: str) -> Family:
    """The family a timm model belongs to.

    Args:
        model: the module; its weights are not touched, so it may be on the meta device.
        name: what to call it in an error.

    Raises:
        InputError: no declaration fits the model.
    """
    family = family_by_class(model)
    if family is None:
        known = ", ".join(f"{family.name} ({family.model_class.rpartition(':')[2]})" for family in FAMILIES.values())
        raise InputError(f"{name}: a {type(model).__name__} belongs to no family that weight selection knows: {known}")
    with_weights = [module for module in model.modules() if next(module.parameters(), None) is not None]
    described = tuple(map(resolve_name, family.modules))
    odd = {type(m).__name__ for m in with_weights if not isinstance(m, described) and not _is_torchs(m)}
    if odd:
        raise InputError(f"{name}: weight selection cannot take apart {', '.join(sorted(odd))} yet")
    return family


def family_by_class(model: nn.Module) -> Family | None:
    """The family of a model's class, or None; it says nothing about the modules inside."""
    return next((family for family in FAMILIES.values() if isinstance(model, resolve_name(family.model_class))), None)


def _is_torchs(module):
    """Whether a module is one of PyTorch's, or timm's variant of one of its normalisations."""
    return type(module).__module__.startswith("torch.nn.") or isinstance(module, (nn.LayerNorm, nn.GroupNorm))


def classifier_pattern(model: nn.Module) -> str:
    """Regular expression of a model's classifier keys: its family's, or for any other model what timm records."""
    family = family_by_class(model)
    if family is not None:
        return family.classifier
    names = model.pretrained_cfg["classifier"]
    names = (names,) if isinstance(names, str) else names
    return rf"^({'|'.join(re.escape(name) for name in names)})\."
