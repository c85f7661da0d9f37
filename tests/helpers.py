"""Made-up teachers and the layouts of their files, reading what a run left, comparing weights."""

import json
import re

import torch
import torch.nn as nn

from weight_selection.sources.timm_models import create_model, input_size

TRAIN_IMAGES, TEST_IMAGES = 48, 13  # of the fixture image_folder


def read_log(directory):
    return [json.loads(row) for row in (directory / "log.txt").read_text().splitlines()]


def read_results(directory):
    return json.loads((directory / "results.json").read_text())


def read_checkpoint(directory, name):
    return torch.load(directory / f"checkpoint-{name}.pth", weights_only=True)


def assert_same(ours, theirs, **tolerance):
    """Equal keys and tensors; equal bit for bit unless a tolerance is given."""
    assert ours.keys() == theirs.keys()
    tolerance = tolerance or {"rtol": 0, "atol": 0}
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key], **tolerance, msg=lambda text, key=key: f"{key}: {text}")


def differ(ours, theirs):
    return any(not torch.equal(ours[key], theirs[key]) for key in ours)


def meta(name, **kwargs):
    return create_model(name, device="meta", **kwargs)


def random_weights(model):
    generator = torch.Generator().manual_seed(0)
    return {key: 0.02 * torch.randn(value.shape, generator=generator) for key, value in model.state_dict().items()}


def random(*shape, seed=0):
    """Doubles from a normal distribution."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def images_for(model, count=12, side=None):
    """Random images of a model's size, or of ``side``, in doubles."""
    channels, height, width = input_size(model)
    return random(count, channels, side or height, side or width, seed=1)


def words(kwargs):
    return [f"{key}={value}" for key, value in kwargs.items()]


def read(path):
    return torch.load(path, weights_only=True)


def written(directory):
    return sorted(path.name for path in directory.rglob("*") if path.is_file())


def release_names(weights):
    """A ConvNeXt's keys as its authors' release names them."""
    renamed = {}
    for key, value in weights.items():
        key = re.sub(r"^stem\.", "downsample_layers.0.", key)
        key = re.sub(r"^stages\.(\d)\.downsample\.", r"downsample_layers.\1.", key)
        key = key.replace(".blocks.", ".").replace("conv_dw", "dwconv").replace("mlp.fc", "pwconv")
        renamed[key.replace("head.norm.", "norm.").replace("head.fc.", "head.")] = value
    return renamed


def jax_names(weights, heads):
    """A ViT's tensors as Google's JAX release lays them out."""
    out = {
        "embedding/kernel": weights["patch_embed.proj.weight"].permute(2, 3, 1, 0),
        "embedding/bias": weights["patch_embed.proj.bias"],
        "cls": weights["cls_token"],
        "Transformer/posembed_input/pos_embedding": weights["pos_embed"],
        "Transformer/encoder_norm/scale": weights["norm.weight"],
        "Transformer/encoder_norm/bias": weights["norm.bias"],
        "head/kernel": weights["head.weight"].T,
        "head/bias": weights["head.bias"],
    }
    width = weights["norm.bias"].numel()
    for layer in sorted({key.split(".")[1] for key in weights if key.startswith("blocks.")}):
        ours, theirs = f"blocks.{layer}.", f"Transformer/encoderblock_{layer}/"
        for norm, number in (("norm1", 0), ("norm2", 2)):
            out[f"{theirs}LayerNorm_{number}/scale"] = weights[f"{ours}{norm}.weight"]
            out[f"{theirs}LayerNorm_{number}/bias"] = weights[f"{ours}{norm}.bias"]
        attention = f"{theirs}MultiHeadDotProductAttention_1/"
        for part, name in enumerate(("query", "key", "value")):
            rows = slice(part * width, (part + 1) * width)
            out[f"{attention}{name}/kernel"] = weights[f"{ours}attn.qkv.weight"][rows].T.reshape(width, heads, -1)
            out[f"{attention}{name}/bias"] = weights[f"{ours}attn.qkv.bias"][rows].reshape(heads, -1)
        out[f"{attention}out/kernel"] = weights[f"{ours}attn.proj.weight"].T.reshape(heads, -1, width)
        out[f"{attention}out/bias"] = weights[f"{ours}attn.proj.bias"]
        for number in (0, 1):
            dense = f"{theirs}MlpBlock_3/Dense_{number}/"
            out[f"{dense}kernel"] = weights[f"{ours}mlp.fc{number + 1}.weight"].T
            out[f"{dense}bias"] = weights[f"{ours}mlp.fc{number + 1}.bias"]
    return {key: value.numpy() for key, value in out.items()}


def prefixed(prefix, weights):
    return {prefix + key: value for key, value in weights.items()}


def save_torchscript(state_dict, path):
    """Save a TorchScript archive of modules that have these tensors; OpenAI's also has three numbers as buffers."""
    root = nn.Module()
    for key, value in state_dict.items():
        *parents, name = key.split(".")
        module = root
        for parent in parents:
            if parent not in dict(module.named_children()):
                module.add_module(parent, nn.Module())
            module = module.get_submodule(parent)
        module.register_parameter(name, nn.Parameter(value))
    for name, value in {"input_resolution": 32, "context_length": 7, "vocab_size": 30}.items():
        root.register_buffer(name, torch.tensor(value))
    torch.jit.script(root).save(str(path))
