"""Layers: which parts of a model repeat, and which of the teacher's each of the student's is made from.

Where layers are is what timm knows (``group_matcher``, which gives its optimisers their layer-wise learning rates);
where that stops at a stage, the modules in a ``ModuleList`` or ``Sequential`` that are all of one class are layers too.
Of the layers of one kind in a stage any can stand for another: the rules choose among those. A layer that downsamples,
or has an attention of another kind, only stands for its like.
"""

import re
from itertools import groupby

import torch.nn as nn

from weight_selection.errors import InputError
from weight_selection.rules import layer_indices

NUMBER = re.compile(r"(\d+)\.")


class Layers:
    """The layers of a model.

    Args:
        model: a timm model.
        shapes: {key: shape} of its tensors.
        heights: {key of a convolution: height of what it gives for an image}.

    Attributes:
        spans: {key: places in it of the layers' numbers, (first character, one after the last)}, outermost first.
        containers: {what comes before a number: {number: {what comes after, without the numbers of layers inside it:
            (shape, height) of the first}}}.
    """

    def __init__(self, model: nn.Module, shapes: dict, heights: dict):
        patterns = list(_patterns(model))
        stacks = {name + "." if name else "" for name, module in model.named_modules() if _is_stack(module)}
        self.spans, self.containers = {}, {}
        for key in shapes:
            spans = {m.span(1) for stack in stacks if key.startswith(stack) and (m := NUMBER.match(key, len(stack)))}
            spans |= set(_timms(patterns, key))
            self.spans[key] = sorted(spans)
            for number, (start, end) in enumerate(self.spans[key]):
                layers = self.containers.setdefault(key[:start], {})
                inside = _starred(key, self.spans[key][number + 1 :])[end:]
                layers.setdefault(int(key[start:end]), {}).setdefault(inside, (shapes[key], heights.get(key)))

    def component(self, key: str) -> str:
        """A key without the numbers of its layers."""
        return _starred(key, self.spans[key])


def _starred(key, spans):
    for start, end in reversed(spans):
        key = f"{key[:start]}*{key[end:]}"
    return key


def _patterns(model):
    """Regular expressions of timm's for layers, as (pattern, is it one of layers)."""
    matcher = model.group_matcher(coarse=False) if hasattr(model, "group_matcher") else {}
    for given in matcher.values() if isinstance(matcher, dict) else ():
        for pattern, suffix in given if isinstance(given, (list, tuple)) else [(given, None)]:
            yield re.compile(pattern), suffix is None


def _timms(patterns, key):
    """The place of a layer's number in a key according to timm."""
    for pattern, of_layers in patterns:
        match = pattern.match(key)
        if match and match.re.groups:  # a pattern without a number (a stem) leaves it to the next
            return [match.span(match.re.groups)] if of_layers and match[match.re.groups] else []
    return []


def _is_stack(module):
    """Whether a module's children are layers: all of one class, which itself has children."""
    children = list(module.children()) if isinstance(module, (nn.ModuleList, nn.Sequential)) else []
    kinds = {type(child) for child in children}
    return len(kinds) == 1 and next(children[0].children(), None) is not None


def source_keys(teacher: Layers, student: Layers, method: str) -> dict:
    """{student key: key of the teacher's tensor that it is made from}.

    Args:
        method: one of ``LAYER_SELECTION``, applied to the layers of each kind in a stage.

    Raises:
        InputError: the teacher has fewer layers somewhere, or they come in other kinds.
    """
    maps = {}
    sources = {}
    for key, spans in student.spans.items():
        source, done = "", 0
        for start, end in spans:
            source += key[done:start]
            if (key[:start], source) not in maps:
                maps[key[:start], source] = _map(
                    source, teacher.containers.get(source), student.containers[key[:start]], method
                )
            source += str(maps[key[:start], source][int(key[start:end])])
            done = end
        sources[key] = source + key[done:]
    return sources


def _map(container, theirs, ours, method):
    """{student's layer: teacher's} of one container."""
    name = container.rstrip(".")
    if theirs is None:
        raise InputError(f"{name}: the student has layers there, the teacher has none")
    if _pattern(theirs) == _pattern(ours):
        return dict(zip(sorted(ours), sorted(theirs), strict=True))
    large, small = _stages(theirs), _stages(ours)
    t, s = (sum(len(kind) for stage in stages for kind in stage) for stages in (large, small))
    if t < s:
        raise InputError(f"{name}: teacher has {t} layers, student {s}: a teacher must be at least as deep")
    if len(large) != len(small):
        raise InputError(f"{name}: teacher's layers are of {len(large)} resolutions, student's of {len(small)}")
    chosen = {}
    for their_kinds, our_kinds in zip(large, small, strict=True):
        left = iter(their_kinds)
        for these in our_kinds:
            needed = _tensors(ours, these[0])
            if len(their_kinds) == len(our_kinds):
                those = next(left)  # of what their tensors differ in, the plan will tell
            else:
                fitting = (kind for kind in left if needed <= _tensors(theirs, kind[0]) and len(kind) >= len(these))
                those = next(fitting, None)
            if those is None or len(those[0]) != len(these[0]):
                counts = (" + ".join(str(len(kind)) for kind in kinds) for kinds in (their_kinds, our_kinds))
                raise InputError("{}: teacher's layers are of the kinds {}, student's of {}".format(name, *counts))
            if len(those) < len(these):
                raise InputError(
                    f"{name}: teacher has {len(those)} layers of a kind, student {len(these)}: "
                    "a teacher must be at least as deep"
                )
            for index, unit in zip(layer_indices(method, len(those), len(these)), these, strict=True):
                chosen.update(zip(unit, those[index], strict=True))
    return chosen


def _pattern(layers):
    """For each layer the first that has the same tensors."""
    kinds = [frozenset(layers[number]) for number in sorted(layers)]
    return [kinds.index(kind) for kind in kinds]


def _tensors(layers, unit):
    """The tensors of a layer, by the place of the module in it and the rest of the key."""
    return {(place, rest) for place, number in enumerate(unit) for rest in layers[number]}


def _stages(layers):
    """Layers as [stage of one resolution: [layers of one kind: [numbers that make one layer]]].

    Of one kind are layers of the same tensors and shapes, whose convolutions see the image get smaller alike. Only a
    plain stack, in which poolings are between the layers, has several stages.
    """
    plain = all("." not in rest.lstrip(".") for content in layers.values() for rest in content)
    units = []
    for number in sorted(layers):
        if units and plain and all(len(shape) < 2 for shape, _ in layers[number].values()):
            units[-1].append(number)  # what follows a convolution
        else:
            units.append([number])
    kinds, heights = [], []
    for unit in units:
        content = [(place, rest, *layers[n][rest]) for place, n in enumerate(unit) for rest in sorted(layers[n])]
        seen = [height for *_, height in content if height is not None]
        kinds.append(tuple((place, rest, shape, height and height / seen[0]) for place, rest, shape, height in content))
        heights.append(seen[0] if plain and seen else None)
    stages = []
    for _, stage in groupby(range(len(units)), key=heights.__getitem__):
        of_kind = {}
        for index in stage:
            of_kind.setdefault(kinds[index], []).append(units[index])
        stages.append(list(of_kind.values()))
    return stages
