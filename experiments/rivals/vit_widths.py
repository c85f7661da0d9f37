"""A narrower timm ViT cut out of a wider one, and the activations by which arms choose what to keep."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn as nn

from rivals.arms import Pair, without_classifier

BATCH_SIZE = 64


@dataclass
class Kept:
    """Indices, ascending: of the stream; and of every layer's hidden units, and dimensions of each head.

    Attributes:
        stream: (channels,).
        units: per layer (units,).
        keys: per layer (heads, dimensions of a head), for queries and keys.
        values: the same for values.
    """

    stream: torch.Tensor
    units: list[torch.Tensor]
    keys: list[torch.Tensor]
    values: list[torch.Tensor]


def cut(pair: Pair, kept: Kept, scaled: bool = False) -> dict:
    """The teacher's weights at the kept places.

    Args:
        scaled: multiply each matrix by the root of (inputs of the teacher's / inputs that are kept).
    """
    teacher, weights, everything = pair.teacher, {}, slice(None)
    head_size = teacher.blocks[0].attn.head_dim
    for key, value in without_classifier(teacher).items():
        rows, columns, layer = kept.stream, everything, int(key.split(".")[1]) if key.startswith("blocks.") else None
        if "attn" in key:
            first = torch.arange(teacher.blocks[layer].attn.num_heads)[:, None] * head_size
            keys, values = ((first + chosen[layer]).flatten() for chosen in (kept.keys, kept.values))
            width = len(first) * head_size
            fused = torch.cat([keys, width + keys, 2 * width + values])
            rows, columns = (fused, kept.stream) if "qkv" in key else (kept.stream, values)
        elif "fc1" in key:
            rows, columns = kept.units[layer], kept.stream
        elif "fc2" in key:
            columns = kept.units[layer]
        if value.ndim == 3:  # class token and positions
            weights[key] = value[..., kept.stream]
            continue
        weights[key] = value[rows]
        if value.ndim == 2:
            weights[key] = weights[key][:, columns]
            weights[key] *= (value.shape[1] / weights[key].shape[1]) ** 0.5 if scaled else 1
    return weights


def strongest(importance: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the ``count`` largest along the last dimension, ascending."""
    return importance.topk(count).indices.sort().values


@contextlib.contextmanager
def caught(modules: dict, inputs: bool) -> Iterator[dict]:
    """Within the block, the dict keeps each named module's latest input or output."""
    values = {}

    def keep(name):
        return lambda module, given, result: values.__setitem__(name, given[0] if inputs else result)

    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    try:
        yield values
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def magnitudes(teacher: nn.Module, images: torch.Tensor) -> dict:
    """Means over tokens of absolute activations, each (images, layers, ...).

    Returns:
        ``norms``, outputs of both norms of a layer (images, 2 layers, channels); ``writes``, what attention and MLP add
        to the stream (images, 2 layers, channels); ``units`` (images, layers, units), as the second dense layer gets
        them; ``values`` (images, layers, heads, dimensions), outputs of the heads; ``keys``, products of the sizes of
        queries and keys, of the same shape.
    """
    blocks = list(teacher.blocks)
    layers = range(len(blocks))
    outputs = {("norms", 2 * i + k): norm for i in layers for k, norm in enumerate((blocks[i].norm1, blocks[i].norm2))}
    outputs |= {
        ("writes", 2 * i + k): m for i in layers for k, m in enumerate((blocks[i].attn.proj, blocks[i].mlp.fc2))
    }
    outputs |= {("keys", i): blocks[i].attn.qkv for i in layers}
    inputs = {("units", i): blocks[i].mlp.fc2 for i in layers} | {("values", i): blocks[i].attn.proj for i in layers}
    found = {}
    with caught(outputs, inputs=False) as results, caught(inputs, inputs=True) as given:
        for batch in images.split(BATCH_SIZE):
            teacher(batch)
            sizes = {name: value.abs().mean(1) for name, value in (results | given).items()}
            for name, value in sizes.items():
                found.setdefault(name, []).append(value)
    found = {name: torch.cat(values) for name, values in found.items()}
    stacked = {}
    for kind, number in sorted(found):
        stacked.setdefault(kind, []).append(found[kind, number])
    stacked = {kind: torch.stack(values, 1) for kind, values in stacked.items()}
    heads = (blocks[0].attn.num_heads, blocks[0].attn.head_dim)
    stacked["values"] = stacked["values"].unflatten(-1, heads)
    queries, keys, _ = stacked["keys"].unflatten(-1, (3, *heads)).unbind(-3)
    return stacked | {"keys": queries * keys}
