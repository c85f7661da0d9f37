"""Initialisations that weight selection is compared with (Tables 3 and 12)."""

import torch.nn as nn

from models import SCHEMES
from models.mimetic import mimetic
from weight_selection.errors import InputError


def initialize(model: nn.Module, scheme: str) -> None:
    """Draw the weights of a freshly created model anew, in place.

    ``timm`` keeps what timm gave (truncated normal, std 0.02, for the paper's models). ``xavier`` is the uniform
    distribution of Glorot & Bengio (2010), eq. 16; ``kaiming`` the normal one of He et al. (2015), eq. 10 (fan-in,
    ReLU gain). Both apply to every linear and convolution weight, with zero biases; tokens, position embeddings,
    normalisations and LayerScale have no fan and stay as they are. ``mimetic`` changes attention and position
    embeddings only.

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
