"""Sizes of Hugging Face's models that were published: widths, depths and heads, as their config.json say.

CONFIGS is {name: (model_type, arguments of its config that differ from the defaults)}.
"""

from collections.abc import Sequence

import torch
import torch.nn as nn


def vit(width: int, layers: int, heads: int, hidden: int | None = None, **others) -> dict:
    """Arguments of a ViT, and of other models with these names."""
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    return sizes | {"intermediate_size": 4 * width if hidden is None else hidden} | others


def dinov2(width: int, layers: int, heads: int, **others) -> dict:
    return {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "image_size": 518} | others


def swin(width: int, third: int, heads: int, window: int = 7, size: int = 224) -> dict:
    depths, heads = (2, 2, third, 2), tuple(heads * 2**stage for stage in range(4))
    return {"embed_dim": width, "depths": depths, "num_heads": heads, "window_size": window, "image_size": size}


def convnext(depths: Sequence[int], widths: Sequence[int]) -> dict:
    return {"depths": list(depths), "hidden_sizes": list(widths)}


def clip(patch: int, width: int, layers: int, heads: int, text: Sequence[int], size: int = 224, **others) -> dict:
    """Arguments of CLIP: (width, layers, heads) of its images, and (width, layers, heads, projection) of its text."""
    *words, projection = text
    parts = {
        "vision_config": vit(width, layers, heads, patch_size=patch, image_size=size),
        "text_config": vit(*words, **others),
    }
    return parts | {"projection_dim": projection}


def siglip(width: int, layers: int, heads: int, hidden: int, patch: int = 16, size: int = 224) -> dict:
    return {
        "vision_config": vit(width, layers, heads, hidden, patch_size=patch, image_size=size),
        "text_config": vit(width, layers, heads, hidden, projection_size=width),
    }


def gpt2(width: int, layers: int, heads: int, **others) -> dict:
    return {"n_embd": width, "n_layer": layers, "n_head": heads} | others


def llama(width: int, hidden: int, layers: int, heads: int, groups: int, **others) -> dict:
    return vit(width, layers, heads, hidden, num_key_value_heads=groups) | others


def mamba(width: int, layers: int) -> dict:
    return {"hidden_size": width, "num_hidden_layers": layers, "time_step_rank": width // 16}


def t5(width: int, hidden: int, layers: int, heads: int, head: int = 64, **others) -> dict:
    return {"d_model": width, "d_ff": hidden, "num_layers": layers, "num_heads": heads, "d_kv": head} | others


def whisper(width: int, layers: int, heads: int, decoders: int | None = None, **others) -> dict:
    sizes = {"d_model": width, "decoder_layers": decoders or layers, "encoder_layers": layers}
    for part in ("encoder", "decoder"):
        sizes |= {f"{part}_attention_heads": heads, f"{part}_ffn_dim": 4 * width}
    return sizes | others


BEIT = {"use_relative_position_bias": True, "use_mask_token": False}
DINOV3 = {"num_register_tokens": 4}
DINOV3_PLUS = DINOV3 | {"use_gated_mlp": True}
GATED = {"use_swiglu_ffn": True}
CLIP_B, CLIP_L, CLIP_H = (512, 12, 8, 512), (768, 12, 12, 768), (1024, 24, 16, 1024)
LLAMA3 = {"vocab_size": 128256}
V1_1 = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
DEBERTA_V3 = {
    "vocab_size": 128100,
    "type_vocab_size": 0,
    "position_biased_input": False,
    "relative_attention": True,
    "position_buckets": 256,
    "pos_att_type": ["p2c", "c2p"],
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
}
QWEN3 = {"head_dim": 128}

CONFIGS = {
    "vit-tiny-patch16-224": ("vit", vit(192, 12, 3)),
    "vit-small-patch16-224": ("vit", vit(384, 12, 6)),
    "vit-base-patch16-224": ("vit", vit(768, 12, 12)),
    "vit-base-patch16-384": ("vit", vit(768, 12, 12, image_size=384)),
    "vit-base-patch32-384": ("vit", vit(768, 12, 12, image_size=384, patch_size=32)),
    "vit-large-patch16-224": ("vit", vit(1024, 24, 16)),
    "vit-large-patch32-384": ("vit", vit(1024, 24, 16, image_size=384, patch_size=32)),
    "vit-huge-patch14-224-in21k": ("vit", vit(1280, 32, 16, patch_size=14)),
    "dino-vits16": ("vit", vit(384, 12, 6)),
    "dino-vits8": ("vit", vit(384, 12, 6, patch_size=8)),
    "dino-vitb16": ("vit", vit(768, 12, 12)),
    "dino-vitb8": ("vit", vit(768, 12, 12, patch_size=8)),
    "deit-tiny-distilled-patch16-224": ("deit", vit(192, 12, 3)),
    "deit-small-distilled-patch16-224": ("deit", vit(384, 12, 6)),
    "deit-base-distilled-patch16-224": ("deit", vit(768, 12, 12)),
    "deit-base-distilled-patch16-384": ("deit", vit(768, 12, 12, image_size=384)),
    "beit-base-patch16-224": ("beit", vit(768, 12, 12, **BEIT)),
    "beit-base-patch16-384": ("beit", vit(768, 12, 12, image_size=384, **BEIT)),
    "beit-large-patch16-224": ("beit", vit(1024, 24, 16, layer_scale_init_value=1e-5, **BEIT)),
    "beit-large-patch16-512": ("beit", vit(1024, 24, 16, image_size=512, layer_scale_init_value=1e-5, **BEIT)),
    "dinov2-small": ("dinov2", dinov2(384, 12, 6)),
    "dinov2-base": ("dinov2", dinov2(768, 12, 12)),
    "dinov2-large": ("dinov2", dinov2(1024, 24, 16)),
    "dinov2-giant": ("dinov2", dinov2(1536, 40, 24, **GATED)),
    "dinov2-with-registers-small": ("dinov2_with_registers", dinov2(384, 12, 6, patch_size=14)),
    "dinov2-with-registers-base": ("dinov2_with_registers", dinov2(768, 12, 12, patch_size=14)),
    "dinov2-with-registers-large": ("dinov2_with_registers", dinov2(1024, 24, 16, patch_size=14)),
    "dinov2-with-registers-giant": ("dinov2_with_registers", dinov2(1536, 40, 24, patch_size=14, **GATED)),
    "dinov3-vits16": ("dinov3_vit", vit(384, 12, 6, **DINOV3)),
    "dinov3-vits16plus": ("dinov3_vit", vit(384, 12, 6, **DINOV3_PLUS)),
    "dinov3-vitb16": ("dinov3_vit", vit(768, 12, 12, **DINOV3)),
    "dinov3-vitl16": ("dinov3_vit", vit(1024, 24, 16, **DINOV3)),
    "dinov3-vith16plus": ("dinov3_vit", vit(1280, 32, 20, **DINOV3_PLUS)),
    "dinov3-vit7b16": ("dinov3_vit", vit(4096, 40, 32, 8192, query_bias=False, value_bias=False, **DINOV3_PLUS)),
    "dinov3-convnext-tiny": ("dinov3_convnext", convnext((3, 3, 9, 3), (96, 192, 384, 768))),
    "dinov3-convnext-small": ("dinov3_convnext", convnext((3, 3, 27, 3), (96, 192, 384, 768))),
    "dinov3-convnext-base": ("dinov3_convnext", convnext((3, 3, 27, 3), (128, 256, 512, 1024))),
    "dinov3-convnext-large": ("dinov3_convnext", convnext((3, 3, 27, 3), (192, 384, 768, 1536))),
    "siglip-base-patch16-224": ("siglip", siglip(768, 12, 12, 3072)),
    "siglip-base-patch16-384": ("siglip", siglip(768, 12, 12, 3072, size=384)),
    "siglip-large-patch16-256": ("siglip", siglip(1024, 24, 16, 4096, size=256)),
    "siglip-so400m-patch14-384": ("siglip", siglip(1152, 27, 16, 4304, 14, 384)),
    "clip-vit-base-patch32": ("clip", clip(32, 768, 12, 12, CLIP_B)),
    "clip-vit-base-patch16": ("clip", clip(16, 768, 12, 12, CLIP_B)),
    "clip-vit-large-patch14": ("clip", clip(14, 1024, 24, 16, CLIP_L)),
    "clip-vit-large-patch14-336": ("clip", clip(14, 1024, 24, 16, CLIP_L, 336)),
    "CLIP-ViT-H-14-laion2B": ("clip", clip(14, 1280, 32, 16, CLIP_H, hidden_act="gelu")),
    "clip-vit-base-patch32 (images)": ("clip_vision_model", vit(768, 12, 12, patch_size=32)),
    "clip-vit-base-patch16 (images)": ("clip_vision_model", vit(768, 12, 12, patch_size=16)),
    "clip-vit-large-patch14 (images)": ("clip_vision_model", vit(1024, 24, 16, patch_size=14)),
    "clip-vit-large-patch14-336 (images)": ("clip_vision_model", vit(1024, 24, 16, patch_size=14, image_size=336)),
    "CLIP-ViT-H-14-laion2B (images)": ("clip_vision_model", vit(1280, 32, 16, patch_size=14)),
    "swin-tiny-patch4-window7-224": ("swin", swin(96, 6, 3)),
    "swin-small-patch4-window7-224": ("swin", swin(96, 18, 3)),
    "swin-base-patch4-window7-224": ("swin", swin(128, 18, 4)),
    "swin-base-patch4-window12-384": ("swin", swin(128, 18, 4, 12, 384)),
    "swin-large-patch4-window7-224": ("swin", swin(192, 18, 6)),
    "swin-large-patch4-window12-384": ("swin", swin(192, 18, 6, 12, 384)),
    "swinv2-tiny-patch4-window8-256": ("swinv2", swin(96, 6, 3, 8, 256)),
    "swinv2-small-patch4-window8-256": ("swinv2", swin(96, 18, 3, 8, 256)),
    "swinv2-base-patch4-window8-256": ("swinv2", swin(128, 18, 4, 8, 256)),
    "swinv2-large-patch4-window12-192-22k": ("swinv2", swin(192, 18, 6, 12, 192)),
    "convnext-tiny-224": ("convnext", convnext((3, 3, 9, 3), (96, 192, 384, 768))),
    "convnext-small-224": ("convnext", convnext((3, 3, 27, 3), (96, 192, 384, 768))),
    "convnext-base-224": ("convnext", convnext((3, 3, 27, 3), (128, 256, 512, 1024))),
    "convnext-large-224": ("convnext", convnext((3, 3, 27, 3), (192, 384, 768, 1536))),
    "convnext-xlarge-224-22k-1k": ("convnext", convnext((3, 3, 27, 3), (256, 512, 1024, 2048))),
    "convnextv2-atto-1k-224": ("convnextv2", convnext((2, 2, 6, 2), (40, 80, 160, 320))),
    "convnextv2-femto-1k-224": ("convnextv2", convnext((2, 2, 6, 2), (48, 96, 192, 384))),
    "convnextv2-pico-1k-224": ("convnextv2", convnext((2, 2, 6, 2), (64, 128, 256, 512))),
    "convnextv2-nano-1k-224": ("convnextv2", convnext((2, 2, 8, 2), (80, 160, 320, 640))),
    "convnextv2-tiny-1k-224": ("convnextv2", convnext((3, 3, 9, 3), (96, 192, 384, 768))),
    "convnextv2-base-1k-224": ("convnextv2", convnext((3, 3, 27, 3), (128, 256, 512, 1024))),
    "convnextv2-large-1k-224": ("convnextv2", convnext((3, 3, 27, 3), (192, 384, 768, 1536))),
    "convnextv2-huge-1k-224": ("convnextv2", convnext((3, 3, 27, 3), (352, 704, 1408, 2816))),
    "bert-tiny": ("bert", vit(128, 2, 2)),
    "bert-mini": ("bert", vit(256, 4, 4)),
    "bert-small": ("bert", vit(512, 4, 8)),
    "bert-medium": ("bert", vit(512, 8, 8)),
    "bert-base-uncased": ("bert", vit(768, 12, 12)),
    "bert-large-uncased": ("bert", vit(1024, 24, 16)),
    "bert-base-cased": ("bert", vit(768, 12, 12, vocab_size=28996)),
    "bert-large-cased": ("bert", vit(1024, 24, 16, vocab_size=28996)),
    "distilbert-base-uncased": ("distilbert", {}),
    "distilroberta-base": ("roberta", vit(768, 6, 12, max_position_embeddings=514, type_vocab_size=1)),
    "roberta-base": ("roberta", vit(768, 12, 12, max_position_embeddings=514, type_vocab_size=1)),
    "roberta-large": ("roberta", vit(1024, 24, 16, max_position_embeddings=514, type_vocab_size=1)),
    "deberta-v3-xsmall": ("deberta-v2", vit(384, 12, 6, **DEBERTA_V3)),
    "deberta-v3-small": ("deberta-v2", vit(768, 6, 12, **DEBERTA_V3)),
    "deberta-v3-base": ("deberta-v2", vit(768, 12, 12, **DEBERTA_V3)),
    "deberta-v3-large": ("deberta-v2", vit(1024, 24, 16, **DEBERTA_V3)),
    "ModernBERT-base": ("modernbert", {}),
    "ModernBERT-large": ("modernbert", vit(1024, 28, 16, 2624)),
    "distilgpt2": ("gpt2", gpt2(768, 6, 12)),
    "gpt2": ("gpt2", gpt2(768, 12, 12)),
    "gpt2-medium": ("gpt2", gpt2(1024, 24, 16)),
    "gpt2-large": ("gpt2", gpt2(1280, 36, 20)),
    "gpt2-xl": ("gpt2", gpt2(1600, 48, 25)),
    "TinyLlama-1.1B": ("llama", llama(2048, 5632, 22, 32, 4)),
    "llama-7b": ("llama", llama(4096, 11008, 32, 32, 32)),
    "llama-13b": ("llama", llama(5120, 13824, 40, 40, 40)),
    "llama-30b": ("llama", llama(6656, 17920, 60, 52, 52)),
    "llama-65b": ("llama", llama(8192, 22016, 80, 64, 64)),
    "Llama-2-70b": ("llama", llama(8192, 28672, 80, 64, 8)),
    "Meta-Llama-3-8B": ("llama", llama(4096, 14336, 32, 32, 8, **LLAMA3)),
    "Meta-Llama-3-70B": ("llama", llama(8192, 28672, 80, 64, 8, **LLAMA3)),
    "Llama-3.2-1B": ("llama", llama(2048, 8192, 16, 32, 8, tie_word_embeddings=True, **LLAMA3)),
    "Llama-3.2-3B": ("llama", llama(3072, 8192, 28, 24, 8, tie_word_embeddings=True, **LLAMA3)),
    "Qwen2.5-0.5B": ("qwen2", llama(896, 4864, 24, 14, 2, tie_word_embeddings=True)),
    "Qwen2.5-1.5B": ("qwen2", llama(1536, 8960, 28, 12, 2, tie_word_embeddings=True)),
    "Qwen2.5-3B": ("qwen2", llama(2048, 11008, 36, 16, 2, tie_word_embeddings=True)),
    "Qwen2.5-7B": ("qwen2", llama(3584, 18944, 28, 28, 4, vocab_size=152064)),
    "Qwen2.5-14B": ("qwen2", llama(5120, 13824, 48, 40, 8, vocab_size=152064)),
    "Qwen2.5-32B": ("qwen2", llama(5120, 27648, 64, 40, 8, vocab_size=152064)),
    "Qwen2.5-72B": ("qwen2", llama(8192, 29568, 80, 64, 8, vocab_size=152064)),
    "Qwen3-0.6B": ("qwen3", llama(1024, 3072, 28, 16, 8, tie_word_embeddings=True, **QWEN3)),
    "Qwen3-1.7B": ("qwen3", llama(2048, 6144, 28, 16, 8, tie_word_embeddings=True, **QWEN3)),
    "Qwen3-4B": ("qwen3", llama(2560, 9728, 36, 32, 8, tie_word_embeddings=True, **QWEN3)),
    "Qwen3-8B": ("qwen3", llama(4096, 12288, 36, 32, 8, **QWEN3)),
    "Qwen3-14B": ("qwen3", llama(5120, 17408, 40, 40, 8, **QWEN3)),
    "Qwen3-32B": ("qwen3", llama(5120, 25600, 64, 64, 8, **QWEN3)),
    "Qwen3-30B-A3B": ("qwen3_moe", llama(2048, 6144, 48, 32, 4, moe_intermediate_size=768, **QWEN3)),
    "Qwen3-235B-A22B": ("qwen3_moe", llama(4096, 12288, 94, 64, 4, moe_intermediate_size=1536, **QWEN3)),
    "Mixtral-8x7B": ("mixtral", llama(4096, 14336, 32, 32, 8)),
    "Mixtral-8x22B": ("mixtral", llama(6144, 16384, 56, 48, 8, vocab_size=32768)),
    "gpt-oss-20b": ("gpt_oss", llama(2880, 2880, 24, 64, 8, head_dim=64, num_local_experts=32)),
    "gpt-oss-120b": ("gpt_oss", llama(2880, 2880, 36, 64, 8, head_dim=64, num_local_experts=128)),
    "mamba-130m": ("mamba", mamba(768, 24)),
    "mamba-370m": ("mamba", mamba(1024, 48)),
    "mamba-790m": ("mamba", mamba(1536, 48)),
    "mamba-1.4b": ("mamba", mamba(2048, 48)),
    "mamba-2.8b": ("mamba", mamba(2560, 64)),
    "gemma-2b": ("gemma", llama(2048, 16384, 18, 8, 1, head_dim=256)),
    "gemma-7b": ("gemma", llama(3072, 24576, 28, 16, 16, head_dim=256)),
    "t5-small": ("t5", t5(512, 2048, 6, 8)),
    "t5-base": ("t5", t5(768, 3072, 12, 12)),
    "t5-large": ("t5", t5(1024, 4096, 24, 16)),
    "t5-3b": ("t5", t5(1024, 16384, 24, 32, 128)),
    "t5-11b": ("t5", t5(1024, 65536, 24, 128, 128)),
    "flan-t5-small": ("t5", t5(512, 1024, 8, 6, **V1_1)),
    "flan-t5-base": ("t5", t5(768, 2048, 12, 12, **V1_1)),
    "flan-t5-large": ("t5", t5(1024, 2816, 24, 16, **V1_1)),
    "flan-t5-xl": ("t5", t5(2048, 5120, 24, 32, **V1_1)),
    "flan-t5-xxl": ("t5", t5(4096, 10240, 24, 64, **V1_1)),
    "whisper-tiny": ("whisper", whisper(384, 4, 6)),
    "whisper-base": ("whisper", whisper(512, 6, 8)),
    "whisper-small": ("whisper", whisper(768, 12, 12)),
    "whisper-medium": ("whisper", whisper(1024, 24, 16)),
    "whisper-large-v2": ("whisper", whisper(1280, 32, 20)),
    "whisper-large-v3": ("whisper", whisper(1280, 32, 20, num_mel_bins=128, vocab_size=51866)),
    "whisper-large-v3-turbo": ("whisper", whisper(1280, 32, 20, 4, num_mel_bins=128, vocab_size=51866)),
}


def build(name: str) -> nn.Module:
    """The base model of a published size, on the meta device."""
    from transformers import AutoConfig, AutoModel

    model_type, arguments = CONFIGS[name]
    with torch.device("meta"):
        return AutoModel.from_config(AutoConfig.for_model(model_type, **arguments))
