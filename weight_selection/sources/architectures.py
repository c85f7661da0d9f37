"""What files and releases know of an architecture that its modules do not say.

Layers, neurons and positions are found in the model itself, so an architecture needs no declaration to be selected
from. ViT and ConvNeXt have one, because the paper's release has conventions for them and their publishers' files hold
more than the model. For all others the answers follow from what timm records.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pkgutil import resolve_name

import torch.nn as nn


@dataclass(frozen=True)
class Architecture:
    """Conventions of an architecture. Patterns are regular expressions that are searched in state_dict keys.

    Attributes:
        name: of its files, such as ``vit.pth``.
        classifier: pattern of the classifier, and of everything that the release treats as such. ``NO_KEYS`` if
            there is none; None if the model does not say.
        components: {name that ``exclude`` takes: pattern} (Table 10).
        head_norm: pattern of the normalisation among the classifier's keys, if there is one.
        filter_fn: "module:name" of timm's conversion of foreign files, called with (state_dict, model,
            **filter_options).
        extras: pattern of what a teacher's file may hold of its pretraining beside the model. It is left out.
        towers: {prefix of the model in files of a larger whole: prefix that timm knows it by}. All else in such a file
            is left out.
    """

    name: str
    classifier: str | None
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
CLASSES = {"attention": r"Attention|Attn", "mlp": r"Mlp$|SwiGLU|^MLP(Block)?$", "norm": r"Norm"}
POS_EMBED = r"(^|\.)(absolute_)?pos_embed"
NO_KEYS = r"$^"  # matches none

# (mean, std) by channel of images that weights were trained on.
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALVES = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


def declared_architecture(model: nn.Module) -> Architecture | None:
    """The declaration for the class of one of timm's models, or None."""
    return next((known for cls, known in DECLARED.items() if isinstance(model, resolve_name(cls))), None)


def found_components(model: nn.Module, first_convolutions: Iterable[str]) -> dict:
    """The components of a model that no declaration knows, {name that ``exclude`` takes: pattern} (Table 10).

    Args:
        first_convolutions: names of the modules that take the image.
    """
    components = {}
    for component, pattern in CLASSES.items():
        modules = {path: m for path, m in model.named_modules() if re.search(pattern, type(m).__name__)}
        if component == "norm":  # a block may have "Norm" in its name; a normalisation has parameters of its own
            modules = {path: m for path, m in modules.items() if next(m.parameters(recurse=False), None) is not None}
        components[component] = keys_inside(modules)
    components["patch_embed"] = keys_inside(first_convolutions)
    if any(re.search(POS_EMBED, key) for key, _ in model.named_parameters()):
        components["pos_embed"] = POS_EMBED
    return {component: pattern for component, pattern in components.items() if pattern}


def keys_inside(names: Iterable[str]) -> str | None:
    """A regular expression of the keys inside modules of these names, or None if there are no modules."""
    found = "|".join(re.escape(name) for name in names if name)
    return rf"^({found})\." if found else None
