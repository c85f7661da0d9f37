"""CORP (2602.05243): hidden units go, and the others make up for them by ridge regression; the stream stays.

The units that go are an affine function of those that stay, fitted to the teacher's activations h of all tokens in one
pass: B = C_gs (C_ss + ridge)^-1 with the covariances C of gone (g) and staying (s) units. The second dense layer takes
it over: W_s + W_g B, and W_g (mean_g - B mean_s) goes into its bias. Units stay by their energy, E[h^2] |w|^2 with w
the weights that read them.
"""

import torch
import torch.nn as nn

from rivals.vit_widths import strongest

RIDGE = 1e-3  # of the mean variance of the units that stay


@torch.no_grad()
def compensated(teacher: nn.Module, images: torch.Tensor, units: int) -> dict:
    """The weights of a ViT with so many hidden units in each layer, which is the teacher's otherwise."""
    layers = {name: module for name, module in teacher.named_modules() if name.endswith("mlp.fc2")}
    moments = {}

    def measure(layer, inputs):
        hidden = inputs[0].flatten(0, 1).double()
        moments[layer] = hidden.mean(0), hidden.T @ hidden / len(hidden)

    handles = [layer.register_forward_pre_hook(measure) for layer in layers.values()]
    teacher(images)
    for handle in handles:
        handle.remove()
    weights = teacher.state_dict()
    for name, layer in layers.items():
        (mean, moment), read = moments[layer], layer.weight.double()
        stay = strongest(moment.diag() * read.square().sum(0), units)
        gone = torch.ones_like(mean, dtype=torch.bool).index_fill(0, stay, False).nonzero().flatten()
        covariance = moment - mean.outer(mean)
        own, cross = covariance[stay][:, stay], covariance[gone][:, stay]
        up = torch.linalg.solve(own + RIDGE * own.diag().mean() * torch.eye(units), cross, left=False)
        weights[f"{name}.weight"] = (read[:, stay] + read[:, gone] @ up).float()
        weights[f"{name}.bias"] = (layer.bias + read[:, gone] @ (mean[gone] - up @ mean[stay])).float()
        first = name.replace("fc2", "fc1")
        weights |= {f"{first}.{word}": weights[f"{first}.{word}"][stay] for word in ("weight", "bias")}
    return weights
