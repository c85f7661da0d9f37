"""One selection, from the request to the weights. The command and ``select_weights`` are both thin callers of it.

Teacher, Student     which models: a module, or a name and arguments
Selection            traces both once and makes the plan; it refuses at once what cannot work
Selection.weights    the student's first weights, by a rule of the paper or by projection
"""

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
import torch.nn as nn

from weight_selection.apply import apply_plan
from weight_selection.errors import InputError, printable
from weight_selection.modules import copy_of, skeleton_of
from weight_selection.options import SelectionOptions
from weight_selection.plan import plan_selection
from weight_selection.sources import names
from weight_selection.sources.facts import check_classifier, library_of, unwrapped
from weight_selection.sources.teachers import trained_normalization
from weight_selection.sources.weight_files import under_own_names
from weight_selection.structure import structure_of


class _Given:
    """A model that the user gives: a module, or a name."""

    def create(self, device="cpu") -> nn.Module:
        """The user's module; or if a name was given, that model on the device, with random weights."""
        if not isinstance(self.model, str):
            return self.model
        size = {} if self.input_size is None else {"input_size": self.input_size}  # of timm's models only
        return names.create_model(self.model, option=self.option, device=device, **size, **self.kwargs)

    def own(self) -> nn.Module:
        """A model that may be changed: a user's module is copied."""
        return self.create() if isinstance(self.model, str) else copy_of(self.model)

    @property
    def called(self) -> str:
        """What to call the model in an error."""
        return f"{self.option} {self.model}" if isinstance(self.model, str) else self.option


@contextmanager
def plain_context() -> Iterator[None]:
    """No inference mode, and new tensors on the CPU, whatever the caller's contexts are."""
    on_cpu = torch.empty(0).device.type == "cpu"  # then the context would only slow each operation down
    with torch.inference_mode(False), nullcontext() if on_cpu else torch.device("cpu"):
        yield


@dataclass
class Teacher(_Given):
    """The model that weights come from.

    Attributes:
        model: a module, or a name that ``sources.names`` knows. None: ``weights`` are of a run of main.py, whose
            checkpoint says the model.
        kwargs, input_size: if the model is a name, arguments of ``names.create_model``.
        weights: a state_dict, a file or a directory; None: the model's own weights.
        option, weights_option: the options that gave the model and its weights, for errors.
        remedy: what the user can do if the weights are not to be had, for errors.
        inputs: example inputs, as for ``facts_of``; None: the model's library says them.
    """

    model: nn.Module | str | None
    kwargs: dict = field(default_factory=dict)
    weights: Mapping | str | os.PathLike | None = None
    option: str = "teacher"
    weights_option: str = "weights"
    remedy: str = "give a loaded model, or weights"
    inputs: object = None
    input_size: int | None = None

    def __post_init__(self):
        named = isinstance(self.weights, Mapping) and all(isinstance(key, str) for key in self.weights)
        if self.weights is not None and not named and not isinstance(self.weights, (str, os.PathLike)):
            raise InputError(
                f"{self.weights_option}={printable(repr(self.weights)):.80}: give a state_dict (names with a tensor "
                "each), a file or a directory"
            )
        if self.model is None and self.path is not None:
            from weight_selection.sources.timm_names import model_of_checkpoint

            self.model, kwargs, self.input_size = model_of_checkpoint(self.path, self.weights_option)
            self.kwargs = kwargs | self.kwargs
        self.model = _checked_model(self.model, self.option)
        if self.weights is None and not isinstance(self.model, str) and _on_meta(self.model):
            raise InputError(f"{self.option}: is on the meta device, which has no weights; give them with weights=")

    @property
    def path(self) -> Path | None:
        """The file or directory of the weights; None if they are not in one."""
        return Path(self.weights) if isinstance(self.weights, (str, os.PathLike)) else None

    def open(self, skeleton: nn.Module, include_head: bool) -> tuple:
        """The teacher's weights and where they come from.

        Args:
            skeleton: the teacher, perhaps on the meta device.
            include_head: whether the classifier is wanted.

        Returns:
            (weights, provenance, files). The weights are {the teacher's key: tensor}; if possible, a tensor is read
            only when it is asked for. The provenance is a dict. The files are the paths of the weights.
        """
        if isinstance(self.weights, Mapping):
            return under_own_names(self.weights, skeleton), {}, []
        if self.weights is None and not isinstance(self.model, str):
            return self.model.state_dict(), {}, []
        if self.weights is None:
            named = self.model, skeleton, self.kwargs, self.option, self.remedy
            opened = names.open_published(*named, include_head)
        else:
            if self.path.suffix == ".npz":  # these can only be converted into a real model
                skeleton = self.own()
            opened = names.open_weights(self.weights, skeleton, self.weights_option)
        name = self.model if isinstance(self.model, str) else type(self.model).__name__
        provenance = {"name": name, "model": opened.model, "kwargs": self.kwargs}
        if opened.unused:
            provenance["unused"] = dict(Counter(re.split("[./]", key)[0] for key in opened.unused))
        return opened.weights, provenance | {"source": opened.source}, opened.files

    @property
    def weights_origin(self) -> str:
        """The option and the name that gave the weights, for errors."""
        if self.weights is None:
            return self.called
        return self.weights_option if self.path is None else f"{self.weights_option} {self.weights}"


@dataclass
class Student(_Given):
    """The model that weights are for.

    Attributes:
        model: a module, or a name that ``sources.names`` knows.
        kwargs, input_size: if the model is a name, arguments of ``names.create_model``.
        option: the option that gave the model, for errors.
        inputs: example inputs, as for ``facts_of``; None: the model's library says them.
        prefix: what the wrappers of torch.compile, DDP and the like put in front of the model's keys.
    """

    model: nn.Module | str
    kwargs: dict = field(default_factory=dict)
    input_size: int | None = None
    option: str = "student"
    inputs: object = None
    prefix: str = field(init=False, default="")

    def __post_init__(self):
        given, self.model = self.model, _checked_model(self.model, self.option)
        if given is not self.model:
            self.prefix = next(f"{name}." for name, module in given.named_modules() if module is self.model)


class Selection:
    """Both models, traced once, and the plan.

    Args:
        teacher, student: the two models.
        options: checked options.

    Attributes:
        models: (teacher, student); a model that was given by name is on the meta device.
        skeletons: the models that are traced. For a projection they are copies, and the teacher's has the student's
            geometry.
        teacher_structure, student_structure: what the trace found.
        plan: which weights go where.

    Raises:
        InputError: the student is not a smaller version of the teacher, or options do not fit the two.
    """

    def __init__(self, teacher: Teacher, student: Student, options: SelectionOptions):
        self.teacher, self.student, self.options = teacher, student, options
        self.models = teacher.create("meta"), student.create("meta")
        self.skeletons = self._skeletons() if options.projects else self.models
        if options.classifier is not None:
            check_classifier(self.models[1], options.classifier)
        self.student_structure = structure_of(self.skeletons[1], student.called, student.inputs, options.classifier)
        self.teacher_structure = structure_of(self.skeletons[0], teacher.called, teacher.inputs, options.classifier)
        try:
            self.plan = plan_selection(self.teacher_structure, self.student_structure, options)
        except InputError as error:
            libraries = [library_of(model) or "no library that we know" for model in self.models]
            if libraries[0] == libraries[1]:
                raise
            raise InputError(f"{error} (the teacher is of {libraries[0]}, the student of {libraries[1]})") from error
        self.projection = None
        if options.projects:
            from weight_selection.projection.run import Projection

            structures = self.teacher_structure, self.student_structure
            self.projection = Projection(teacher, student, self.skeletons, structures, self.plan, options)

    @cached_property
    def opened(self) -> tuple:
        """The teacher's weights, their provenance and their files, as ``Teacher.open`` returns them."""
        return self.teacher.open(self.models[0], self.options.selects_all)

    @cached_property
    def normalization(self) -> tuple | None:
        """(mean, std) by channel of the images that the teacher's weights were trained on; None if not known."""
        return trained_normalization(self.models[0], self.teacher.path, self.teacher.weights_option)

    def weights(self) -> dict:
        """The student's first weights: its state_dict without the keys that are left out.

        Selected weights are on the device of the teacher's, projected ones on the CPU. The keys are those of the
        student as it was given: with the prefix of its wrappers.

        Raises:
            InputError: a tensor of the teacher's is missing, has another shape or is not finite.
        """
        weights, origin = self.opened[0], self.teacher.weights_origin
        if self.projection is None:
            made = apply_plan(self.plan, weights, origin)
        else:
            made = self.projection.weights(weights, origin)
        return {self.student.prefix + key: value for key, value in made.items()}

    def _skeletons(self):
        """Copies of both models without weights, for a projection. The teacher's gets the student's geometry."""
        from weight_selection.projection.project import match_geometry

        for who in (self.teacher, self.student):
            if not isinstance(who.model, str) and _on_meta(who.model):
                raise InputError(f"{who.option}: is on the meta device, but projection runs it; give a real one")
        skeletons = tuple(map(skeleton_of, self.models))
        match_geometry(*skeletons)
        return skeletons


def _checked_model(model, option):
    """A model without the wrappers that ``unwrapped`` knows."""
    if not isinstance(model, (nn.Module, str)):
        raise InputError(f"{option}={model!r:.80}: give a torch.nn.Module, or the name of a model")
    if isinstance(model, torch.jit.ScriptModule):
        raise InputError(f"{option}: is a TorchScript program; give the module that it was made from")
    return model if isinstance(model, str) else unwrapped(model)


def _on_meta(model):
    return any(parameter.is_meta for parameter in model.parameters())
