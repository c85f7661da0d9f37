"""What a family of models looks like to weight selection: a few lines of data per family, which import no torch.

A declaration says what shapes alone cannot: where the layers are, which dimensions are several parts stacked, which
dimensions are positions rather than neurons, and which keys are the classifier. Every other dimension of every
tensor is a set of neurons, and equal names are the same component.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Family:
    """Declaration of a family.

    Patterns are regular expressions searched in state_dict keys; classes and functions are "module:name".

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
        filter_fn: timm's conversion of foreign checkpoints, ``filter_fn(state_dict, model, **filter_options)``.
        extras: what a teacher's file may hold of its pretraining, beside the model; left out.
        towers: {prefix of the model in files of a larger whole: prefix timm knows it by}; all else there is left out.
        modules: the module classes whose weights this declaration describes, beside PyTorch's own.
    """

    name: str
    model_class: str
    student: str
    teacher: str
    layers: str
    classifier: str
    components: dict
    filter_fn: str
    modules: tuple
    patch_kernel: str
    extras: str
    towers: dict
    filter_options: dict = field(default_factory=dict)
    head_norm: str | None = None
    stacked: dict = field(default_factory=dict)
    pos_embed: str | None = None
    tokens: str | None = None


VIT = Family(
    name="vit",
    model_class="timm.models.vision_transformer:VisionTransformer",
    student="vit_tiny",
    teacher="vit_small_patch16_224.augreg_in21k",
    layers=r"^(blocks)\.(\d+)\.",
    classifier=r"^head(_dist)?\.",
    modules=(
        "timm.models.vision_transformer:VisionTransformer",
        "timm.models.vision_transformer:Block",
        "timm.models.vision_transformer:LayerScale",
        "timm.layers:Attention",
        "timm.layers:AttentionPoolLatent",
        "timm.layers:Mlp",
        "timm.layers:PatchEmbed",
        "timm.layers:RmsNorm",
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
    layers=r"^(stages\.\d+\.blocks)\.(\d+)\.",
    classifier=r"^head\.",
    modules=(
        "timm.models.convnext:ConvNeXt",
        "timm.models.convnext:ConvNeXtStage",
        "timm.models.convnext:ConvNeXtBlock",
        "timm.layers:Mlp",
        "timm.layers:GlobalResponseNormMlp",
        "timm.layers.grn:GlobalResponseNorm",
        "timm.layers:NormMlpClassifierHead",
        "timm.layers:RmsNorm",
        "timm.layers:RmsNorm2d",
    ),
    head_norm=r"^head\.norm\.",
    patch_kernel=r"^stem\.0\.weight$",
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
COMPONENTS = sorted({component for family in FAMILIES.values() for component in family.components})
