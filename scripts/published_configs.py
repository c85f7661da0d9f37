"""Sizes of Hugging Face's models that were published: widths, depths and heads, as their config.json say.

Each is {name: (model_type, arguments of its config that differ from the defaults)}.
"""

import torch
import torch.nn as nn

CONFIGS = {
    "vit-base-patch16-224": ("vit", {}),
    "vit-large-patch16-224": (
        "vit",
        {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
    ),
}


def build(name: str) -> nn.Module:
    """The base model of a published size, on the meta device."""
    from transformers import AutoConfig, AutoModel

    model_type, arguments = CONFIGS[name]
    with torch.device("meta"):
        return AutoModel.from_config(AutoConfig.for_model(model_type, **arguments))
