"""Knowledge distillation beside the labels (paper, section 4.4): equation 1 on logits, equation 2 on features."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import Mlp

from input_pipeline.transforms import normalization
from weight_selection.errors import InputError
from weight_selection.sources.teachers import create_pretrained, load_into_teacher, trained_config
from weight_selection.sources.timm_models import check_input_size, create_model


class Teacher(nn.Module):
    """A frozen pretrained model that sees the student's images under its own normalisation.

    Args:
        model: timm model; it stays in evaluation mode.
        mean, std: that it was trained with, one value per channel.
        student_mean, student_std: that the images come with.
        features: give what its classifier sees instead of logits.
    """

    def __init__(self, model: nn.Module, mean, std, student_mean, student_std, features: bool):
        super().__init__()
        self.model, self.features = model.requires_grad_(False).eval(), features
        mean, std, student_mean, student_std = (
            torch.tensor(value).view(-1, 1, 1) for value in (mean, std, student_mean, student_std)
        )
        self.register_buffer("scale", student_std / std)
        self.register_buffer("shift", (student_mean - mean) / std)

    def train(self, mode: bool = True):
        """Stay in evaluation mode: dropout and batch statistics have no place in a teacher."""
        return self

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits (images, classes) or features (images, dim) for images normalised for the student."""
        images = images * self.scale + self.shift
        if not self.features:
            return self.model(images)
        return self.model.forward_head(self.model.forward_features(images), pre_logits=True)


class WithProjector(nn.Module):
    """A student, and an MLP that takes its features to the teacher's dimension; only the student is kept.

    Calling it gives (logits, projected features).
    """

    def __init__(self, student: nn.Module, teacher_dim: int):
        super().__init__()
        self.student = student
        self.projector = Mlp(student.head_hidden_size, teacher_dim, teacher_dim)

    def forward(self, images: torch.Tensor) -> tuple:
        tokens = self.student.forward_features(images)
        return self.student.forward_head(tokens), self.projector(self.student.forward_head(tokens, pre_logits=True))


class Loss:
    """L_class, or with a teacher L_class + alpha * distance(teacher, student).

    Args:
        criterion: L_class, of (logits, targets).
        teacher: None, or gives logits, compared by KL(p_t || p_s), the mean over images (equation 1), or gives
            features, compared by L1, the mean over images and features (equation 2).
        alpha: weight of the distance.
    """

    def __init__(self, criterion: nn.Module, teacher: Teacher | None, alpha: float):
        self.criterion, self.teacher, self.alpha = criterion, teacher, alpha

    def __call__(self, images, outputs, targets) -> tuple:
        """Loss of a micro-batch, and the distance in it (0 without a teacher).

        ``outputs`` are the student's logits for the images, or what a ``WithProjector`` gives.
        """
        if self.teacher is None:
            return self.criterion(outputs, targets), torch.zeros((), device=images.device)
        taught = self.teacher(images).float()
        if self.teacher.features:
            logits, projected = outputs
            distance = F.l1_loss(projected.float(), taught)
        else:
            logits = outputs
            ours, theirs = F.log_softmax(logits.float(), dim=-1), F.log_softmax(taught, dim=-1)
            distance = F.kl_div(ours, theirs, reduction="batchmean", log_target=True)
        return self.criterion(logits, targets) + self.alpha * distance, distance


def build_teacher(args, classes: int) -> Teacher:
    """The teacher that the options of main.py describe, with its pretrained weights.

    It is normalised for as its timm configuration says; a checkpoint of main.py says itself what it was trained under.

    Args:
        args: options.
        classes: of the data set; a teacher of logits must have as many.

    Raises:
        InputError: unknown name, no or unfitting weights, another number of classes.
    """
    features = args.distillation == "feature"
    kwargs = {**args.teacher_kwargs, "num_classes": 0 if features else classes}
    if args.teacher_path is not None:
        model = create_model(args.teacher, option="--teacher", input_size=args.input_size, **kwargs)
        load_into_teacher(model, args.teacher_path, "--teacher_path")
    else:
        kwargs["input_size"] = args.input_size
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
