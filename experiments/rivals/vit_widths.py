"""A narrower timm ViT cut out of a wider one, and the activations by which arms choose what to keep."""

from dataclasses import dataclass

import torch
import torch.nn as nn

from rivals.arms import Pair, without_classifier


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


@torch.no_grad()
def magnitudes(teacher: nn.Module, images: torch.Tensor) -> dict:
    """Means over tokens of absolute activations, each (images, layers, ...).

    Returns:
        ``norms``, outputs of both norms of a layer (images, 2 layers, channels); ``writes``, what attention and MLP add
        to the stream (images, 2 layers, channels); ``units`` (images, layers, units), as the second dense layer gets
        them; ``values`` (images, layers, heads, dimensions), outputs of the heads; ``keys``, products of the sizes of
        queries and keys, of the same shape.
    """
    found, handles = {}, []

    def catch(kind, module, given=False):
        values = found.setdefault(kind, [])
        hook = lambda module, inputs, output: values.append((inputs[0] if given else output).abs().mean(1))  # noqa: E731
        handles.append(module.register_forward_hook(hook))

    for block in teacher.blocks:
        for kind, *modules in (("norms", block.norm1, block.norm2), ("writes", block.attn.proj, block.mlp.fc2)):
            for module in modules:
                catch(kind, module)
        catch("keys", block.attn.qkv)
        catch("values", block.attn.proj, given=True)
        catch("units", block.mlp.fc2, given=True)
    teacher(images)
    for handle in handles:
        handle.remove()
    found = {kind: torch.stack(values, 1) for kind, values in found.items()}
    heads = block.attn.num_heads, block.attn.head_dim
    queries, keys, _ = found["keys"].unflatten(-1, (3, *heads)).unbind(-3)
    return found | {"keys": queries * keys, "values": found["values"].unflatten(-1, heads)}
