"""Knowledge distillation, added to the loss of the labels (paper, section 4.4): of logits or of features."""

from collections.abc import Sequence
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import Mlp

from weight_selection.errors import InputError
from weight_selection.sources.teachers import load_into_teacher, normalization, trained_config
from weight_selection.sources.timm_models import check_input_size, create_model
from weight_selection.sources.timm_names import create_pretrained


class Teacher(nn.Module):
    """A frozen timm model. It takes images normalised for the student, and normalises them for itself.

    The means and standard deviations have one value per channel. With ``features`` it returns the features that the
    classifier takes, instead of logits.
    """

    def __init__(
        self,
        model: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        student_mean: Sequence[float],
        student_std: Sequence[float],
        features: bool,
    ):
        super().__init__()
        self.model, self.features = model.requires_grad_(False).eval(), features
        values = (mean, std, student_mean, student_std)
        mean, std, student_mean, student_std = (torch.tensor(value).view(-1, 1, 1) for value in values)
        self.register_buffer("scale", student_std / std)
        self.register_buffer("shift", (student_mean - mean) / std)

    def train(self, mode: bool = True) -> "Teacher":
        """Stay in evaluation mode: a teacher uses no dropout and no batch statistics."""
        return self

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits (images, classes) or features (images, dim) for images normalised for the student."""
        images = images * self.scale + self.shift
        if not self.features:
            return self.model(images)
        return self.model.forward_head(self.model.forward_features(images), pre_logits=True)


class WithProjector(nn.Module):
    """A student with an MLP that maps its features to the teacher's dimension. Only the student outlives training."""

    def __init__(self, student: nn.Module, teacher_dim: int):
        super().__init__()
        self.student = student
        self.projector = Mlp(student.head_hidden_size, teacher_dim, teacher_dim)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (images, classes) and projected features (images, teacher_dim)."""
        tokens = self.student.forward_features(images)
        return self.student.forward_head(tokens), self.projector(self.student.forward_head(tokens, pre_logits=True))


class Loss:
    """The loss of training: L_class, or with a teacher L_class + alpha * distance(teacher, student).

    ``criterion`` computes L_class from (logits, targets). Logits are compared by KL(p_t || p_s), averaged over images
    (equation 1), and features by L1, averaged over images and features (equation 2).
    """

    def __init__(self, criterion: nn.Module, teacher: Teacher | None, alpha: float):
        self.criterion, self.teacher, self.alpha = criterion, teacher, alpha

    def __call__(self, images: torch.Tensor, outputs, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss of a micro-batch, and the distance in it (0 without a teacher); both are scalars.

        ``images`` (images, 3, size, size) are normalised for the student. Its ``outputs`` are logits (images, classes),
        or what ``WithProjector`` returns. ``targets`` are classes (images,) or probabilities (images, classes).
        """
        if self.teacher is None:
            return self.criterion(outputs, targets), torch.zeros((), device=images.device)
        target = self.teacher(images).float()
        if self.teacher.features:
            logits, projected = outputs
            distance = F.l1_loss(projected.float(), target)
        else:
            logits = outputs
            ours, theirs = F.log_softmax(logits.float(), dim=-1), F.log_softmax(target, dim=-1)
            distance = F.kl_div(ours, theirs, reduction="batchmean", log_target=True)
        return self.criterion(logits, targets) + self.alpha * distance, distance


def build_teacher(args: SimpleNamespace, classes: int) -> Teacher:
    """The teacher that the options of main.py describe, with its pretrained weights.

    Its normalisation is that of its timm configuration, or if its weights are a checkpoint of main.py, the one it was
    trained with.

    Raises:
        InputError: there is no such model, it has no weights or they do not fit, or for logit distillation it has
            another number of classes than the data set.
    """
    features = args.distillation == "feature"
    kwargs = {**args.teacher_kwargs, "num_classes": 0 if features else classes, "input_size": args.input_size}
    if args.teacher_path is not None:
        model = create_model(args.teacher, option="--teacher", **kwargs)
        load_into_teacher(model, args.teacher_path, "--teacher_path")
    else:
        model = create_pretrained(args.teacher, kwargs, "--teacher", "give --teacher_path FILE")
        if not features and model.pretrained_cfg["num_classes"] != classes:  # then timm made a random classifier
            raise InputError(
                f"--teacher {args.teacher}: has {model.pretrained_cfg['num_classes']} classes, {args.data_set} has "
                f"{classes}; name one that was trained on it with --teacher_path, or use --distillation feature"
            )
    check_input_size(model, args.input_size, f"--teacher {args.teacher}")
    student = normalization(args.imagenet_default_mean_and_std)
    config = trained_config(model, args.teacher_path, "--teacher_path")
    return Teacher(model, config["mean"], config["std"], *student, features)
