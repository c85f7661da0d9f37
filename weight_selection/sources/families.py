"""What files and releases know of a family of models that its architecture does not say; imports no torch.

Layers, neurons and positions are found in the model itself (``selection/``), so a family needs no declaration to be
selected from. One is made for any other model from what timm records (``models.membership``); these two have a pair of
the paper and a release whose conventions are kept.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Family:
    """Declaration of a family.

    Patterns are regular expressions searched in state_dict keys; classes and functions are "module:name".

    Attributes:
        name: what ``--model_type`` calls it, and its files.
        model_class: timm's class; subclasses belong to the family too.
        classifier: keys of the classifier, and of all that the release treats as such.
        components: pattern of each component that ``--exclude`` can name (Table 10).
        filter_fn: timm's conversion of foreign checkpoints, ``filter_fn(state_dict, model, **filter_options)``.
        student, teacher: the pair of the paper's main experiments (Table 1).
        head_norm: the normalisation among the classifier's keys, if there is one.
        extras: what a teacher's file may hold of its pretraining, beside the model; left out.
        towers: {prefix of the model in files of a larger whole: prefix timm knows it by}; all else there is left out.
    """

    name: str
    model_class: str
    classifier: str
    components: dict
    filter_fn: str | None = None
    filter_options: dict = field(default_factory=dict)
    student: str | None = None
    teacher: str | None = None
    head_norm: str | None = None
    extras: str | None = None
    towers: dict = field(default_factory=dict)


VIT = Family(
    name="vit",
    model_class="timm.models.vision_transformer:VisionTransformer",
    student="vit_tiny",
    teacher="vit_small_patch16_224.augreg_in21k",
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

CONVNEXT = Family(
    name="convnext",
    model_class="timm.models.convnext:ConvNeXt",
    student="convnext_femto",
    teacher="convnext_tiny.fb_in22k",
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

FAMILIES = {family.name: family for family in (VIT, CONVNEXT)}
COMPONENTS = ("attention", "mlp", "norm", "patch_embed", "pos_embed")  # of any family
