"""The plan: which teacher tensor each student tensor comes from, and which neurons are kept. Shapes alone decide it."""

import re
from dataclasses import dataclass, field, replace

import numpy as np
import torch.nn as nn

from weight_selection.errors import InputError
from weight_selection.geometry import Resampling, resampling
from weight_selection.layers import teacher_keys
from weight_selection.matching import Matching
from weight_selection.options import PARTS, WHOLE, SelectionOptions
from weight_selection.rules import kept_indices
from weight_selection.sources.architectures import NO_KEYS, keys_inside
from weight_selection.structure import ModelStructure, structure_of
from weight_selection.tied import check_classifier_is_not_tied, not_taken


@dataclass(frozen=True)
class PlanEntry:
    """Where one student tensor comes from.

    Attributes:
        key, shape: of the student's tensor.
        role: ``selected``, ``excluded`` (by request), ``classifier``, ``unused`` (a parameter that the forward pass
            does not use), or ``constant`` (a buffer that follows from the student's own sizes, such as the index of
            relative positions in a window). All but the first keep the student's own values.
        teacher_key, teacher_shape: of the teacher's tensor, if selected.
        slices: {dimension of neurons: its ``SlicePair``}. All other dimensions hold positions.
        resampling: the change of positions or image channels that comes first, or None.
    """

    key: str
    shape: tuple
    role: str
    teacher_key: str | None = None
    teacher_shape: tuple | None = None
    slices: dict = field(default_factory=dict)
    resampling: Resampling | None = None


@dataclass(frozen=True)
class Plan:
    """A selection, decided but not carried out.

    Attributes:
        entries: one ``PlanEntry`` per student key, in the student's order.
        groups: {number of the student's neuron group: ``PlannedGroup``}, of the groups that selected tensors hold.
        element_selection, seed: the rule of element selection.
        fused_qkv: one of ``FUSED_QKV``.
        tied: {student's key: the key that its tensor goes by}, of all keys of tied tensors but these. A file in which
            no two keys may share memory, such as of safetensors, is written without them.
        not_taken: {student's key: teacher's key}, of teacher's tensors that go as the student's are tied.
        left_behind: keys of the teacher's tensors without a place in the student that it has no use for: a pooler,
            another task's head, parameters that the forward pass does not use.
        heads: [(teacher's heads, neurons in each, student's heads, neurons in each)], each once, of attentions in which
            neurons may be kept or dropped one by one.
    """

    entries: list
    groups: dict
    element_selection: str
    seed: int
    fused_qkv: str = PARTS
    tied: dict = field(default_factory=dict)
    not_taken: dict = field(default_factory=dict)
    left_behind: list = field(default_factory=list)
    heads: list = field(default_factory=list)

    @property
    def selected(self) -> dict:
        """{student key: its entry}, of what is selected."""
        return {entry.key: entry for entry in self.entries if entry.role == "selected"}

    @property
    def left_out(self) -> list:
        """The student's keys that keep its own initialisation."""
        return [entry.key for entry in self.entries if entry.role != "selected"]

    def kept(self, entry: PlanEntry, dim: int) -> np.ndarray:
        """The teacher's indices that a rule of ``CONSISTENT`` keeps along a dimension of neurons, int64."""
        pairs, size = entry.slices[dim], entry.shape[dim]
        if self.fused_qkv == WHOLE and _is_fused_qkv(pairs):
            return kept_indices("uniform", entry.teacher_shape[dim], size).numpy()
        indices = np.empty(size, np.int64)
        for pair in pairs:
            indices[pair.student.reshape(-1)] = pair.teacher.reshape(-1)[self.groups[pair.group].kept]
        return indices


def _is_fused_qkv(pairs):
    """Whether a dimension holds queries, keys (the same neurons) and values."""
    return len(pairs) == 3 and pairs[0].group == pairs[1].group and len({pair.student.size for pair in pairs}) == 1


def make_plan(teacher: nn.Module, student: nn.Module, **options) -> Plan:
    """``plan_selection`` of two models, which may be on the meta device.

    Args:
        **options: of ``SelectionOptions``.
    """
    options = SelectionOptions(**options)
    models = {"teacher": teacher, "student": student}
    both = [structure_of(model, name, None, options.classifier) for name, model in models.items()]
    return plan_selection(*both, options)


def plan_selection(teacher: ModelStructure, student: ModelStructure, options: SelectionOptions) -> Plan:
    """Decide where every student tensor comes from and which neurons it keeps.

    Raises:
        InputError: the student is not a smaller version of the teacher; the message names the key and the dimension.
    """
    teacher, student = _with_classifiers(teacher, student, options.selects_all)
    _check_options(teacher, student, options)
    _check_common(teacher, student)
    if not options.selects_all:
        check_classifier_is_not_tied(student.tied, student.in_classifier)
    prefixes = teacher.facts.prefix, student.facts.prefix
    if prefixes[1] and any(key.startswith(prefixes[1]) for key in teacher.shapes):  # the student is one of its towers
        prefixes = "", ""
    their_keys = teacher_keys(teacher.layers, student.layers, options.layer_selection, prefixes)
    left_behind = _left_behind(teacher, student, their_keys, options.allow_unused)

    matching = Matching(teacher.neurons, student.neurons, options)
    entries = {
        key: _entry(teacher, student, matching, key, teacher.tied.get(their_keys[key], their_keys[key]), options)
        for key in student.shapes
        if key not in student.tied
    }
    entries |= {key: replace(entries[first], key=key) for key, first in student.tied.items()}
    return Plan(
        [entries[key] for key in student.shapes],
        matching.groups,
        options.element_selection,
        options.seed,
        options.fused_qkv,
        student.tied,
        not_taken(student.tied, teacher.tied, {k: v for k, v in their_keys.items() if v in teacher.shapes}),
        left_behind,
        matching.heads(),
    )


def _check_options(teacher, student, options):
    """Refuse options that name what the models do not have."""
    architecture = student.architecture
    absent = [component for component in options.exclude if component not in architecture.components]
    if absent:
        known = ", ".join(architecture.components) or "none"
        raise InputError(f"--exclude {absent[0]}: {architecture.name} has no such component; it has {known}")
    if options.include_head_norm and architecture.head_norm is None:
        name = architecture.name
        raise InputError(f"--include_head_norm: no normalisation in the head of {name}; leave the option out")
    classes = [key for key in student.shapes if _is_classes(architecture, key)]
    if options.include_head and not any(key in teacher.shapes for key in classes):
        who = "teacher" if classes else "student"
        raise InputError(f"--include_head: the {who} has no classifier; leave it out")


def _is_classes(architecture, key):
    """Whether a key is of the classifier itself, not of the normalisation before it."""
    return re.search(architecture.classifier, key) is not None and not _in_head_norm(architecture, key)


def _in_head_norm(architecture, key):
    return re.search(architecture.head_norm or NO_KEYS, key) is not None


def _with_classifiers(teacher, student, selects_all):
    """Both structures; of a module that does not say what its classifier is, the layers that give its outputs.

    They are a classifier if all is to be selected, which asks for equal classes, or if the models' outputs differ.
    """
    if student.architecture.classifier is None:
        theirs, ours = teacher.output_layers, student.output_layers
        own = [name for name in ours if f"{name}.weight" not in student.tied]  # the others are embeddings as well
        names = [name for name in own if selects_all or theirs.get(name) != ours[name]]
        if len(names) > 1 and not selects_all:
            sizes = ", ".join(f"{n} ({theirs.get(n)} in the teacher, {ours[n]} in the student)" for n in names)
            raise InputError(
                f"--classifier is missing: outputs of several layers differ in size: {sizes}; name those of the task, "
                f"such as {names[0]}"
            )
        student = student.with_classifier(keys_inside(names) or NO_KEYS)
    if teacher.architecture.classifier is None:
        teacher = teacher.with_classifier(student.architecture.classifier)
    return teacher, student


def _check_common(teacher, student):
    """Refuse models of two architectures, of which one has tensors that the other has not."""
    if teacher.architecture.name == student.architecture.name:
        return
    theirs, ours = ({one.starred_key(k) for k in one.shapes if not one.in_classifier(k)} for one in (teacher, student))
    if missing := sorted(ours - theirs):
        raise InputError(
            f"teacher is a {teacher.architecture.name} model, student a {student.architecture.name}: weights need a "
            f"common architecture, and the teacher has no {missing[0]}"
        )


def _left_behind(teacher, student, their_keys, allow_unused):
    """Keys of the teacher's tensors without a counterpart that the student has no use for.

    All others are refused, unless their loss is accepted: a LayerScale, a token, a normalisation.
    """
    used = {teacher.starred_key(key) for key in their_keys.values() if key in teacher.shapes}
    own = [key for key in teacher.shapes if not teacher.in_classifier(key) and key not in teacher.tied]
    lost = [key for key in own if teacher.starred_key(key) not in used]
    useless = teacher.neurons.unused & teacher.parameters
    needed = [key for key in lost if key not in useless and not re.search(teacher.facts.spare or NO_KEYS, key)]
    if needed and not allow_unused:
        head = _own_head(teacher, student) if needed[0].rpartition(".")[0] in teacher.output_layers else None
        remedy = f", keep the student's own head (--classifier {head})" if head else ""
        raise InputError(
            f"{needed[0]}: the student has no such tensor, so the teacher's is lost; give the student one "
            f"(--student_kwargs){remedy} or accept the loss (--allow_unused)"
        )
    return [key for key in lost if key not in needed]


def _own_head(teacher, student):
    """Name of the outermost module that gives an output of the student and has no tensor of the teacher's, or None."""
    for name in student.output_layers:
        parts = name.split(".")
        for module in (".".join(parts[:end]) for end in range(1, len(parts) + 1)):
            if not any(key.startswith(f"{module}.") and key in teacher.shapes for key in student.shapes):
                return module
    return None


def _entry(teacher, student, matching, key, teacher_key, options):
    """Decide what becomes of one tensor of the student."""
    architecture, shape = student.architecture, student.shapes[key]
    kept_norm = options.include_head_norm and _in_head_norm(architecture, key)
    if student.in_classifier(key) and not options.selects_all and not kept_norm:
        return PlanEntry(key, shape, "classifier")
    if any(re.search(architecture.components[component], key) for component in options.exclude):
        return PlanEntry(key, shape, "excluded")
    if key in student.neurons.unused and key in student.parameters:
        return PlanEntry(key, shape, "unused")
    if teacher_key not in teacher.shapes:
        raise InputError(f"{key}: the teacher has no {teacher_key} to select it from; {_without(student, key)}")
    return _selected(teacher, student, matching, key, teacher_key, options.allow_unused)


def _without(student, key):
    """What to do about a tensor that the teacher lacks."""
    match = re.search(student.facts.spare or NO_KEYS, key)
    if match is None:
        return "give the student the teacher's options"
    module = key[: match.end()].rstrip(".") or key.partition(".")[0]
    remedy = "give the student none (add_pooling_layer=False), " if module.endswith("pooler") else ""
    return f"{remedy}take a teacher that has it, or keep the student's own (--classifier {module} ...)"


def _selected(teacher, student, matching, key, teacher_key, allow_unused):
    """Compare one tensor of each model, dimension by dimension."""
    shape, teacher_shape = student.shapes[key], teacher.shapes[teacher_key]
    _check_shapes(teacher, student, key, teacher_key)
    ours, theirs = student.neurons.slices[key], teacher.neurons.slices[teacher_key]
    common = range(min(len(shape), len(teacher_shape)))
    neurons = [dim for dim in common if ours[dim] is not None and theirs[dim] is not None]
    different = [dim for dim in common if dim not in neurons and teacher_shape[dim] != shape[dim]]
    if different and key not in student.parameters:
        return PlanEntry(key, shape, "constant")
    both = (student.neurons, key), (teacher.neurons, teacher_key)  # constants of one head come from those of several
    constants = [dim for dim in different if all(one.slices_of(name, dim) for one, name in both)]
    slices = {dim: matching.pairs(key, teacher_key, dim, teacher_shape[dim], shape[dim]) for dim in neurons + constants}
    different = [dim for dim in different if dim not in constants]
    if 0 in different and key in student.tables - student.geometry.embeddings:
        raise InputError(
            f"{key}, dimension 0: teacher's size {teacher_shape[0]}, student's {shape[0]}: its rows are tokens, "
            "positions or outputs, which are never subsampled; give the student the teacher's number of them (such as "
            "vocab_size or max_position_embeddings)"
        )
    shapes = teacher_shape, shape
    change = resampling(teacher.geometry, student.geometry, teacher_key, key, shapes, different, allow_unused)
    return PlanEntry(key, shape, "selected", teacher_key, teacher_shape, slices, change)


def _check_shapes(teacher, student, key, teacher_key):
    """Refuse tensors of another kind, and classifiers of other classes. A 1x1 convolution is a linear layer."""
    shape, teacher_shape = student.shapes[key], teacher.shapes[teacher_key]
    shorter, longer = sorted((teacher_shape, shape), key=len)
    if len(shorter) != len(longer) and (len(shorter) != 2 or longer[2:] != (1, 1)):
        raise InputError(f"{key}: teacher's shape is {teacher_shape}, student's {shape}: not the same kind of tensor")
    if not _is_classes(student.architecture, key):
        return
    name, giving = key.rpartition(".")[0], [f"{name}.weight" for name in student.output_layers]
    if name not in student.output_layers and any(map(student.in_classifier, giving)):
        return  # it stands before the layer of the classes, such as a norm
    theirs = teacher.output_layers.get(teacher_key.rpartition(".")[0], *teacher_shape[:1])
    ours = student.output_layers.get(name, *shape[:1])
    if theirs != ours:
        raise InputError(
            f"--include_head: teacher has {theirs} classes, student {ours} ({key}); give both the same "
            "(--student_kwargs num_classes=N, or num_labels=N of Hugging Face)"
        )
