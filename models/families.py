"""What a family of models looks like to weight selection: a few lines of data per family.

A declaration says what shapes alone cannot: where the layers are, which dimensions are several parts stacked, which
dimensions are positions rather than neurons, and which keys are the classifier. Every other dimension of every
tensor is a set of neurons, and equal names are the same component.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import timm.layers
import torch.nn as nn
from timm.models import convnext, vision_transformer

from utils import InputError


@dataclass(frozen=True)
class Family:
    """Declaration of a family; all patterns are regular expressions searched in state_dict keys.

    Attributes:
        name: what ``--model_type`` calls it.
        model_class: timm's class; subclasses belong to the family too.
        student, teacher: the pair of the paper's main experiments (Table 1).
        layers: matches a key inside a layer; group 1 is the container, group 2 the layer's index in it.
        classifier: keys of the classifier, and of all that the release treats as such.
        head_norm: the normalisation among the classifier's keys, if there is one.
        stacked: tensors whose first dimension is so many equal parts stacked (fused q, k, v).
        patch_kernel: the convolution that embeds patches, (embed_dim, in_chans, height, width).
        pos_embed: position embeddings, (1, prefix tokens + grid height * grid width, embed_dim).
        tokens: learned tokens, (1, number of tokens, embed_dim): their number is not a number of neurons.
        components: pattern of each component that ``--exclude`` can name (Table 10).
        filter_fn: timm's conversion of foreign checkpoints, ``filter_fn(state_dict, model)``.
        extras: what a teacher's file may hold of its pretraining, beside the model; left out.
        towers: {prefix of the model in files of a larger whole: prefix timm knows it by}; all else there is left out.
        modules: the module classes whose weights this declaration describes, beside PyTorch's own.
    """

    name: str
    model_class: type
    student: str
    teacher: str
    layers: str
    classifier: str
    components: dict
    filter_fn: Callable
    modules: tuple
    patch_kernel: str
    extras: str
    towers: dict
    head_norm: str | None = None
    stacked: dict = field(default_factory=dict)
    pos_embed: str | None = None
    tokens: str | None = None


VIT = Family(
    name="vit",
    model_class=vision_transformer.VisionTransformer,
    student="vit_tiny",
    teacher="vit_small_patch16_224.augreg_in21k",
    layers=r"^(blocks)\.(\d+)\.",
    classifier=r"^head(_dist)?\.",
    modules=(
        vision_transformer.VisionTransformer,
        vision_transformer.Block,
        vision_transformer.LayerScale,
        timm.layers.Attention,
        timm.layers.AttentionPoolLatent,
        timm.layers.Mlp,
        timm.layers.PatchEmbed,
        timm.layers.RmsNorm,
    ),
    stacked={r"\.qkv\.(weight|bias)$": 3, r"\.kv\.(weight|bias)$": 2},
    patch_kernel=r"^patch_embed\.proj\.weight$",
    pos_embed=r"^pos_embed$",
    tokens=r"^((cls|reg|dist)_token|attn_pool\.latent)$",
    components={
        "patch_embed": r"^patch_embed\.",
        "pos_embed": r"^pos_embed$",
        "attention": r"\.attn\.",
        "norm": r"(^|\.)(norm\d?|fc_norm|norm_pre|q_norm|k_norm)\.",
        "mlp": r"\.mlp\.",
    },
    filter_fn=partial(vision_transformer.checkpoint_filter_fn, adapt_layer_scale=True),  # DeiT-3's gamma_1, gamma_2
    extras=r"^(mask_token$|decoder_)|(^|[./])pre_logits[./]",  # MAE's decoder, a layer before JAX's classifier
    towers={"visual.": "visual.", "backbone.": ""},  # beside CLIP's text model; beside DINO's projection head
)

CONVNEXT = Family(
    name="convnext",
    model_class=convnext.ConvNeXt,
    student="convnext_femto",
    teacher="convnext_tiny.fb_in22k",
    layers=r"^(stages\.\d+\.blocks)\.(\d+)\.",
    classifier=r"^head\.",
    modules=(
        convnext.ConvNeXt,
        convnext.ConvNeXtStage,
        convnext.ConvNeXtBlock,
        timm.layers.Mlp,
        timm.layers.GlobalResponseNormMlp,
        timm.layers.grn.GlobalResponseNorm,
        timm.layers.NormMlpClassifierHead,
        timm.layers.RmsNorm,
        timm.layers.RmsNorm2d,
    ),
    head_norm=r"^head\.norm\.",
    patch_kernel=r"^stem\.0\.weight$",
    components={
        "patch_embed": r"^stem\.0\.",
        "norm": r"(^stem\.1|\.downsample\.0|\.norm)\.",
        "mlp": r"\.mlp\.fc",
    },
    filter_fn=convnext.checkpoint_filter_fn,
    extras=r"^(projectors|norms)\.",  # EUPE's
    towers={"visual.": "visual."},  # beside CLIP's text model
)

FAMILIES = {family.name: family for family in (VIT, CONVNEXT)}
COMPONENTS = sorted({component for family in FAMILIES.values() for component in family.components})


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
        known = ", ".join(f"{family.name} ({family.model_class.__name__})" for family in FAMILIES.values())
        raise InputError(f"{name}: a {type(model).__name__} belongs to no family that weight selection knows: {known}")
    with_weights = [module for module in model.modules() if next(module.parameters(), None) is not None]
    odd = {type(m).__name__ for m in with_weights if not isinstance(m, family.modules) and not _is_torchs(m)}
    if odd:
        raise InputError(f"{name}: weight selection cannot take apart {', '.join(sorted(odd))} yet")
    return family


def family_by_class(model: nn.Module) -> Family | None:
    """The family of a model's class, or None; it says nothing about the modules inside."""
    return next((family for family in FAMILIES.values() if isinstance(model, family.model_class)), None)


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
