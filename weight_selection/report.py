"""What a plan says to a person: neuron groups, layers, totals, and if wanted a line for every tensor."""

import re
from collections import Counter
from collections.abc import Callable

import numpy as np
import torch.nn as nn

from weight_selection.cost import multiply_adds, parameter_count
from weight_selection.layers import Layers
from weight_selection.matching import shape_words
from weight_selection.modules import module_around
from weight_selection.options import WHOLE
from weight_selection.plan import Plan, PlanEntry
from weight_selection.sources.facts import ModelFacts

ROLES = ("selected", "excluded", "classifier", "unused", "constant")


def summary(plan: Plan) -> str:
    """How many tensors have which role: "150 selected, 2 classifier"; and which of the teacher's are not taken."""
    counts = Counter("tied" if entry.key in plan.tied else entry.role for entry in plan.entries)
    words = ", ".join(f"{counts[role]} {role}" for role in (*ROLES, "tied") if counts[role])
    for key, teacher_key in plan.not_taken.items():
        words += f"; the teacher's {teacher_key} is not taken: the student's is tied to {plan.tied[key]}"
    left = dict.fromkeys(re.sub(r"\.(weight|bias)$", "", key) for key in plan.left_behind)
    return f"{words}; the student has no place for the teacher's {', '.join(left)}" if left else words


def student_line(kwargs: dict, model: nn.Module, facts: ModelFacts) -> str:
    """What a student is built with, and its cost: "student with embed_dim=192: 5,717,416 parameters, 1.1 G ..."."""
    words = " with " * bool(kwargs) + " ".join(f"{name}={value}" for name, value in kwargs.items())
    count = multiply_adds(model, facts.inputs)
    cost = f"{count / 1e9:.3g} G" if count >= 1e8 else f"{count / 1e6:.3g} M"
    return f"student{words}: {parameter_count(model):,} parameters, {cost} multiply-adds"


def value_words(state_dict: dict) -> str:
    """How many values there are, and of which type: "5,524,224 values, float32"."""
    count = sum(value.numel() for value in state_dict.values())
    dtypes = dict.fromkeys(str(value.dtype) for value in state_dict.values() if value.is_floating_point())
    return f"{count:,} values, {' and '.join(dtypes).replace('torch.', '')}"


def agreement_words(percent: float, images: int, with_classifier: bool) -> str:
    """How well a student agrees with its teacher: "the student agrees with its teacher on 61 % of 64 held-out images".

    Args:
        percent: of the images on which both choose the same class.
        images: their number.
        with_classifier: whether the student was given the classifier too.
    """
    first = "" if with_classifier else "with the teacher's classifier, "
    whose = "the student agrees with its teacher on"
    return f"{first}{whose} {percent:.0f} % of {images} held-out image{'s' * (images != 1)}"


def group_lines(plan: Plan, describe: Callable | None = None) -> list:
    """One line for each kind of neuron group: "stream: 384 -> 192, every 2nd, in 74 tensors".

    Groups that differ only in the layer that they are in share a line.

    Args:
        describe: says in words how a group (by its number) is made smaller; default: by the plan's rule.
    """
    kinds = {}
    for number, group in plan.groups.items():
        if group.teacher.size == group.student.size == 1:
            continue  # of a depthwise convolution, say
        name, layers = _fold(module_around([key.split(".")[:-1] for key in group.keys]) or "stream")
        sizes = f"{shape_words(group.teacher.block_shape)} -> {shape_words(group.student.block_shape)}"
        words = describe(number) if describe else _rule_words(plan, group)
        kinds.setdefault((name, sizes, words, len(group.keys)), []).append(layers)
    lines = []
    for (name, sizes, words, tensors), layers in kinds.items():
        each = f"{tensors} tensor{'s' * (tensors > 1)}" + " each" * (len(layers) > 1)
        lines.append(f"{_with_layers(name, layers)}: {sizes}, {words}, in {each}")
    return lines


def layer_lines(plan: Plan, teacher: Layers, student: Layers) -> list:
    """One line for each container of layers: "blocks.{0..11} from 0..11"."""
    pairs = {}
    for key, entry in plan.selected.items():
        for (start, end), (first, last) in zip(student.spans[key], teacher.spans[entry.teacher_key], strict=True):
            pairs.setdefault(key[:start], {})[int(key[start:end])] = int(entry.teacher_key[first:last])
    return [f"{name}{_span(chosen)} from {_span(chosen.values()).strip('{}')}" for name, chosen in pairs.items()]


def head_warnings(plan: Plan) -> list:
    """A line for each kind of attention whose student's heads hold neurons from parts of the teacher's heads.

    Uniform selection spreads a student's heads over all of the teacher's, so their number must divide the teacher's.
    Consecutive selection takes the first neurons, so a head must be as large as one of the teacher's, or several.
    """
    lines = []
    for t, t_size, s, s_size in plan.heads:
        whole, remedy = t % s == 0, f"a number of heads that divides {t} would keep them whole"
        if plan.element_selection == "consecutive":
            whole, remedy = s_size % t_size == 0, f"heads of {t_size} would keep them whole"
        if not whole:
            heads = f"the student's {s} heads of {s_size} neurons are cut across the teacher's {t} of {t_size}"
            lines.append(f"warning: {heads}; {remedy}")
    return lines


def tensor_lines(plan: Plan, describe: Callable | None = None) -> list:
    """The plan as a table with a line for every student tensor.

    Args:
        describe: says in words how an entry is made; default: by the plan's rule.
    """
    rows = [("student key", "shape", "teacher key", "shape", "rule")]
    for entry in plan.entries:
        words = describe(entry) if describe else tensor_words(entry, plan)
        teacher_shape = "-" if entry.teacher_shape is None else shape_words(entry.teacher_shape)
        rows.append((entry.key, shape_words(entry.shape), entry.teacher_key or "-", teacher_shape, words))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return ["  ".join([*(text.ljust(width) for text, width in zip(row, widths, strict=False)), row[4]]) for row in rows]


def role_words(entry: PlanEntry) -> str:
    """What happens to a tensor that is not selected."""
    return f"{entry.role}: student's own initialisation"


def tensor_words(entry: PlanEntry, plan: Plan) -> str:
    """How a tensor is made by the plan's rule, in words."""
    if entry.role != "selected":
        return role_words(entry)
    if entry.key in plan.tied:
        return f"tied to {plan.tied[entry.key]}"
    words = [] if entry.resampling is None else [entry.resampling.words]
    if len(entry.teacher_shape) != len(entry.shape):
        words.append("reshape")
    smaller = [some for some in entry.slices.values() if any(one.teacher.shape != one.student.shape for one in some)]
    if smaller:
        inside = " x ".join(str(len(pairs)) for pairs in smaller if len(pairs) > 1)
        where = "over" if plan.fused_qkv == WHOLE else "in each of"
        words.append(plan.element_selection + (f" {where} {inside} parts" if inside else ""))
        pairs = [pair for pairs in smaller for pair in pairs if pair.teacher.ndim > 1]
        blocks = {f"{shape_words(pair.teacher.shape)} to {shape_words(pair.student.shape)}" for pair in pairs}
        if blocks:
            words.append("blocks of " + " and ".join(sorted(blocks)))
    return ", ".join(words) or "copy"


def _rule_words(plan, group):
    if group.teacher.size == group.student.size:
        return "all"
    if group.kept is None:
        return f"{plan.element_selection}, per tensor"
    steps = np.unique(np.diff(group.kept))
    if plan.element_selection == "uniform" and len(steps) == 1 and steps[0] > 1:  # 1 where a single head is kept
        return f"every {steps[0]}{'nd' if steps[0] == 2 else 'rd' if steps[0] == 3 else 'th'}"
    return plan.element_selection


def _fold(name):
    """A module's name with a star for every number, and the numbers."""
    number = r"(?<=[._])\d+(?=\.|$)"
    return re.sub(number, "*", name), tuple(map(int, re.findall(number, name)))


def _with_layers(name, layers):
    """The name with the numbers of its layers in place of the stars."""
    for position in range(name.count("*")):
        numbers = [some[position] for some in layers]
        name = name.replace("*", _span(numbers), 1)
    return name


def _span(numbers):
    """Numbers in short: {0..11}, {0, 2, 4}, 3."""
    numbers = list(dict.fromkeys(numbers))
    if len(numbers) == 1:
        return str(numbers[0])
    if len(numbers) > 2 and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{{{numbers[0]}..{numbers[-1]}}}"
    return "{" + ", ".join(map(str, numbers)) + "}"
