"""Weight selection: first weights for a small model, from a larger pretrained one.

The method is that of "Initializing Models with Larger Ones" (ICLR 2024), section 3. It has three steps: select layers,
match components, select elements. First a plan is made from shapes alone; then the plan is applied to the weights.

    from weight_selection import select_weights
    student.load_state_dict(select_weights(teacher, student), strict=False)

Importing this package does not import torch. Its functions import it when they are used.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import TYPE_CHECKING

from weight_selection.errors import InputError, in_python
from weight_selection.options import ELEMENT_SELECTION, LAYER_SELECTION, PROJECTION, SelectionOptions

if TYPE_CHECKING:
    import torch

    from weight_selection.agreement import measure_agreement
    from weight_selection.classifier import fit_classifier

__all__ = [
    "ELEMENT_SELECTION",
    "LAYER_SELECTION",
    "PROJECTION",
    "InputError",
    "fit_classifier",
    "measure_agreement",
    "select_weights",
]
WITH_TORCH = {"fit_classifier": "classifier", "measure_agreement": "agreement"}  # name: the module that has it


def __getattr__(name):
    if name in WITH_TORCH:
        return getattr(import_module(f"weight_selection.{WITH_TORCH[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def select_weights(
    teacher: torch.nn.Module | str | None,
    student: torch.nn.Module | str,
    *,
    example_inputs: torch.Tensor | tuple | dict | None = None,
    student_inputs: torch.Tensor | tuple | dict | None = None,
    classifier: tuple | list | None = None,
    weights: Mapping | str | os.PathLike | None = None,
    layer_selection: str = "first_n",
    element_selection: str = "uniform",
    exclude: tuple | list = (),
    include_head: bool = False,
    include_head_norm: bool = False,
    allow_unused: bool = False,
    seed: int = 0,
    calibration: torch.Tensor | Iterable | str | os.PathLike | None = None,
    calibration_images: int | None = None,
    calibration_size: int | None = None,
    fused_qkv: str = "parts",
) -> dict:
    """Select a student's first weights from a teacher (paper, section 3), or fit them to it by projection.

    Args:
        teacher: any module, or the name of a model as for ``--pretrained_model``. Without ``weights`` its own weights
            are taken. With ``weights`` it may be on the meta device; it may be None if these are of a run of main.py.
        student: a smaller model whose tensors have counterparts in the teacher, or a name. Only its shapes matter: it
            may be on the meta device, but not for a projection.
        example_inputs: inputs of the forward pass: a tensor, a tuple, or a dict of keyword arguments. They are not
            needed for models of timm, torchvision and Hugging Face.
        student_inputs: the same for the student, if its inputs are others.
        classifier: names of the modules that belong to the task and keep the student's own initialisation. ``()``
            selects everything, as ``include_head`` does. Default: the classification head that the library knows. In
            other modules it is the linear layer that gives the output, if the two models' outputs differ in size.
        weights: the teacher's weights, if they are not in the module: a state_dict with the teacher's keys, or a file
            or directory as for ``--pretrained_path``.
        layer_selection: one of ``LAYER_SELECTION`` (section 3.1), applied to the layers of each stage.
        element_selection: of ``ELEMENT_SELECTION`` (section 3.2) or ``PROJECTION``, which runs where the teacher is.
        exclude: of attention, mlp, norm, patch_embed, pos_embed, those that keep the student's own values (Table 10).
        include_head: select the classifier too; both models must have the same classes.
        include_head_norm: select the normalisation inside ConvNeXt's head too, which the paper's release leaves out.
        allow_unused: drop teacher tensors that the student has no place for (LayerScale, registers).
        seed: of the random rules, of noise, and of the draw of images.
        calibration: for a projection: a directory of images, ``"noise"``, a tensor of normalised images (n, channels,
            height, width), or a list or loader of batches: such images, (images, labels), ``{"input_ids": ids}``, ...
        calibration_images: how many images of the directory or of noise; default: 1,024, or all if there are fewer.
        calibration_size: side of these images in pixels; default: the size that the student takes.
        fused_qkv: uniform selection spreads its indices over each of the ``parts`` of fused queries, keys and values,
            or over the ``whole``, as the paper's release does.

    Returns:
        A state_dict for ``student.load_state_dict(..., strict=False)``, in the student's order and the teacher's dtype,
        without the classifier and the excluded components; if DDP or torch.compile wraps it, with their prefixes.

    Raises:
        InputError: the arguments cannot be used together. The message is one line and says what to do.
    """
    from weight_selection.selection import Selection, Student, Teacher, plain_context

    options = SelectionOptions(
        layer_selection,
        element_selection,
        exclude,
        include_head,
        include_head_norm,
        allow_unused,
        seed,
        calibration,
        calibration_images,
        calibration_size,
        classifier,
        fused_qkv,
    )
    try:
        options.check()
        inputs = example_inputs if student_inputs is None else student_inputs
        with plain_context():
            pair = Teacher(teacher, weights=weights, inputs=example_inputs), Student(student, inputs=inputs)
            return Selection(*pair, options).weights()
    except InputError as error:
        raise InputError(in_python(str(error))) from error
