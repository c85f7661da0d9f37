"""What files and releases know of an architecture that its modules do not say.

Layers, neurons and positions are found in the model itself, so an architecture needs no declaration to be selected
from. ViT and ConvNeXt have one, because the paper's release has conventions for them and their publishers' files hold
more than the model. For all others the answers follow from what timm records.
"""

import re
import sys
from dataclasses import dataclass, field
from pkgutil import resolve_name

import torch.nn as nn

from weight_selection.errors import InputError


@dataclass(frozen=True)
class Architecture:
    """Conventions of an architecture. Patterns are regular expressions that are searched in state_dict keys.

    Attributes:
        name: of its files, such as ``vit.pth``.
        classifier: pattern of the classifier, and of everything that the release treats as such.
        components: {name that ``exclude`` takes: pattern} (Table 10).
        head_norm: pattern of the normalisation among the classifier's keys, if there is one.
        filter_fn: "module:name" of timm's conversion of foreign files, called with (state_dict, model,
            **filter_options).
        extras: pattern of what a teacher's file may hold of its pretraining beside the model. It is left out.
        towers: {prefix of the model in files of a larger whole: prefix that timm knows it by}. All else in such a file
            is left out.
    """

    name: str
    classifier: str
    components: dict
    head_norm: str | None = None
    filter_fn: str | None = None
    filter_options: dict = field(default_factory=dict)
    extras: str | None = None
    towers: dict = field(default_factory=dict)


VIT = Architecture(
    name="vit",
    classifier=r"^head(_dist)?\.",
    components={
        "patch_embed": r"^patch_embed\.",
        "pos_embed": r"^pos_embed$",
        "attention": r"\.attn\.",
        "norm": r"(^|\.)(norm\d?|fc_norm|norm_pre|q_norm|k_norm)\.",
        "mlp": r"\.mlp\.",
    },
    filter_fn="timm.models.vision_transformer:checkpoint_filter_fn",
    filter_options={"adapt_layer_scale": True},  # DeiT-3's gamma_1, gamma_2
    extras=r"^(mask_token$|decoder_)|(^|[./])pre_logits[./]",  # MAE's decoder, a layer before JAX's classifier
    towers={"visual.": "visual.", "backbone.": ""},  # beside CLIP's text model; beside DINO's projection head
)

CONVNEXT = Architecture(
    name="convnext",
    classifier=r"^head\.",
    head_norm=r"^head\.norm\.",
    components={
        "patch_embed": r"^stem\.0\.",
        "norm": r"(^stem\.1|\.downsample\.0|\.norm)\.",
        "mlp": r"\.mlp\.fc",
    },
    filter_fn="timm.models.convnext:checkpoint_filter_fn",
    extras=r"^(projectors|norms)\.",  # EUPE's
    towers={"visual.": "visual."},  # beside CLIP's text model
)

# "module:class" of timm -> its declaration; subclasses share it.
DECLARED = {
    "timm.models.vision_transformer:VisionTransformer": VIT,
    "timm.models.convnext:ConvNeXt": CONVNEXT,
}

# Components of all other architectures, by the names of their modules' classes.
CLASSES = {"attention": r"Attention|Attn", "mlp": r"Mlp$|SwiGLU", "norm": r"Norm"}
POS_EMBED = r"(^|\.)(absolute_)?pos_embed"


def architecture_of(model: nn.Module, name: str) -> Architecture:
    """The architecture of a timm model: its declaration, or one made from what timm records.

    Args:
        model: its weights are not touched, so it may be on the meta device.
        name: what to call it in an error.

    Raises:
        InputError: the model is not one of timm's.
    """
    return declared_architecture(model) or _undeclared(model, name)


def declared_architecture(model: nn.Module) -> Architecture | None:
    """The declaration for a model's class, or None."""
    return next((known for cls, known in DECLARED.items() if isinstance(model, resolve_name(cls))), None)


def classifier_pattern(model: nn.Module) -> str:
    """Regular expression of a model's classifier keys: as its architecture declares, or as timm records."""
    declared = declared_architecture(model)
    return _recorded_classifier(model) if declared is None else declared.classifier


def recorded_names(model: nn.Module, what: str) -> tuple:
    """Names of the modules that timm records as a model's ``first_conv`` or ``classifier``: none, one or several."""
    names = model.pretrained_cfg.get(what) or ()
    return (names,) if isinstance(names, str) else names


def _undeclared(model, name):
    ours = [cls for cls in type(model).__mro__ if cls.__module__.startswith("timm.models.")]
    if not ours or not hasattr(model, "pretrained_cfg"):
        raise InputError(f"{name}: a {type(model).__name__} is not one of timm's models")
    root = ours[-1]  # a subclass, such as a distilled variant, is of the architecture that it extends
    filter_fn = getattr(sys.modules[root.__module__], "checkpoint_filter_fn", None)
    return Architecture(
        name=root.__name__.lower(),
        classifier=_recorded_classifier(model),
        components=_components(model),
        filter_fn=filter_fn and f"{root.__module__}:{filter_fn.__name__}",
    )


def _components(model):
    components = {}
    for component, pattern in CLASSES.items():
        modules = {path: m for path, m in model.named_modules() if re.search(pattern, type(m).__name__)}
        if component == "norm":  # a block may have "Norm" in its name; a normalisation has parameters of its own
            modules = {path: m for path, m in modules.items() if next(m.parameters(recurse=False), None) is not None}
        components[component] = _inside(modules)
    components["patch_embed"] = _inside(recorded_names(model, "first_conv"))
    if any(re.search(POS_EMBED, key) for key, _ in model.named_parameters()):
        components["pos_embed"] = POS_EMBED
    return {component: pattern for component, pattern in components.items() if pattern}


def _recorded_classifier(model):
    return _inside(recorded_names(model, "classifier")) or r"$^"  # matches no key


def _inside(paths):
    """A regular expression of the keys inside modules, or None if there are no modules."""
    found = "|".join(re.escape(path) for path in paths if path)
    return rf"^({found})\." if found else None
