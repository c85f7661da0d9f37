"""What every arm gets, and the table of the arms.

An arm is a function of a ``Pair`` that returns the student's first weights: its state_dict without the classifier.
Each file here holds one source's arms and names it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from importlib import import_module
from pathlib import Path

import torch
import torch.nn as nn
from timm.data import create_transform
from torchvision.datasets import ImageFolder

from weight_selection.options import CALIBRATION_IMAGES
from weight_selection.projection.images import draw

TEACHER = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
ARMS = {  # name: (module in this directory, function, its further arguments)
    "project": ("selected", "select", {"rule": "project"}),
    "selection": ("selected", "select", {"rule": "uniform"}),
    "taylor": ("pruned", "prune", {"criterion": "taylor"}),
    "minitron": ("minitron", "prune", {}),
    "greedy": ("selected", "select", {"rule": "greedy"}),
    "random": ("random_weights", "random", {"scheme": "timm"}),
    "front": ("front", "front", {}),
    "hessian": ("pruned", "prune", {"criterion": "hessian"}),
    "l2": ("pruned", "prune", {"criterion": "l2"}),
    "subcloning": ("subcloning", "subclone", {}),
    "consecutive": ("selected", "select", {"rule": "consecutive"}),
    "random_consistent": ("selected", "select", {"rule": "random"}),
    **{
        f"{name}_{layers}": ("selected", "select", {"rule": rule, "layers": layers})
        for name, rule in {"project": "project", "greedy": "greedy", "selection": "uniform"}.items()
        for layers in ("uniform", "quadratic")
    },
    "kaiming": ("random_weights", "random", {"scheme": "kaiming"}),
    "teacher": ("selected", "keep", {}),
}
ABLATIONS = {  # project and greedy from other images, or with a part taken out; trained at the settings of the whole
    **{f"project_{count}": ("selected", "select", {"rule": "project", "count": count}) for count in (16, 64, 256)},
    **{f"{rule}_noise": ("selected", "select", {"rule": rule, "noise": True}) for rule in ("project", "greedy")},
    **{f"{rule}_others": ("selected", "select_from_others", {"rule": rule}) for rule in ("project", "greedy")},
    **{
        f"{rule}_without_{part}": ("selected", "select_without", {"rule": rule, "part": part})
        for rule, parts in {
            "project": ("least_squares", "frame", "units", "heads"),
            "greedy": ("least_squares", "coordinates", "weights"),
        }.items()
        for part in parts
    },
}
CEILING = "teacher"  # no arm: the whole teacher, which is a larger model
WHOLE = ("embed_dim=192", "num_heads=3")  # its --model_kwargs
FINAL = ("project", "selection", "greedy", "random")  # these and the best rival go on to the test images


@dataclass
class Pair:
    """A teacher, a student, and the training images that an arm may look at.

    Attributes:
        teacher: timm's model with trained weights, in evaluation mode, at the student's image size.
        student: timm's model with random weights.
        folder: class folders of the training images.
        seed: of whatever an arm draws.
        count: of the training images that it may look at, at most.
        others: class folders of another data set's images.
    """

    teacher: nn.Module
    student: nn.Module
    folder: Path
    seed: int
    count: int = CALIBRATION_IMAGES
    others: Path | None = None

    @cached_property
    def _drawn(self):
        dataset, config = ImageFolder(self.folder), self.teacher.pretrained_cfg
        words = {word: config[word] for word in ("mean", "std", "interpolation", "crop_pct")}
        transform = create_transform(self.student.pretrained_cfg["input_size"], **words)
        chosen = draw(len(dataset), min(self.count, len(dataset)), self.seed)
        images, labels = zip(*(dataset[index] for index in chosen), strict=True)
        return torch.stack([transform(image) for image in images]), torch.tensor(labels)

    @property
    def images(self) -> torch.Tensor:
        """Training images as the teacher takes them, float32 (count, 3, side, side); read at their first use."""
        return self._drawn[0]

    @property
    def labels(self) -> torch.Tensor:
        """Their classes, int64 (count,)."""
        return self._drawn[1]


def arm(name: str) -> Callable[[Pair], dict]:
    """The function that makes an arm's first weights."""
    module, function, arguments = (ARMS | ABLATIONS)[name]
    return partial(getattr(import_module(f"rivals.{module}"), function), **arguments)


def without_classifier(model: nn.Module) -> dict:
    """A model's state_dict that leaves the classifier to main.py, as weight_selection.py's do."""
    classifier = model.pretrained_cfg["classifier"]
    return {key: value.clone() for key, value in model.state_dict().items() if not key.startswith(f"{classifier}.")}
