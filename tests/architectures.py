"""Small models of many architectures, in pairs of teacher and student."""

import pytest
import torch
import torch.nn as nn

from weight_selection.sources.timm_models import create_model

# Small models: name: (timm's architecture, arguments of both, of the teacher, of the student). A teacher has twice the
# student's widths, so that every neuron can be there twice and normalisations see the same statistics.
SMALL = {"num_classes": 7}
TINY = {"img_size": 32, **SMALL}
VIT_SIZES = ({"embed_dim": 64, "num_heads": 4, "depth": 3}, {"embed_dim": 32, "num_heads": 2, "depth": 2})
STAGES = ({"depths": (2, 1, 3, 1), "dims": (16, 24, 32, 48)}, {"depths": (1, 1, 2, 1), "dims": (8, 12, 16, 24)})
SWIN_SIZES = (
    {"embed_dim": 32, "depths": (2, 4), "num_heads": (2, 4)},
    {"embed_dim": 16, "depths": (2, 2), "num_heads": (1, 2)},
)
CHANNELS = (
    {"channels": (24, 32, 48, 64), "layers": (2, 3, 2, 1)},
    {"channels": (12, 16, 24, 32), "layers": (1, 2, 1, 1)},
)
MODELS = {
    "vit": ("vit_tiny_patch16_224", TINY | {"patch_size": 8, "init_values": 0.1}, *VIT_SIZES),
    "vit_qk_norm": ("vit_tiny_patch16_224", TINY | {"patch_size": 8, "qk_norm": True}, *VIT_SIZES),
    "deit3": ("deit3_small_patch16_224", TINY | {"patch_size": 8}, *VIT_SIZES),
    "dinov2_reg": ("vit_small_patch14_reg4_dinov2", TINY | {"patch_size": 8}, *VIT_SIZES),
    "dinov2_swiglu": ("vit_giant_patch14_reg4_dinov2", TINY | {"patch_size": 8, "mlp_ratio": 2}, *VIT_SIZES),
    "siglip": ("vit_base_patch16_siglip_224", TINY | {"patch_size": 8}, *VIT_SIZES),
    "vit_parallel": ("vit_pwee_patch16_reg1_gap_256", TINY | {"patch_size": 8, "mlp_ratio": 2}, *VIT_SIZES),
    "dinov3": ("vit_small_plus_patch16_dinov3", TINY | {"patch_size": 8, "mlp_ratio": 2}, *VIT_SIZES),
    "eva02": ("eva02_tiny_patch14_224", TINY | {"patch_size": 8, "mlp_ratio": 2}, *VIT_SIZES),
    "eva": ("eva_giant_patch14_224", TINY | {"patch_size": 8, "mlp_ratio": 2}, *VIT_SIZES),
    "beit": ("beit_base_patch16_224", TINY | {"patch_size": 8}, *VIT_SIZES),
    "cait": ("cait_xxs24_224", TINY | {"patch_size": 8}, *VIT_SIZES),
    "xcit": ("xcit_nano_12_p16_224", TINY, *VIT_SIZES),
    "convnext": ("convnext_tiny", SMALL, *STAGES),
    "convnext_v2": ("convnextv2_atto", SMALL, *STAGES),
    "swin": ("swin_tiny_patch4_window7_224", TINY | {"window_size": 4}, *SWIN_SIZES),
    "swin_v2": ("swinv2_tiny_window8_256", TINY | {"window_size": 4}, *SWIN_SIZES),
    "mixer": (
        "mixer_s32_224",
        TINY | {"patch_size": 8},
        {"embed_dim": 32, "num_blocks": 3},
        {"embed_dim": 16, "num_blocks": 2},
    ),
    "gmixer": (
        "gmixer_12_224",
        TINY | {"patch_size": 8},
        {"embed_dim": 32, "num_blocks": 3},
        {"embed_dim": 16, "num_blocks": 2},
    ),
    "resnet": ("resnet18", SMALL, *CHANNELS),
    "resnet_bottleneck": ("seresnet50", SMALL, *CHANNELS),
    "wide_resnet": ("wide_resnet50_2", SMALL, *({**sizes, "base_width": 128} for sizes in CHANNELS)),
    "resnext": (
        "resnext50_32x4d",
        SMALL | {"channels": (32, 64, 64, 64)},
        {"layers": (2, 2, 2, 1), "cardinality": 8, "base_width": 8},
        {"layers": (1, 1, 2, 1), "cardinality": 4, "base_width": 4},
    ),
    "sk_resnext": (
        "skresnext50_32x4d",
        SMALL | {"layers": (1, 1, 1, 1)},
        {"channels": (128, 128, 256, 256)},
        {"channels": (64, 64, 128, 128)},
    ),
    "resnest": (
        "resnest14d",
        SMALL | {"layers": (1, 1, 1, 1)},
        *({"channels": sizes["channels"]} for sizes in CHANNELS),
    ),
    "efficientvit": (
        "efficientvit_b0",
        SMALL,
        {"widths": (8, 16, 32, 64, 128), "head_widths": (64, 64)},
        {"widths": (8, 16, 16, 32, 64), "head_widths": (64, 64)},
    ),
    "vgg": (
        "vgg11",
        SMALL,
        {"model_cfg": (16, 16, "M", 32, 32, 32, "M", 64, 64, 64, "M"), "mlp_ratio": 1 / 32},
        {"model_cfg": (8, "M", 16, 16, "M", 32, "M"), "mlp_ratio": 1 / 64},
    ),
    "efficientnet": ("test_efficientnet", SMALL, {}, {}),
    "mobilenet_v3": ("mobilenetv3_small_050", SMALL, {}, {}),
    "metaformer": (
        "poolformer_s12",
        SMALL,
        {"depths": (2, 1, 2, 1), "dims": (16, 32, 32, 64)},
        {"depths": (1, 1, 2, 1), "dims": (8, 16, 16, 32)},
    ),
    "convmixer": ("convmixer_768_32", SMALL | {"depth": 2}, {"dim": 32}, {"dim": 16}),  # its blocks are no residuals
}


def models(name):
    if name == "efficientvit" and tuple(map(int, torch.__version__.split(".")[:2])) < (2, 7):
        pytest.skip("timm's model uses autocast, which this PyTorch does not have on the meta device")
    architecture, both, large, small = MODELS[name]
    pair = create_model(architecture, **both, **large), create_model(architecture, **both, **small)
    if name == "vgg":  # timm's have 4096 features before the classifier, whatever their other widths
        for model in pair:
            model.pre_logits.fc2 = nn.Conv2d(model.pre_logits.fc2.in_channels, 128, 1)
            model.head.fc = nn.Linear(128, SMALL["num_classes"])
    return pair


def lively(model):
    """Random values everywhere, also where an initialisation has zeros or ones, in float64."""
    generator = torch.Generator().manual_seed(0)
    for key, value in model.state_dict().items():
        if value.is_floating_point():
            value.copy_(
                0.5 * torch.rand(value.shape, generator=generator) + (0.5 if "var" in key or value.ndim == 1 else -0.25)
            )
    return model.double().eval()


def reads(model, key):
    """The dimension along which a tensor sums over neurons: a dead one must not be read."""
    path, _, name = key.rpartition(".")
    module = model.get_submodule(path)
    if type(module).__name__ == "Conv1D" and name == "weight":  # transformers': (inputs, outputs)
        return 0
    if hasattr(module, "num_experts") and name in ("gate_up_proj", "down_proj"):  # transformers': one matrix per expert
        return 1 if module.is_transposed else 2
    if type(module).__name__.endswith("Router") and name == "weight":
        return 1
    if isinstance(module, (nn.MultiheadAttention, nn.RNNBase)) and name.startswith(("in_proj_weight", "weight_")):
        return 1
    return 1 if name == "weight" and isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) else None
