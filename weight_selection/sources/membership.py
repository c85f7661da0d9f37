"""Which family a model belongs to."""

import re
import sys
from pkgutil import resolve_name

import torch.nn as nn

from weight_selection.errors import InputError
from weight_selection.sources.families import FAMILIES, Family

# Components that ``--exclude`` can name, of families without a declaration: by the names of modules' classes.
CLASSES = {"attention": r"Attention|Attn", "mlp": r"Mlp$|SwiGLU", "norm": r"Norm"}
POS_EMBED = r"(^|\.)(absolute_)?pos_embed"


def family_of(model: nn.Module, name: str) -> Family:
    """The family of a timm model: one of ``FAMILIES``, or one made from what timm records of its class.

    Args:
        model: the module; its weights are not touched, so it may be on the meta device.
        name: what to call it in an error.

    Raises:
        InputError: the model is not timm's.
    """
    return family_by_class(model) or _undeclared(model, name)


def family_by_class(model: nn.Module) -> Family | None:
    """The declared family of a model's class, or None."""
    return next((family for family in FAMILIES.values() if isinstance(model, resolve_name(family.model_class))), None)


def _undeclared(model, name):
    ours = [kind for kind in type(model).__mro__ if kind.__module__.startswith("timm.models.")]
    if not ours or not hasattr(model, "pretrained_cfg"):
        raise InputError(f"{name}: a {type(model).__name__} is not one of timm's models")
    root = ours[-1]  # subclasses (distilled variants) belong to the family of the class they extend
    filter_fn = getattr(sys.modules[root.__module__], "checkpoint_filter_fn", None)
    components = {}
    for component, pattern in CLASSES.items():
        modules = {path: m for path, m in model.named_modules() if re.search(pattern, type(m).__name__)}
        if component == "norm":  # and no block that has it in its name
            modules = {path: m for path, m in modules.items() if next(m.parameters(recurse=False), None) is not None}
        components[component] = _prefixes(modules)
    components["patch_embed"] = _prefixes(recorded_names(model, "first_conv"))
    if any(re.search(POS_EMBED, key) for key, _ in model.named_parameters()):
        components["pos_embed"] = POS_EMBED
    return Family(
        name=root.__name__.lower(),
        model_class=f"{root.__module__}:{root.__name__}",
        classifier=_classifier(model),
        components={component: pattern for component, pattern in components.items() if pattern},
        filter_fn=filter_fn and f"{root.__module__}:{filter_fn.__name__}",
    )


def recorded_names(model: nn.Module, what: str) -> tuple:
    """Names of the modules that timm records as a model's ``first_conv`` or ``classifier``: none, one or several."""
    names = model.pretrained_cfg.get(what) or ()
    return (names,) if isinstance(names, str) else names


def _prefixes(paths):
    """A regular expression of the keys inside modules, or None if there are no modules."""
    found = "|".join(re.escape(path) for path in paths if path)
    return rf"^({found})\." if found else None


def classifier_pattern(model: nn.Module) -> str:
    """Regular expression of a model's classifier keys: its declared family's, or what timm records."""
    family = family_by_class(model)
    return _classifier(model) if family is None else family.classifier


def _classifier(model):
    return _prefixes(recorded_names(model, "classifier")) or r"$^"  # a model without one: no key
