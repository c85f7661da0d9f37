"""How near a student is to its teacher before any training: the share of images on which both choose the same class.

It needs no labels. Measure it on images that the student was not calibrated on. Beyond the paper.
"""

from collections.abc import Iterable, Mapping

import torch
import torch.nn as nn
from torch import Tensor

from weight_selection.errors import InputError
from weight_selection.modules import evaluating, run_forward
from weight_selection.projection.images import BATCH_SIZE, inputs_and_labels, inputs_with, placed
from weight_selection.sources.facts import facts_of, unwrapped


@torch.no_grad()
def measure_agreement(teacher: nn.Module, student: nn.Module, images: Tensor | Iterable) -> float:
    """The percentage of images on which the top-1 class of student and teacher is the same.

        student.load_state_dict(select_weights(teacher, student, include_head=True))
        measure_agreement(teacher, student, images)

    Args:
        teacher, student: classifiers of the same classes. Each runs in evaluation mode on the device that it is on.
        images: normalised images (n, channels, height, width), or an iterable of batches of these, such as a loader.
            A batch may have labels, which are not used: (images, labels), or a dict of the model's inputs.

    Raises:
        InputError: there are no images, or the models do not give a score for each of the same classes.
    """
    images = images.split(BATCH_SIZE) if isinstance(images, Tensor) else images
    same = []
    for batch in images:
        (theirs, classes), (ours, others) = (top1_classes(model, batch) for model in (teacher, student))
        if classes != others:
            raise InputError(f"the teacher has {classes} classes, the student {others}; give both the same")
        same.append(theirs.cpu() == ours.cpu())
    if not sum(map(len, same)):
        raise InputError("images: there are none; give some")
    return 100 * torch.cat(same).double().mean().item()


@torch.no_grad()
def top1_classes(model: nn.Module, batch: Tensor | Mapping) -> tuple[Tensor, int]:
    """The class of the largest score for each of the inputs, int64 (n,); and the number of classes.

    Args, Raises: as ``measure_agreement``.
    """
    model = unwrapped(model)
    like = next(model.parameters())
    batch = placed(inputs_and_labels(batch, "images")[0], like)
    with evaluating(model), torch.autocast(like.device.type, enabled=False):  # the caller may train in mixed precision
        output = run_forward(model, inputs_with(facts_of(model).inputs or (batch,), batch))
    scores = getattr(output, "logits", output)  # Hugging Face's models give more than scores
    if not isinstance(scores, Tensor) or scores.ndim != 2:
        found = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise InputError(f"a {type(model).__name__} gives {found}, not a score (n, classes) for each class")
    return scores.argmax(1), scores.shape[1]
