"""Small pairs of a teacher and a student, and weights that say where they are."""

from dataclasses import dataclass

import torch

from helpers import meta, words
from weight_selection.sources.timm_models import create_model


@dataclass(frozen=True)
class Pair:
    """A teacher and a student, each a name and its arguments; the file their command writes; the student's head."""

    teacher: str
    large: dict
    student: str
    small: dict
    file: str
    head: list

    def models(self, **changes):
        return meta(self.teacher, **self.large), meta(self.student, **{**self.small, **changes})

    def student_model(self):
        return create_model(self.student, **self.small)

    def command(self, output, teacher_file, *more):
        """Words of the command line; of an option given twice the last counts."""
        named = ["--pretrained_model", self.teacher, "--teacher_kwargs", *words(self.large)]
        named += ["--student", self.student, "--student_kwargs", *words(self.small)]
        return [*named, "--output_dir", output, "--pretrained_path", teacher_file, *more]


IMAGE = {"img_size": 32, "num_classes": 5}

PAIRS = {
    "vit": Pair(
        "vit_small",
        {"embed_dim": 48, "depth": 4, "num_heads": 3, **IMAGE},
        "vit_tiny",
        {"embed_dim": 24, "depth": 2, "num_heads": 3, **IMAGE},
        "vit.pth",
        ["head.weight", "head.bias"],
    ),
    "convnext": Pair(
        "convnext_tiny",
        {"depths": (2, 1, 3, 1), "dims": (8, 16, 24, 32), "num_classes": 5},
        "convnext_femto",
        {"depths": (1, 1, 2, 1), "dims": (4, 8, 12, 16), "num_classes": 5},
        "convnext.pth",
        ["head.norm.weight", "head.norm.bias", "head.fc.weight", "head.fc.bias"],
    ),
}

VIT, CONVNEXT = PAIRS["vit"], PAIRS["convnext"]

RESNET = Pair(
    "resnet18",
    {"channels": (16, 32, 48, 64), "layers": (2, 2, 3, 1), "num_classes": 5},
    "resnet18",
    {"channels": (8, 16, 24, 32), "layers": (1, 2, 2, 1), "num_classes": 5},
    "resnet.pth",
    ["fc.weight", "fc.bias"],
)


def numbered(model):
    """Weights whose values say where they are: of n values each of 1..n occurs once, shuffled so that norms differ."""
    generator = torch.Generator().manual_seed(0)
    shuffled = {key: torch.randperm(value.numel(), generator=generator) for key, value in model.state_dict().items()}
    return {key: (shuffled[key] + 1.0).reshape(value.shape) for key, value in model.state_dict().items()}


def origins(source, values):
    """Where in ``source``, as ``numbered`` made it, each of ``values`` was: one tensor of indices per dimension."""
    return torch.unravel_index(source.flatten().argsort()[values.long() - 1], source.shape)
