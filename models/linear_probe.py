"""Linear probing: a linear classifier on frozen features (paper, Table 9; recipe of MAE, He et al. 2022)."""

import torch.nn as nn
from timm.layers import trunc_normal_

from weight_selection.errors import InputError


def make_linear_probe(model: nn.Module, name: str) -> None:
    """Freeze a timm model and give it a new classifier, in place: batch normalisation, then a linear layer.

    The normalisation has no weights. It brings all features to one scale, so that one learning rate suits them all. The
    linear layer starts from a truncated normal distribution (std 0.01), and its biases from zero.

    Raises:
        InputError: the classifier is not a single linear layer; names the model by ``name``.
    """
    classifier = model.get_classifier()
    if not isinstance(classifier, nn.Linear):
        raise InputError(f"--linear_probe true: the classifier of {name} is a {type(classifier).__name__}, not linear")
    model.requires_grad_(False)
    linear = nn.Linear(classifier.in_features, classifier.out_features)
    trunc_normal_(linear.weight, std=0.01)
    nn.init.zeros_(linear.bias)
    path = model.pretrained_cfg["classifier"]
    model.set_submodule(path, nn.Sequential(nn.BatchNorm1d(classifier.in_features, affine=False, eps=1e-6), linear))
