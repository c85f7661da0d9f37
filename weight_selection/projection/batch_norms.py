"""Batch normalisations of the student are brought to what the student computes.

In training a batch normalisation uses the statistics of the batch, in evaluation the running ones. A student whose
running statistics are its teacher's would become another function at the first step of training. So the running
statistics become those of the student's own activations, its gain makes up for that, and its shift gives the wanted
means:

    gain' = gain sqrt((var' + eps) / (var + eps))        shift' = wanted mean                                      (13)
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from weight_selection.projection.equations import Variances


def find_batch_norms(model: nn.Module) -> dict:
    """{key of the gain: module}, of a model's batch normalisations with running statistics, gain and shift."""
    return {
        f"{name}.weight".lstrip("."): module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and None not in (module.running_mean, module.weight, module.bias)
    }


def mean_given(norm: _BatchNorm, mean: Tensor) -> Tensor:
    """The mean that a batch normalisation gives in evaluation mode, from the mean of what it takes, float64 (d,)."""
    return (mean - norm.running_mean.double()) * _slope(norm) + norm.bias.double()


@torch.no_grad()
def fit_batch_norm(norm: _BatchNorm, taken: Variances, wanted: Tensor) -> None:
    """Change a batch normalisation by (13).

    Args:
        norm: of the student; it is changed. In evaluation mode its output deviates from its mean as before.
        taken: what it takes.
        wanted: the mean that it is to give, float64 (d,).
    """
    variance = taken.variance.clamp(min=0)
    norm.weight.copy_(_slope(norm) * (variance + norm.eps).sqrt())
    norm.bias.copy_(wanted)
    norm.running_mean.copy_(taken.mean)
    norm.running_var.copy_(variance)


def given_by(norm: _BatchNorm, x: Tensor) -> Tensor:
    """What a batch normalisation gives in evaluation mode, without an activation that its module may apply too."""
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)


def _slope(norm):
    return norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
