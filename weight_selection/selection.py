"""One selection, from the request to the weights. The command and ``select_weights`` are both thin callers of it.

Teacher, Student     who they are: a module, or a name and arguments
Selection            both traced once, and the plan; refuses at once what cannot work
Selection.weights    the student's first weights, by a rule of the paper or by projection
"""

import copy
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch.nn as nn

from weight_selection.apply import apply_plan
from weight_selection.errors import InputError
from weight_selection.options import SelectionOptions
from weight_selection.plan import plan_selection, structure_of
from weight_selection.sources.facts import check_classifier, unwrapped
from weight_selection.tracing.tracer import skeleton_of


@dataclass
class Teacher:
    """The model that weights come from.

    Attributes:
        model: a module, or a timm name.
        kwargs: of ``create_model``, for a name.
        weights: a state_dict or a file, if they are not the model's own.
        option, weights_option: what named the model and its weights, for errors.
        remedy: what the user can do if the weights cannot be had, for errors.
        inputs: example inputs, as of ``facts_of``; None: those that the model says.
    """

    model: nn.Module | str
    kwargs: dict = field(default_factory=dict)
    weights: Mapping | str | os.PathLike | None = None
    option: str = "teacher"
    weights_option: str = "weights"
    remedy: str = "give a loaded model, or weights"
    inputs: object = None

    def __post_init__(self):
        self.model = _checked_model(self.model, self.option)
        if self.weights is not None and not isinstance(self.weights, (Mapping, str, os.PathLike)):
            raise InputError(
                f"{self.weights_option}={self.weights!r:.80}: give a state_dict (names with a tensor each), or a file"
            )
        if self.weights is None and not isinstance(self.model, str) and _on_meta(self.model):
            raise InputError(f"{self.option}: is on the meta device, which has no weights; give them with weights=")

    @property
    def file(self) -> Path | None:
        """The file that was named, if one was."""
        return Path(self.weights) if isinstance(self.weights, (str, os.PathLike)) else None

    def create(self, device="cpu") -> nn.Module:
        """The teacher; a name is created there with random weights."""
        if isinstance(self.model, str):
            from weight_selection.sources.timm_models import create_model

            return create_model(self.model, option=self.option, device=device, **self.kwargs)
        return self.model

    def open(self, skeleton: nn.Module, include_head: bool) -> tuple:
        """The teacher's weights and where they come from.

        Args:
            skeleton: the teacher, perhaps on the meta device.
            include_head: the classifier is wanted.

        Returns:
            ({timm's key: tensor}, as far as possible read only when asked for; provenance as a dict; the file or None).
        """
        if self.weights is None and not isinstance(self.model, str):
            return self.model.state_dict(), {}, None
        if isinstance(self.weights, Mapping):
            return self.weights, {}, None
        from weight_selection.sources.teachers import downloaded_file, open_published, open_teacher

        cfg = skeleton.pretrained_cfg
        tag = self.weights is None and cfg.get("tag")
        name = self.model if isinstance(self.model, str) else type(self.model).__name__
        provenance = {"name": name, "model": ".".join(filter(None, (cfg["architecture"], tag))), "kwargs": self.kwargs}
        if self.file is not None:
            if self.file.suffix == ".npz":  # timm converts these only into a real model
                skeleton = self.create() if isinstance(self.model, str) else copy.deepcopy(self.model)
            weights, unused = open_teacher(self.weights, skeleton, self.weights_option)
            if unused:
                provenance["unused"] = dict(Counter(re.split("[./]", key)[0] for key in unused))
            return weights, provenance | {"source": str(self.weights)}, self.file
        if include_head and skeleton.num_classes != cfg["num_classes"]:  # timm drops the published one
            raise InputError(
                f"--include_head: the published classifier has {cfg['num_classes']} classes; leave num_classes out of "
                "--teacher_kwargs"
            )
        weights = open_published(self.model, skeleton, self.kwargs, self.option, self.remedy)
        return weights, provenance | {"source": cfg.get("hf_hub_id") or cfg.get("url")}, downloaded_file(cfg)

    @property
    def weights_origin(self) -> str:
        """What named the weights, for errors."""
        if self.option == "teacher":
            return "weights" if self.weights is not None else "teacher"
        return f"{self.weights_option} {self.weights}" if self.weights is not None else f"{self.option} {self.model}"


@dataclass
class Student:
    """The model that weights are for.

    Attributes:
        model: a module, or a timm name.
        kwargs, input_size: of ``create_model``, for a name.
        option: what named it, for errors.
        inputs: example inputs, as of ``facts_of``; None: those that the model says.
    """

    model: nn.Module | str
    kwargs: dict = field(default_factory=dict)
    input_size: int | None = None
    option: str = "student"
    inputs: object = None

    def __post_init__(self):
        self.model = _checked_model(self.model, self.option)

    def create(self, device="cpu") -> nn.Module:
        """The student; a name is created there with its random initialisation."""
        if isinstance(self.model, str):
            from weight_selection.sources.timm_models import create_model

            return create_model(
                self.model, option=self.option, input_size=self.input_size, device=device, **self.kwargs
            )
        return self.model


class Selection:
    """Both models, traced once, and the plan.

    Args:
        teacher, student: who they are.
        options: checked.

    Attributes:
        models: both, on the meta device if they were named.
        skeletons: as they are traced: for a projection, copies of one geometry.
        teacher_structure, student_structure: what the trace found.
        plan: which weights go where.

    Raises:
        InputError: the student is not a smaller version of the teacher, or options do not fit the two.
    """

    def __init__(self, teacher: Teacher, student: Student, options: SelectionOptions):
        self.teacher, self.student, self.options = teacher, student, options
        self.models = teacher.create("meta"), student.create("meta")
        self.skeletons = self._skeletons() if options.projects else self.models
        names = _called(teacher.option, teacher.model), _called(student.option, student.model)
        if options.classifier is not None:
            check_classifier(self.models[1], options.classifier)
        self.student_structure = structure_of(self.skeletons[1], names[1], student.inputs, options.classifier)
        self.teacher_structure = structure_of(self.skeletons[0], names[0], teacher.inputs, options.classifier)
        self.plan = plan_selection(self.teacher_structure, self.student_structure, options)
        self.projection = None
        if options.projects:
            from weight_selection.projection.run import Projection

            structures = self.teacher_structure, self.student_structure
            self.projection = Projection(teacher, student, self.skeletons, structures, self.plan, options)

    @cached_property
    def opened(self) -> tuple:
        """The teacher's weights, their provenance and their file, as of ``Teacher.open``."""
        return self.teacher.open(self.models[0], self.options.selects_all)

    def weights(self) -> dict:
        """The student's first weights: its state_dict without what is left out, on the CPU or where the teacher's are.

        Raises:
            InputError: a tensor of the teacher's is not there, is of another shape or is not finite.
        """
        weights, origin = self.opened[0], self.teacher.weights_origin
        if self.projection is None:
            return apply_plan(self.plan, weights, origin)
        return self.projection.weights(weights, origin)

    def _skeletons(self):
        """Copies without weights, for a projection: the teacher is brought to the student's geometry."""
        from weight_selection.projection.project import match_geometry

        for who in (self.teacher, self.student):
            if not isinstance(who.model, str) and _on_meta(who.model):
                raise InputError(f"{who.option}: is on the meta device, but projection runs it; give a real one")
        skeletons = tuple(map(skeleton_of, self.models))
        match_geometry(*skeletons)
        return skeletons


def _checked_model(model, option):
    """A model without the wrappers of torch.compile, DataParallel and DDP."""
    if not isinstance(model, (nn.Module, str)):
        raise InputError(f"{option}={model!r:.80}: give a torch.nn.Module, or the name of a model")
    return model if isinstance(model, str) else unwrapped(model)


def _called(option, model):
    """What to call a model in an error."""
    return f"{option} {model}" if isinstance(model, str) and option.startswith("--") else option


def _on_meta(model):
    return any(parameter.is_meta for parameter in model.parameters())
