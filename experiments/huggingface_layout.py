#!/usr/bin/env python3
"""timm's ViT as Hugging Face's: the same tensors in another layout, and the same first weights for a student.

    python experiments/huggingface_layout.py FILE [--name vit_tiny] [--output DIR]

FILE holds weights of timm's model NAME. The script makes a student of half its width from timm's model and from Hugging
Face's, compares all tensors bit for bit, and writes the teacher to DIR, for from_pretrained.
"""

import re
import sys
from pathlib import Path

import timm
import torch
import torch.nn as nn
import transformers

sys.path.insert(0, str(Path(__file__).parents[1]))  # the repository's modules
from weight_selection import select_weights
from weight_selection.arguments import Parser
from weight_selection.errors import InputError, run_program
from weight_selection.sources.timm_models import create_model

NAMES = (
    (r"^head\.", "classifier."),
    (r"^norm\.", "vit.layernorm."),
    (r"^pos_embed$", "vit.embeddings.position_embeddings"),
    (r"^cls_token$", "vit.embeddings.cls_token"),
    (r"^patch_embed\.proj\.", "vit.embeddings.patch_embeddings.projection."),
    (r"^blocks\.(\d+)\.norm1\.", r"vit.layers.\1.layernorm_before."),
    (r"^blocks\.(\d+)\.norm2\.", r"vit.layers.\1.layernorm_after."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"vit.layers.\1.attention.o_proj."),
    (r"^blocks\.(\d+)\.mlp\.", r"vit.layers.\1.mlp."),
)


def from_timm(model: timm.models.VisionTransformer) -> nn.Module:
    """A ``ViTForImageClassification`` that computes what one of timm's plain ViTs does."""
    config = transformers.ViTConfig(
        hidden_size=model.embed_dim,
        num_hidden_layers=len(model.blocks),
        num_attention_heads=model.blocks[0].attn.num_heads,
        intermediate_size=model.blocks[0].mlp.fc1.out_features,
        image_size=model.patch_embed.img_size[0],
        patch_size=model.patch_embed.patch_size[0],
        layer_norm_eps=model.norm.eps,
        num_labels=model.num_classes,
    )
    twin = transformers.ViTForImageClassification(config)
    twin.load_state_dict(in_layout(model.state_dict()))
    return twin.eval()


def in_layout(state_dict: dict) -> dict:
    """Tensors of timm's ViT under Hugging Face's names: one tensor of queries, keys and values becomes three."""
    found = {}
    for key, value in state_dict.items():
        if match := re.match(r"blocks\.(\d+)\.attn\.qkv\.(\w+)", key):
            layer, kind = match.groups()
            for name, part in zip("qkv", value.chunk(3), strict=True):
                found[f"vit.layers.{layer}.attention.{name}_proj.{kind}"] = part
        else:
            found[next(re.sub(old, new, key) for old, new in NAMES if re.search(old, key))] = value
    return found


def main(argv=None) -> None:
    parser = Parser("huggingface_layout.py", "Compare timm's and Hugging Face's ViT as teachers.")
    parser.add_argument("file", metavar="FILE", help="weights of timm's model")
    parser.add_argument("--name", default="vit_tiny", help="of timm's model")
    parser.add_argument("--output", metavar="DIR", help="write the teacher there, for from_pretrained")
    args = parser.parse_args(argv)
    teacher = create_model(args.name, pretrained_cfg_overlay={"file": args.file}, pretrained=True)
    sizes = {"embed_dim": teacher.embed_dim // 2, "num_heads": teacher.blocks[0].attn.num_heads}
    if teacher.blocks[0].attn.num_heads % 2 == 0:  # else heads become half as large
        sizes["num_heads"] //= 2
    student = create_model(args.name, **sizes)
    expected = in_layout(select_weights(teacher, student))
    ours = from_timm(teacher)
    found = select_weights(ours, from_timm(student))
    different = [
        key for key in expected.keys() | found if key not in found or not torch.equal(found[key], expected.get(key))
    ]
    if different:
        raise InputError(
            f"FILE {args.file}: {len(different)} of {len(expected)} tensors differ, such as {different[0]}"
        )
    print(f"all {len(expected)} tensors are bit for bit those of timm's student, {sizes}")
    if args.output is not None:
        ours.save_pretrained(args.output)


if __name__ == "__main__":
    run_program("huggingface_layout.py", main)
