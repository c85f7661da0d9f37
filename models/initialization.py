"""First weights: random initialisations (paper, Tables 3 and 12), and the classifier of a linear probe (Table 9)."""

import copy

import timm.layers
import torch
import torch.nn as nn

from models import SCHEMES
from weight_selection.errors import InputError

# Factors of the noise and of the identity, as observed in the products of pretrained ViTs.
QUERY_KEY = 0.7, 0.7
VALUE_PROJ = 0.4, -0.4


def initialize(model: nn.Module, scheme: str) -> None:
    """Initialise a model that timm has just created, in place.

    ``timm`` leaves it as it is. In the paper's models timm draws linear weights, and ConvNeXt's convolutions, from a
    truncated normal distribution with std 0.02. A ViT's patch embedding keeps PyTorch's default for convolutions: it is
    uniform between -1 / sqrt(fan_in) and 1 / sqrt(fan_in), weights and biases alike.

    ``xavier`` is the uniform distribution of Glorot & Bengio (2010), eq. 16, and ``kaiming`` the normal distribution of
    He et al. (2015), eq. 10 (fan-in, ReLU gain). Both redraw the weights of all linear and convolution layers and set
    their biases to zero. Tokens, position embeddings, normalisations and LayerScale have no fan, and stay as they are.

    ``mimetic`` changes attention and position embeddings only: see ``mimetic``.

    Raises:
        InputError: unknown scheme, or one that is not for this model.
    """
    if scheme not in SCHEMES:
        raise InputError(f"--init {scheme}: choose one of {', '.join(SCHEMES)}")
    if scheme == "mimetic":
        mimetic(model)
    elif scheme != "timm":
        draw = nn.init.xavier_uniform_ if scheme == "xavier" else nn.init.kaiming_normal_
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                draw(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)


def mimetic(model: nn.Module) -> None:
    """Give the attention products of a ViT the diagonals of pretrained ViTs (Trockman & Kolter, ICML 2023), in place.

    Let tokens be rows, d = embed_dim, and Z a (d, d) matrix of independent N(0, 1/d) elements, drawn anew for every
    product. In each head, W_q W_k^T (d, d) becomes the best approximation of rank head_dim to 0.7 Z + 0.7 I. In each
    layer, W_v W_proj (d, d) becomes 0.4 Z - 0.4 I. The singular value decomposition splits a product into its two
    factors. Position embeddings become 2-D sines and cosines, and zeros for the prefix tokens. All else stays.

    Raises:
        InputError: the model has no self-attention, or no learned absolute position embeddings.
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
        grid = timm.layers.build_sincos2d_pos_embed(model.patch_embed.grid_size, position.shape[-1])
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
    """A and B, both (rank, d), such that A^T B is the best approximation of this rank to noise * Z + identity * I."""
    target = noise * torch.randn(d, d, dtype=torch.float64) / d**0.5 + identity * torch.eye(d, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(target)
    root = s[:rank].sqrt()
    return (u[:, :rank] * root).T, root[:, None] * vh[:rank]


def make_linear_probe(model: nn.Module, name: str) -> None:
    """Freeze a timm model and give it a new classifier, in place (recipe of MAE, He et al. 2022).

    The classifier is a batch normalisation, then a linear layer. The normalisation has no weights. It brings all
    features to one scale, so that one learning rate suits them all. The linear layer starts from a truncated normal
    distribution (std 0.01), and its biases from zero.

    Raises:
        InputError: the classifier is not a single linear layer; names the model by ``name``.
    """
    classifier = model.get_classifier()
    if not isinstance(classifier, nn.Linear):
        raise InputError(f"--linear_probe true: the classifier of {name} is a {type(classifier).__name__}, not linear")
    model.requires_grad_(False)
    linear = nn.Linear(classifier.in_features, classifier.out_features)
    timm.layers.trunc_normal_(linear.weight, std=0.01)
    nn.init.zeros_(linear.bias)
    path = model.pretrained_cfg["classifier"]
    model.set_submodule(path, nn.Sequential(nn.BatchNorm1d(classifier.in_features, affine=False, eps=1e-6), linear))


def fold_linear_probe(model: nn.Module) -> nn.Module:
    """A copy of a model of ``make_linear_probe`` whose classifier is one linear layer again.

    In evaluation the normalisation and the linear layer together are linear: W (x - mean) / std + b. The outputs are
    the same up to rounding.
    """
    model = copy.deepcopy(model)
    path = model.pretrained_cfg["classifier"]
    norm, linear = model.get_submodule(path)
    folded = nn.Linear(linear.in_features, linear.out_features)
    with torch.no_grad():
        weight = linear.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
        folded.weight.copy_(weight)
        folded.bias.copy_(linear.bias - weight @ norm.running_mean.double())
    model.set_submodule(path, folded)
    return model
