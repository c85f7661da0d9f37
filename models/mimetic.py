"""Mimetic initialisation of self-attention (Trockman & Kolter, ICML 2023; Table 12)."""

import timm.layers
import torch
import torch.nn as nn
from timm.layers import build_sincos2d_pos_embed

from weight_selection.errors import InputError

# Weight of the noise and of the identity in the products that pretrained ViTs are observed to have.
QUERY_KEY = 0.7, 0.7
VALUE_PROJ = 0.4, -0.4


def mimetic(model: nn.Module) -> None:
    """Give a ViT's attention products the diagonals that pretrained ones have, in place; all else stays as it is.

    With x a row of tokens, d = embed_dim and Z of independent N(0, 1/d) elements, a new Z for every product:
    in each head W_q W_k^T, (d, d), becomes the best approximation of rank head_dim to 0.7 Z + 0.7 I; in each layer
    W_v W_proj, (d, d), becomes 0.4 Z - 0.4 I. The singular value decomposition splits a product into its two factors.
    Position embeddings become 2-D sines and cosines, zero for the prefix tokens.

    Raises:
        InputError: a model without self-attention or without learned absolute position embeddings.
    """
    layers = [module for module in model.modules() if isinstance(module, timm.layers.Attention)]
    position = getattr(model, "pos_embed", None)
    if not layers or not isinstance(position, nn.Parameter) or position.shape[-1] % 4:
        raise InputError(
            f"--init mimetic: is for ViTs with position embeddings of a multiple of 4; this is a {type(model).__name__}"
        )
    with torch.no_grad():
        for layer in layers:
            _set_attention(layer)
        grid = build_sincos2d_pos_embed(model.patch_embed.grid_size, position.shape[-1])
        position.zero_()
        position[0, position.shape[1] - len(grid) :] = grid


def _set_attention(layer):
    d = layer.qkv.in_features
    q, k, v = layer.qkv.weight.view(3, -1, d)
    for head in range(layer.num_heads):
        rows = slice(head * layer.head_dim, (head + 1) * layer.head_dim)
        q[rows], k[rows] = _factors(d, *QUERY_KEY, rank=layer.head_dim)
    v[:], proj_transposed = _factors(d, *VALUE_PROJ, rank=len(v))
    layer.proj.weight.copy_(proj_transposed.T)


def _factors(d, noise, identity, rank):
    """A, B of shape (rank, d) with A^T B the best approximation of that rank to noise * Z + identity * I."""
    target = noise * torch.randn(d, d, dtype=torch.float64) / d**0.5 + identity * torch.eye(d, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(target)
    root = s[:rank].sqrt()
    return (u[:, :rank] * root).T, root[:, None] * vh[:rank]
