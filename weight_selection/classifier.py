"""A classifier in closed form: ridge regression from a model's features of the training images to their labels.

First weights that already have good features are spoilt by the first gradients of a random classifier. A classifier
that fits them from the start is worth several points then. Beyond the paper.
"""

import contextlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn as nn
import torch.nn.functional as F

from weight_selection.errors import InputError
from weight_selection.modules import evaluating, run_forward
from weight_selection.projection.images import inputs_and_labels, placed
from weight_selection.sources.facts import facts_of, unwrapped

HELD_OUT = 0.2  # share of the images, drawn by their numbers, that choose ridge and scale
MOST_HELD_OUT = 10_000  # images
# Of several that are as good, the first is taken.
RIDGES = [10 ** (power / 2) for power in range(4, -11, -1)]  # in units of the features' mean variance
SCALES = [2 ** (power / 2) for power in range(-4, 25)]  # of the logits


@dataclass(frozen=True)
class FittedClassifier:
    """A linear classifier in closed form.

    Attributes:
        weight: float32 (classes, channels).
        bias: float32 (classes,).
        ridge: in units of the features' mean variance.
        scale: of the logits; without it they estimate the probability of each class.
        held_out_acc1: accuracy in percent on the held-out images of the classifier that the others gave.
        held_out_loss: its cross-entropy there.
        images: number of images in all.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    ridge: float
    scale: float
    held_out_acc1: float
    held_out_loss: float
    images: int

    def summary(self) -> dict:
        """All but the weights."""
        return {name: value for name, value in vars(self).items() if name not in ("weight", "bias")}


@dataclass
class RidgeSums:
    """What ridge regression needs of the features (images, channels) and labels, added up batch by batch.

    A fifth of the images is held out, up to ``MOST_HELD_OUT``. Several processes can share them: process r of n
    takes images r, r + n, ...

    Attributes:
        classes: their number.
        first, step: number of the first image that this object gets, and from one image to the next.
    """

    classes: int
    first: int = 0
    step: int = 1
    images: int = 0
    fitted: list | None = None  # count, sums, products and sums by class, of the images that are not held out
    held: list = field(default_factory=list)  # (features, labels) of those that are

    def add(self, features: torch.Tensor, labels: torch.Tensor) -> None:
        """Add a batch: features (images, channels), labels int64 (images,) from 0 up."""
        numbers = self.first + self.step * torch.arange(self.images, self.images + len(labels), device=labels.device)
        self.images += len(labels)
        drawn = numbers * 2654435761 % 2**32 / 2**32  # Knuth's hash: evenly from 0 to 1, whatever the labels' order
        out = (drawn < HELD_OUT) & (numbers < MOST_HELD_OUT / HELD_OUT)
        features = features.double()
        self.held.append((features[out].float().cpu(), labels[out].cpu()))
        self._take(_moments(features[~out], labels[~out], self.classes))

    def _take(self, moments):
        self.fitted = moments if self.fitted is None else _sums(self.fitted, moments)

    def add_all(self, others: list["RidgeSums"]) -> None:
        """Add what other objects were given."""
        for other in others:
            self.images += other.images
            self.held += other.held
            if other.fitted is not None:
                self._take(other.fitted)

    def solve(self) -> FittedClassifier:
        """Choose ridge and scale by the held-out images' cross-entropy, then fit all images with them.

        n images cannot tell losses below 1 / n apart. Otherwise the logits of classes that are easy to tell apart would
        grow without a bound, and with them the gradients of training.

        Raises:
            InputError: there are too few images, or a feature is not finite.
        """
        features, labels = (torch.cat(values) for values in zip(*self.held, strict=True))
        if not len(labels) or self.fitted[0] < 2:
            raise InputError(f"batches: {self.images} images are too few to fit a classifier; give more")
        features = features.double()
        everything = _sums(self.fitted, _moments(features, labels, self.classes))
        if not all(torch.isfinite(value).all() for value in everything):
            raise InputError("batches: the model's features are not finite; check its weights and the inputs")
        best, least = None, 1 / len(labels)
        for ridge, (weight, bias) in zip(RIDGES, _solutions(self.fitted, RIDGES), strict=True):
            logits = features @ weight.T + bias
            accuracy = 100 * (logits.argmax(1) == labels).double().mean().item()
            for scale in SCALES:
                loss = F.cross_entropy(scale * logits, labels).item()
                if best is None or max(loss, least) < max(best[0], least):
                    best = loss, ridge, scale, accuracy
        loss, ridge, scale, accuracy = best
        weight, bias = ((scale * part).float() for part in next(_solutions(everything, [ridge])))
        return FittedClassifier(weight, bias, ridge, scale, accuracy, loss, self.images)


def _moments(features, labels, classes):
    """Count, sum (channels,), products (channels, channels), sums by class (classes, channels), counts (classes,)."""
    one_hot = F.one_hot(labels, classes).to(features.dtype)
    values = [
        features.new_tensor(len(labels)),
        features.sum(0),
        features.T @ features,
        one_hot.T @ features,
        one_hot.sum(0),
    ]
    return [value.cpu() for value in values]


def _sums(moments, others):
    return [a + b for a, b in zip(moments, others, strict=True)]


def _solutions(moments, ridges) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Weight (classes, channels) and bias (classes,) of the regression to one-hot labels, for each ridge."""
    count, total, products, by_class, counts = moments
    mean, shares = total / count, counts / count
    covariance = products / count - mean.outer(mean)
    cross = by_class / count - shares.outer(mean)
    variances, basis = torch.linalg.eigh(covariance)
    variances = variances.clamp(min=0)
    for ridge in ridges:
        weight = cross @ basis / (variances + ridge * variances.mean().clamp(min=1e-30)) @ basis.T
        yield weight, shares - weight @ mean


def fit_classifier(model: nn.Module, batches: Iterable, num_classes: int, classifier: str | None = None) -> dict:
    """Set a model's linear classifier in closed form, in place, from its features of the training images.

    Ridge regression to one-hot labels, in one pass; its ridge and the scale of its logits are those that give a
    fifth of the images, which is held out first, the least cross-entropy.

        student.load_state_dict(select_weights(teacher, student), strict=False)
        fit_classifier(student, train_loader, num_classes=10)   # images as for testing: no augmentation

    Batch normalisations of selected weights have the teacher's statistics. Before, give them the student's, with
    PyTorch's ``torch.optim.swa_utils.update_bn(train_loader, student)``.

    Args:
        model: any module with a linear classifier; runs in evaluation mode on the device that it is on.
        batches: of (inputs, labels), labels int64 (images,); inputs a tensor, or a dict of keyword arguments. Such a
            dict may also hold the labels itself, as ``labels`` or ``label``.
        num_classes: outputs of the classifier.
        classifier: the name of the linear layer, or of a module around it. Default: the only one with so many outputs.

    Returns:
        {ridge, in units of the features' mean variance; scale; held_out_acc1 in percent and held_out_loss of the
        classifier that the other images gave; images, their number}.

    Raises:
        InputError: no such layer, several, or it gets more than a vector for each image; no images, or no labels.
    """
    model = unwrapped(model)
    layer, like = classifier_layer(model, num_classes, classifier), next(model.parameters())
    sums = RidgeSums(num_classes)
    with evaluating(model), torch.no_grad(), features_of(layer) as caught:
        for batch in batches:
            inputs, labels = inputs_and_labels(batch, "batches")
            if labels is None:
                raise InputError("batches: one has no labels; give (inputs, labels), or dicts with labels")
            inputs = placed(inputs, like)
            run_forward(model, inputs if isinstance(inputs, dict) else (inputs,))
            features = caught.pop()
            _check_labels(labels, len(features), num_classes)
            sums.add(features, labels.to(like.device))
    if not sums.images:
        raise InputError("batches: no images in them; give a loader of the training images")
    fitted = sums.solve()
    set_classifier(layer, fitted)
    return fitted.summary()


def _check_labels(labels, images, classes):
    whole = not labels.is_floating_point() and not labels.is_complex()
    if labels.shape != (images,) or not whole or not ((labels >= 0) & (labels < classes)).all():
        raise InputError(
            f"batches: labels of {labels.dtype} {tuple(labels.shape)} for {images} images; give each a whole "
            f"number from 0 to {classes - 1}"
        )


def classifier_layer(model: nn.Module, num_classes: int, name: str | None = None) -> nn.Linear:
    """The linear layer that is a model's classifier: of or in that name, or the only one with so many outputs.

    Raises:
        InputError: there is none, or there are several.
    """
    linear = {key: module for key, module in model.named_modules() if isinstance(module, nn.Linear)}
    found = [key for key, module in linear.items() if module.out_features == num_classes]
    if name is None and len(found) > 1 and (pattern := facts_of(model).architecture.classifier):
        found = [key for key in found if re.search(pattern, f"{key}.weight")]
    elif name is not None:
        found = [key for key in found if f"{key}.".startswith(f"{name}.")]
    if len(found) != 1:
        has = f"has {len(found)}: {', '.join(found)}" if found else "has none"
        raise InputError(
            f"classifier={name}: wanted a linear layer of {num_classes} outputs, and the model {has}; name one"
        )
    return linear[found[0]]


@contextlib.contextmanager
def features_of(layer: nn.Linear) -> Iterator[list]:
    """Within the block, each forward pass appends the layer's input (images, channels) to the list."""
    caught = []

    def catch(module, inputs):
        if inputs[0].ndim != 2:
            raise InputError(
                f"classifier: gets {tuple(inputs[0].shape)}, not a vector for each image; name another layer"
            )
        caught.append(inputs[0].detach())

    with layer.register_forward_pre_hook(catch):
        yield caught


def set_classifier(layer: nn.Linear, fitted: FittedClassifier) -> None:
    """Copy a fitted classifier into a linear layer; without a bias, the layer goes without."""
    with torch.no_grad():
        layer.weight.copy_(fitted.weight)
        if layer.bias is not None:
            layer.bias.copy_(fitted.bias)
