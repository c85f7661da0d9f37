"""The random initialisations that the paper compares weight selection with (Tables 3 and 12)."""

import torch.nn as nn

from models import SCHEMES
from models.mimetic import mimetic
from weight_selection.errors import InputError


def initialize(model: nn.Module, scheme: str) -> None:
    """Initialise a model that timm has just created, in place.

    ``timm`` leaves it as it is. In the paper's models timm draws linear weights, and ConvNeXt's convolutions, from a
    truncated normal distribution with std 0.02. A ViT's patch embedding keeps PyTorch's default for convolutions: it is
    uniform between -1 / sqrt(fan_in) and 1 / sqrt(fan_in), weights and biases alike.

    ``xavier`` is the uniform distribution of Glorot & Bengio (2010), eq. 16, and ``kaiming`` the normal distribution of
    He et al. (2015), eq. 10 (fan-in, ReLU gain). Both redraw the weights of all linear and convolution layers and set
    their biases to zero. Tokens, position embeddings, normalisations and LayerScale have no fan, and stay as they are.

    ``mimetic`` changes attention and position embeddings only: see ``mimetic.mimetic``.

    Raises:
        InputError: unknown scheme, or one that is not for this model.
    """
    if scheme not in SCHEMES:
        raise InputError(f"--init {scheme}: choose one of {', '.join(SCHEMES)}")
    if scheme == "timm":
        return
    if scheme == "mimetic":
        mimetic(model)
        return
    draw = nn.init.xavier_uniform_ if scheme == "xavier" else nn.init.kaiming_normal_
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            draw(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
