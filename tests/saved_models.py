"""Small models of Hugging Face's, in directories as its own save_pretrained leaves them."""

import torch
import transformers

LARGE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
IMAGES = {"image_size": 16, "patch_size": 8}
TEXT = {"vocab_size": 40, "max_position_embeddings": 12}
CONFIGS = {  # class: its config, and what that takes beside the sizes above
    "ViTForImageClassification": (transformers.ViTConfig, IMAGES),
    "LlamaForCausalLM": (transformers.LlamaConfig, {**TEXT, "tie_word_embeddings": True}),
    "BertForMaskedLM": (transformers.BertConfig, TEXT),
    "Dinov2Model": (transformers.Dinov2Config, {**IMAGES, "use_swiglu_ffn": True, "mlp_ratio": 2}),
}


def build(name, sizes, **changes):
    """A model of a class of Hugging Face's with random weights."""
    config, own = CONFIGS[name]
    torch.manual_seed(0)
    return getattr(transformers, name)(config(**{**sizes, **own, **changes})).eval()


def save(model, directory, shard="1GB"):
    """Save a model as its library does, in files of at most the size ``shard``; the directory."""
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(directory, max_shard_size=shard)
    return directory
