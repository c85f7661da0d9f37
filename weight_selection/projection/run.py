"""One projection: whatever can be refused is refused before a weight is read; then both models run on the images."""

import os
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from tqdm import tqdm

from weight_selection.agreement import measure_agreement
from weight_selection.errors import InputError
from weight_selection.options import SelectionOptions
from weight_selection.plan import Plan, plan_selection
from weight_selection.projection.images import Calibration, check_batches, image_shape
from weight_selection.projection.maps import check_heads
from weight_selection.projection.project import check_positions, describer, load_teacher, match_geometry, project
from weight_selection.projection.symmetries import Symmetries
from weight_selection.projection.symmetry_check import check_streams
from weight_selection.projection.traced_model import TracedModel, paired_groups
from weight_selection.sources.facts import library_of
from weight_selection.sources.teachers import normalization_words, trained_config

RESIZING = {"interpolation": "bicubic", "crop_pct": 0.875}  # of images, where no library says it


class Projection:
    """What a projection needs beyond a plan.

    Args:
        teacher, student: who they are (``selection.Teacher`` and ``Student``).
        skeletons: both models as they were traced, the teacher of the student's geometry; weights are not needed.
        structures: of both.
        plan: of the selection.
        options: checked.

    Raises:
        InputError: no stream of the teacher can be rotated, heads would have to be merged, or images cannot be used.
    """

    def __init__(self, teacher, student, skeletons: tuple, structures: tuple, plan: Plan, options: SelectionOptions):
        self.teacher, self.student, self.structures = teacher, student, structures
        self.plan, self.options = plan, options
        self.symmetries = Symmetries(skeletons[0], structures[0].neurons)
        rotate = options.element_selection == "project"
        if rotate:
            name = teacher.model if isinstance(teacher.model, str) else type(teacher.model).__name__
            check_streams(self.symmetries, name)
        self._treatments = {
            our: self.symmetries.treatment(their, rotate)
            for our, their in paired_groups(plan.selected).items()
            if structures[0].neurons.groups[their].size != structures[1].neurons.groups[our].size
        }
        self.images = None
        if options.calibration is not None:
            self.images = self._images(skeletons[0])
            check_positions(plan.selected, *structures)
        traced = TracedModel(skeletons[0], structures[0], self.symmetries), TracedModel.of(skeletons[1], structures[1])
        check_heads(plan.selected, *traced)
        self.device = _device(teacher.model)
        self._classifier, self._not_comparable = _left_out_classifier(plan, structures, options)
        self._fitted = None

    def weights(self, weights: Mapping, origin: str) -> dict:
        """The student's first weights on the CPU: its state_dict without what is left out.

        Args:
            weights: the teacher's state_dict.
            origin: what named them, for errors.

        Raises:
            InputError: as ``project``, or the device has too little memory.
        """
        with torch.autocast(torch.device(self.device).type, enabled=False):  # the caller may train in mixed precision
            teacher, student = (who.own().to(self.device).eval() for who in (self.teacher, self.student))
            types = load_teacher(teacher, self.structures[0], weights, origin, self.options.selects_all)
            match_geometry(teacher, student)
            student.to(next(teacher.parameters()))
            self._fitted = teacher, student = tuple(map(TracedModel.of, (teacher, student), self.structures))
            entries = self.plan.selected | self._classifier
            rule = self.options.element_selection
            try:
                made = project(entries, teacher, student, self.images, rule, self._classifier)
            except torch.OutOfMemoryError as error:
                raise InputError(
                    f"--calibration: {self.device} has too little memory to hold what all images give in one layer; "
                    f"give fewer images ({error})"
                ) from error
        return {key: value.to(types[entries[key].teacher_key]) for key, value in made.items()}

    def agreement(self) -> tuple:
        """How well the student, with its teacher's classifier, agrees with its teacher. Call it after ``weights``.

        Returns:
            (the percentage of held-out images on which both choose the same class, the number of these images).

        Raises:
            InputError: the classifiers cannot be compared, or there are no images to hold out.
        """
        (teacher, student), self._fitted = self._fitted, None
        if self._not_comparable:
            raise InputError(self._not_comparable)
        weights = teacher.model.state_dict()
        if self._classifier and not any(weights[entry.teacher_key].any() for entry in self._classifier.values()):
            raise InputError("the teacher's weights have no classifier")
        images = self.images.held_out()
        return measure_agreement(teacher.model, student.model, map(teacher.placed, images)), images.count

    def provenance(self) -> dict:
        """What the provenance file says about the images."""
        return {
            "calibration": str(self.options.calibration),
            "calibration_images": self.images.count,
            "calibration_size": list(self.images.size[1:]),
            "calibration_sha256": self.images.sha256,
            "calibration_device": str(self.device),
        }

    def describer(self) -> Callable:
        """A function that says in words how a plan's entry is made."""
        return describer(self.plan.selected, self.symmetries.dense, *self.structures, self._treatments)

    def describe_group(self, number: int) -> str:
        """What is done with a group of the student's, in words."""
        return self._treatments.get(number, "all")

    def _images(self, teacher):
        options, (whose, facts) = self.options, (type(teacher).__name__, self.structures[0].facts)
        inputs, (count, side) = self.structures[1].facts.inputs, (options.calibration_images, options.calibration_size)
        if not isinstance(options.calibration, (str, os.PathLike)):
            return check_batches(options.calibration, inputs, count, side)
        shape = image_shape(inputs)
        if shape is None:
            raise InputError(
                f"--calibration {options.calibration}: a {whose} takes more than images; calibrate it in Python with "
                'batches of its inputs: select_weights(..., calibration=[{"input_ids": ...}, ...])'
            )
        if library_of(teacher) == "timm":
            config = trained_config(teacher, self.teacher.path, self.teacher.weights_option)
        elif facts.normalization is not None:
            config = dict(zip(("mean", "std"), facts.normalization, strict=True)) | RESIZING
            tqdm.write(f"calibration: images are normalised with {normalization_words(config['mean'], config['std'])}")
        else:
            raise InputError(
                f"--calibration {options.calibration}: a {whose} does not say how its images are normalised; give "
                "normalised images as tensors"
            )
        return Calibration(options.calibration, count, side, shape[1:], config, options.seed)


def _left_out_classifier(plan, structures, options):
    """The classifier that a plan leaves out, and that the student could have.

    Returns:
        ({its key: its entry}, None); if there is none, ({}, why student and teacher cannot be compared, or None).
    """
    student = structures[1]
    if student.architecture.classifier is not None and not any(map(student.in_classifier, student.shapes)):
        return {}, "the student has no classifier"
    if not any(entry.role == "classifier" for entry in plan.entries):
        return {}, None
    everything = replace(options, include_head=False, include_head_norm=False, classifier=())
    try:
        whole = plan_selection(*structures, everything)
    except InputError as error:
        return {}, str(error).removeprefix("--include_head: ")
    return {key: entry for key, entry in whole.selected.items() if key not in plan.selected}, None


def _device(model):
    """Where to work: where a user's module is; a name goes to the GPU if there is one."""
    if isinstance(model, str):
        return "cuda" if torch.cuda.is_available() else "cpu"
    return next(model.parameters()).device
