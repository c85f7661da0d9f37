"""Torch-Pruning (DepGraph, 2301.12900): structured pruning of the teacher down to the student's widths, in one step.

Needs the package torch-pruning; README.md says how to get it. Of every group of coupled channels those of least
importance go: by the L2 norm of their weights; by ``taylor``, |weight x gradient| (after 1906.10771); or by
``hessian``, the weight's square times the mean square of its gradient over single images (optimal brain damage). The
loss is the cross-entropy of the training images, behind a classifier in closed form on the teacher's features.
"""

import copy

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import Attention

from rivals.arms import Pair, without_classifier
from weight_selection import fit_classifier

BATCH_SIZE = 64


def prune(pair: Pair, criterion: str) -> dict:
    """The weights of the most important channels by ``criterion``: l2, taylor or hessian."""
    import torch_pruning

    kinds = {"l2": "GroupMagnitude", "taylor": "GroupTaylor", "hessian": "GroupHessian"}
    importance = getattr(torch_pruning.importance, kinds[criterion] + "Importance")()
    teacher, student = copy.deepcopy(pair.teacher), pair.student.get_submodule
    if criterion != "l2":
        classes = int(pair.labels.max()) + 1
        teacher.reset_classifier(classes)
        batches = list(zip(pair.images.split(BATCH_SIZE), pair.labels.split(BATCH_SIZE), strict=True))
        fit_classifier(teacher, batches, classes)
        if criterion == "taylor":
            for images, labels in batches:
                F.cross_entropy(teacher(images), labels, reduction="sum").backward()
        else:
            squares = squared_gradients(teacher, pair.images, pair.labels)
            # The package's own sum keeps the last image's only (1.6.1).
            importance._accu_grad, importance._counter = squares, dict.fromkeys(squares, len(pair.labels))
    pruner = torch_pruning.pruner.BasePruner(
        teacher,
        torch.zeros(1, *pair.student.pretrained_cfg["input_size"]),
        importance,
        pruning_ratio_dict={
            layer: 1 - len(student(name).weight) / len(layer.weight)
            for name, layer in teacher.named_modules()
            if isinstance(layer, (nn.Linear, nn.Conv2d))
        },
        num_heads={layer.qkv: layer.num_heads for layer in teacher.modules() if isinstance(layer, Attention)},
        ignored_layers=[teacher.get_classifier()],
    )
    pruner.step()
    return without_classifier(teacher)


def squared_gradients(model, images, labels) -> dict:
    """{parameter: the sum over images of its gradient's squares}."""
    squares = {parameter: torch.zeros_like(parameter) for parameter in model.parameters()}
    for image, label in zip(images, labels, strict=True):
        model.zero_grad()
        F.cross_entropy(model(image[None]), label[None]).backward()
        for parameter, total in squares.items():
            total += parameter.grad**2
    return squares
