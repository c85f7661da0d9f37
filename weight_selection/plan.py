"""The plan: which teacher tensor each student tensor comes from, and which neurons are kept. Shapes alone decide it."""

import inspect
import re
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.nn as nn

from weight_selection.errors import InputError
from weight_selection.geometry import Geometry, Resampling, find_geometry, resampling
from weight_selection.layers import Layers, teacher_keys
from weight_selection.options import CONSISTENT, PARTS, WHOLE, SelectionOptions
from weight_selection.rules import kept_indices
from weight_selection.sources.architectures import NO_KEYS, Architecture, keys_inside
from weight_selection.sources.facts import ModelFacts, facts_of
from weight_selection.tied import check_classifier_is_not_tied, embedding_keys, not_taken, tied_keys
from weight_selection.tracing.groups import ModelGroups, NeuronGroup, aligned, find_groups
from weight_selection.tracing.tracer import RefusedInputs, Untraceable, tensors_of, trace


@dataclass(frozen=True)
class ModelStructure:
    """What a plan needs to know of a model.

    Attributes:
        facts: what the model's library, or the user, says of it.
        shapes: {key: shape} of its state_dict.
        layers, neurons, geometry: which parts repeat, which neurons are the same, where positions are.
        parameters: keys that are parameters; the others are buffers.
        output_layers: {name of a linear layer or convolution that gives an output of the model, which no other layer
            reads: number of its outputs}.
        tables: keys of tensors whose rows are tokens, positions or outputs.
        tied: of ``tied_keys``.
    """

    facts: ModelFacts
    shapes: dict
    layers: Layers
    neurons: ModelGroups
    geometry: Geometry
    parameters: frozenset
    output_layers: dict
    tables: frozenset
    tied: dict

    @property
    def architecture(self) -> Architecture:
        """Its conventions."""
        return self.facts.architecture

    @property
    def prefix(self) -> str:
        """What stands before the keys of the base model."""
        return self.facts.prefix

    def component(self, key: str) -> str:
        """A key without the base model's prefix, with a star in place of each layer's number."""
        return self.layers.component(key).removeprefix(self.prefix)

    def in_classifier(self, key: str) -> bool:
        """Whether a tensor belongs to the classifier."""
        return re.search(self.architecture.classifier, key) is not None

    def with_classifier(self, pattern: str) -> "ModelStructure":
        """The same structure, whose classifier's keys match a pattern."""
        return replace(self, facts=replace(self.facts, architecture=replace(self.architecture, classifier=pattern)))


def structure_of(model: nn.Module, name: str, example_inputs=None, classifier=None) -> ModelStructure:
    """Trace a model once and keep what a plan needs. Its weights are not touched: it may be on the meta device.

    Args:
        name: what to call the model in an error.
        example_inputs, classifier: as of ``facts_of``.

    Raises:
        InputError: inputs are needed and not known, or neurons cannot be followed through the model.
    """
    facts = facts_of(model, example_inputs, classifier)
    if facts.inputs is None:
        first = next(iter(inspect.signature(model.forward).parameters), "nothing")
        raise InputError(
            f"{name}: a {type(model).__name__} does not say what inputs it takes; give example_inputs, which its "
            f"forward takes ({first} first), such as torch.zeros(1, 3, 224, 224) for images"
        )
    try:
        traced = trace(model, facts.inputs)
    except Untraceable as reason:
        remedy = ""
        if isinstance(reason, RefusedInputs):
            remedy = "; give example_inputs (student_inputs) that its forward takes"
        elif example_inputs is not None and facts_of(model).inputs is not None:
            remedy = "; leave example_inputs out, as its library says what inputs it takes"
        raise InputError(
            f"{name}: weight selection cannot take a {type(model).__name__} apart: {reason}{remedy}"
        ) from reason
    shapes = {key: tuple(value.shape) for key, value in tensors_of(model).items()}
    output_layers = {
        name: size
        for name, size in traced.output_layers.items()
        if isinstance(model.get_submodule(name), nn.Linear) or not _is_read(traced, *_outputs(model, name))
    }
    heads = _output_rows(traced, model, output_layers if facts.token_heads is None else facts.token_heads)
    return ModelStructure(
        facts,
        shapes,
        Layers(model, shapes, traced.heights, facts.layer_patterns),
        find_groups(traced),
        find_geometry(model, facts.first_convolutions, facts.grid, facts.position_embeddings),
        frozenset(key for key, _ in model.named_parameters(remove_duplicate=False)),
        output_layers,
        embedding_keys(model) | heads,
        tied_keys(model),
    )


def _output_rows(traced, model, names):
    """Note that the outputs of these layers are tokens or classes, not neurons; returns their weights' keys.

    A layer whose outputs another layer reads gives features.
    """
    outputs = [_outputs(model, name) for name in names]
    heads = [(key, dim) for key, dim in outputs if key in traced.dims and not _is_read(traced, key, dim)]
    traced.labels.positions += [traced.dims[key][dim] for key, dim in heads]
    return frozenset(key for key, _ in heads)


def _outputs(model, name):
    """(key of a layer's weight, its dimension of outputs)."""
    return f"{name}.weight", int(getattr(model.get_submodule(name), "transposed", False))


def _is_read(traced, key, dim):
    """Whether another tensor has the neurons of this dimension of a weight: it reads or gives them too."""
    if key not in traced.dims:
        return False
    rows = torch.zeros(traced.labels.count, dtype=torch.bool)
    rows[traced.labels.find(traced.dims[key][dim])] = True
    matrices = {other: dims for other, dims in traced.dims.items() if len(dims) > 1}
    places = ((other, number) for other, dims in matrices.items() for number in range(len(dims)))
    return any(rows[traced.labels.find(matrices[o][n])].any() for o, n in places if (o, n) != (key, dim))


@dataclass(frozen=True)
class SlicePair:
    """A slice of a student's dimension and the teacher's slice that it comes from.

    Attributes:
        group: number of the student's neuron group.
        teacher, student: indices along the dimension, int64, of the group's block shape in each model.
    """

    group: int
    teacher: np.ndarray
    student: np.ndarray


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


@dataclass
class PlannedGroup:
    """One neuron group of the student, and the neurons of the teacher's group that it keeps.

    Attributes:
        teacher, student: the two groups.
        kept: (neurons of the student,) places in the teacher's group, int64; None if the rule chooses per tensor.
        keys: the student's tensors that hold the group, in order.
    """

    teacher: NeuronGroup
    student: NeuronGroup
    kept: np.ndarray | None
    keys: list = field(default_factory=list)


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
    theirs, ours = (
        structure_of(m, who, None, options.classifier) for m, who in ((teacher, "teacher"), (student, "student"))
    )
    return plan_selection(theirs, ours, options)


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
    prefixes = _prefixes(teacher, student)
    sources = teacher_keys(teacher.layers, student.layers, options.layer_selection, prefixes)
    left_behind = _left_behind(teacher, student, sources, options.allow_unused)

    matching = _Matching(teacher.neurons, student.neurons, options)
    entries = {
        key: _entry(teacher, student, matching, key, teacher.tied.get(sources[key], sources[key]), options)
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
        not_taken(student.tied, teacher.tied, {k: v for k, v in sources.items() if v in teacher.shapes}),
        left_behind,
        matching.heads(),
    )


# ---------------------------------------------------------------------------------------------------------
# Keys


def _check_options(teacher, student, options):
    """Refuse options that name what the models do not have."""
    architecture = student.architecture
    absent = [component for component in options.exclude if component not in architecture.components]
    if absent:
        known = ", ".join(architecture.components) or "none"
        raise InputError(f"--exclude {absent[0]}: {architecture.name} has no such component; it has {known}")
    if options.include_head_norm and architecture.head_norm is None:
        raise InputError(
            f"--include_head_norm: no normalisation in the head of {architecture.name}; leave the option out"
        )
    classes = [key for key in student.shapes if _is_classes(architecture, key)]
    if options.include_head and not classes:
        raise InputError("--include_head: the student has no classifier; leave the option out")
    if options.include_head and not any(key in teacher.shapes for key in classes):
        raise InputError("--include_head: the teacher has no classifier; leave the option out")


def _is_classes(architecture, key):
    """Whether a key is of the classifier itself, not of the normalisation before it."""
    return re.search(architecture.classifier, key) is not None and not _in_head_norm(architecture, key)


def _in_head_norm(architecture, key):
    return architecture.head_norm is not None and re.search(architecture.head_norm, key) is not None


def _with_classifiers(teacher, student, selects_all):
    """Both structures; of a module that does not say what its classifier is, the layers that give its outputs.

    They are a classifier if all is to be selected, which asks for equal classes, or if the models' outputs differ.
    """
    if student.architecture.classifier is None:
        theirs, ours = teacher.output_layers, student.output_layers
        own = [name for name in ours if f"{name}.weight" not in student.tied]  # the others are embeddings as well
        names = [name for name in own if selects_all or theirs.get(name) != ours[name]]
        if len(names) > 1 and not selects_all:
            sizes = ", ".join(
                f"{name} ({theirs.get(name)} in the teacher, {ours[name]} in the student)" for name in names
            )
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
    theirs, ours = (
        {one.component(key) for key in one.shapes if not one.in_classifier(key)} for one in (teacher, student)
    )
    if missing := sorted(ours - theirs):
        raise InputError(
            f"teacher is a {teacher.architecture.name} model, student a {student.architecture.name}: weights need a "
            f"common architecture, and the teacher has no {missing[0]}"
        )


def _prefixes(teacher, student):
    """What stands before the keys of the base model in each; nothing if the teacher has the student's keys as they are.

    A whole model of two towers has none, and a model of one of them for a task has its name.
    """
    if student.prefix and any(key.startswith(student.prefix) for key in teacher.shapes):
        return "", ""
    return teacher.prefix, student.prefix


def _left_behind(teacher, student, sources, allow_unused):
    """Keys of the teacher's tensors without a counterpart that the student has no use for.

    All others are refused, unless their loss is accepted: a LayerScale, a token, a normalisation.
    """
    used = {teacher.component(key) for key in sources.values() if key in teacher.shapes}
    lost = [
        key
        for key in teacher.shapes
        if teacher.component(key) not in used and not teacher.in_classifier(key) and key not in teacher.tied
    ]
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


# ---------------------------------------------------------------------------------------------------------
# Dimensions


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
    positions = [dim for dim in common if ours[dim] is None or theirs[dim] is None]
    different = [dim for dim in positions if teacher_shape[dim] != shape[dim]]
    if different and key not in student.parameters:
        return PlanEntry(key, shape, "constant")
    slices = {
        dim: matching.pairs(key, teacher_key, dim, teacher_shape[dim], shape[dim])
        for dim in common
        if dim not in positions
    }
    if 0 in different and key in student.tables - student.geometry.embeddings:
        raise InputError(
            f"{key}, dimension 0: teacher's size {teacher_shape[0]}, student's {shape[0]}: its rows are tokens, "
            "positions or outputs, which are never subsampled; give the student the teacher's number of them (such as "
            "vocab_size or max_position_embeddings)"
        )
    for dim in different:
        if theirs[dim] is None and (key, dim) in student.neurons.constants:
            raise InputError(
                f"{key}, dimension {dim}: teacher's size {teacher_shape[dim]}, student's {shape[dim]}: the forward "
                "pass combines these with numbers that are no weights, such as sinusoids of positions; keep these in a "
                "persistent buffer (register_buffer), which is selected too, or give the student the teacher's size"
            )
        if theirs[dim] is not None and teacher_shape[dim] > shape[dim]:  # the keys of one head, from those of several
            raise InputError(
                f"{key}, dimension {dim}: teacher's size {teacher_shape[dim]}, student's {shape[dim]}: neurons in the "
                "teacher, but positions or constants in the student; give it more than one such head or group, or the "
                "teacher's size"
            )
    shapes = teacher_shape, shape
    change = resampling(teacher.geometry, student.geometry, teacher_key, key, shapes, different, allow_unused)
    return PlanEntry(key, shape, "selected", teacher_key, teacher_shape, slices, change)


def _check_shapes(teacher, student, key, teacher_key):
    """Refuse tensors of another kind, and classifiers of other classes. A 1x1 convolution is a linear layer."""
    shape, teacher_shape = student.shapes[key], teacher.shapes[teacher_key]
    compared, expected = teacher_shape, shape
    if (len(teacher_shape), len(shape)) in ((2, 4), (4, 2)):
        compared, expected = ((*sizes, 1, 1)[:4] for sizes in (teacher_shape, shape))
    if len(compared) != len(expected) or compared[2:] != expected[2:] and len(teacher_shape) != len(shape):
        raise InputError(f"{key}: teacher's shape is {teacher_shape}, student's {shape}: not the same kind of tensor")
    if not _is_classes(student.architecture, key):
        return
    name, giving = key.rpartition(".")[0], [f"{name}.weight" for name in student.output_layers]
    if name not in student.output_layers and any(map(student.in_classifier, giving)):
        return  # it stands before the layer of the classes, such as a norm
    theirs = teacher.output_layers.get(teacher_key.rpartition(".")[0], *compared[:1])
    ours = student.output_layers.get(name, *shape[:1])
    if theirs != ours:
        raise InputError(
            f"--include_head: teacher has {theirs} classes, student {ours} ({key}); give both the same "
            "(--student_kwargs num_classes=N)"
        )


class _Matching:
    """Finds the teacher's group of each of the student's groups, and the neurons that are kept of it.

    Attributes:
        groups: {number of the student's group: ``PlannedGroup``}, of all that has been compared so far.
    """

    def __init__(self, teacher: ModelGroups, student: ModelGroups, options: SelectionOptions):
        self.teacher, self.student, self.options = teacher, student, options
        self.groups = {}
        self.sources = {}  # {number of the student's group: number of the teacher's group that it comes from}

    def pairs(self, key: str, teacher_key: str, dim: int, t: int, s: int) -> list:
        """The ``SlicePair`` of a dimension, which has size ``t`` in the teacher and ``s`` in the student.

        Raises:
            InputError: the teacher has fewer of some neurons, or they are built in another way.
        """
        where = f"{key}, dimension {dim}: teacher's size {t}"
        too_narrow = f"{where} < student's {s}: a teacher must be at least as wide"
        ours, theirs = self.student.slices[key][dim], self.teacher.slices[teacher_key][dim]
        if None not in (ours, theirs) and len(ours) != len(theirs):
            theirs = self._of_chosen_layers(ours, self._of_chosen_queries(ours, theirs))
        if ours is None or theirs is None or len(ours) != len(theirs):
            reason = f"made of {_count(theirs)} in the teacher, of {_count(ours)} in the student"
            raise InputError(too_narrow if t < s else f"{where}, student's {s}: {reason}{self._key_heads()}")
        pairs = []
        for their, our in zip(theirs, ours, strict=True):
            large, small = self.teacher.groups[their.group], self.student.groups[our.group]
            first = self.groups[our.group].teacher if our.group in self.groups else large
            indices = aligned(their.indices, our.indices)
            reason = None
            if first.block_shape != large.block_shape:  # groups of equal sizes keep the same neurons
                reason = f"elsewhere in the student these neurons come from {_words(first)}, here from {_words(large)}"
            elif indices is None:
                reason = f"{_words(large)} in the teacher, {_words(small)} in the student{self._key_heads()}"
            if reason:
                raise InputError(too_narrow if t < s else f"{where}, student's {s}: {reason}")
            pairs.append(SlicePair(our.group, *indices))
        for pair, their in zip(pairs, theirs, strict=True):
            large, small = self.teacher.groups[their.group], self.student.groups[pair.group]
            _check_blocks(pair, large, small, where, t, s, self._key_heads())
            self._note(pair, large, small, key)
            self.sources.setdefault(pair.group, their.group)
        return pairs

    def heads(self) -> list:
        """As of ``Plan``, of the groups that have been compared."""
        theirs, ours = (
            {group: heads for *groups, heads, _ in model.attentions for group in groups}
            for model in (self.teacher, self.student)
        )
        found = []
        for number in ours.keys() & self.groups.keys():
            large, small = self.groups[number].teacher, self.groups[number].student
            t, s = theirs.get(self.sources[number]), ours[number]
            if t and len(large.block_shape) == len(small.block_shape) == 1:
                found.append((t, large.size // t, s, small.size // s))
        return list(dict.fromkeys(found))

    def _key_heads(self):
        """What to do about a student that is built in another way, if several of its queries share a key."""
        if not any(group.shared for group in self.student.groups):
            return ""
        return (
            "; give the student at most as many queries for each key as the teacher has, and more than one key head "
            "(--student_kwargs num_key_value_heads=N)"
        )

    def _of_chosen_layers(self, ours, theirs):
        """The teacher's slices that the student's come from, if layers with features of their own were dropped.

        A dense block concatenates what its layers give: where it is read, each layer has a slice.
        """
        numbers = [self.sources.get(our.group) for our in ours]
        slices = {their.group: their for their in theirs}
        distinct = len(set(numbers)) == len(ours) and len(slices) == len(theirs)
        if self.options.projects or not distinct or not slices.keys() >= set(numbers):
            return theirs
        return tuple(slices[number] for number in numbers)

    def _of_chosen_queries(self, ours, theirs):
        """The teacher's slices of as many queries for each key as the student has.

        Slices of one query stand together: two, if rotary embeddings turn its neurons in pairs.
        """
        rule, seed, number = self.options.element_selection, self.options.seed, theirs[0].group
        if len({their.group for their in theirs}) > 1 or not self.teacher.groups[number].shared:
            return theirs
        each = self.teacher.fewest_slices(number)
        if each != self.student.fewest_slices(ours[0].group) or not len(theirs) > len(ours) or len(ours) % each:
            return theirs
        kept = kept_indices(rule if rule in CONSISTENT else "uniform", len(theirs) // each, len(ours) // each, seed)
        return tuple(part for query in kept.tolist() for part in theirs[query * each : (query + 1) * each])

    def _note(self, pair, large, small, key):
        """Note that a tensor holds a group; at the first one, decide which neurons are kept."""
        if pair.group not in self.groups:
            self.groups[pair.group] = PlannedGroup(large, small, self._kept(pair.teacher.shape, pair.student.shape))
        keys = self.groups[pair.group].keys
        if key not in keys[-1:]:
            keys.append(key)

    def _kept(self, large, small):
        """Places in the teacher's group: for each block size the rule's indices, and all their combinations."""
        if self.options.element_selection not in CONSISTENT:
            return None
        rule, seed = self.options.element_selection, self.options.seed
        kept = [kept_indices(rule, t, s, seed).numpy() for t, s in zip(large, small, strict=True)]
        return np.ravel_multi_index(np.ix_(*kept), large).reshape(-1)


def _check_blocks(pair, large, small, where, t, s, remedy):
    """Refuse a student that has more of some neurons, or fewer where their number is fixed."""
    theirs, ours = pair.teacher, pair.student
    if theirs.shape == ours.shape:
        return
    if theirs.size < ours.size and t < s:
        raise InputError(f"{where} < student's {s}: a teacher must be at least as wide")
    if theirs.size < ours.size:
        raise InputError(
            f"{where}, student's {s}: a part of it has {theirs.size} neurons in the teacher, {ours.size} in the "
            f"student; a teacher must be at least as wide{remedy}"
        )
    if small.crossing_blocks or large.crossing_blocks:
        raise InputError(f"{where}, student's {s}: its neurons come in blocks that cross each other")
    for number, (n, m) in enumerate(zip(theirs.shape, ours.shape, strict=True)):
        sizes = f"{where} = {shape_words(theirs.shape)}, student's {s} = {shape_words(ours.shape)}"
        if n < m:
            raise InputError(f"{sizes}: a teacher must be at least as large in both")
        if n != m and len(large.fixed) == theirs.ndim and large.fixed[number]:
            raise InputError(
                f"{sizes}: {n} and {m} are positions, constants or image channels, not neurons, and must be the same"
            )


def shape_words(shape: tuple) -> str:
    """A shape in words: 6x64."""
    return "x".join(map(str, shape))


def _count(slices):
    return "positions" if slices is None else f"{len(slices)} part{'s' * (len(slices) > 1)}"


def _words(group):
    return f"blocks of {shape_words(group.block_shape)}" if len(group.block_shape) > 1 else f"{group.size} neurons"
