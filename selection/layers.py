"""Layers: which parts of a model repeat, and which of the teacher's each of the student's is made from.

Where layers are is what timm knows (``group_matcher``, which gives its optimisers their layer-wise learning rates);
where that stops at a stage, the modules in a ``ModuleList`` or ``Sequential`` that are all of one class are layers too.
Of a run of layers of the same shapes any can stand for another; a layer unlike its neighbours (one that downsamples)
only for its like.
"""

import re
from itertools import groupby

import torch.nn as nn

from program import InputError
from selection.rules import layer_indices


class Layers:
    """The layers of a model.

    Args:
        model: a timm model.
        shapes: {key: shape} of its tensors.
        heights: {key of a convolution: height of what it gives for an image}.

    Attributes:
        spans: {key: places in it of the layers' numbers, (first character, one after the last)}, outermost first.
        containers: {what comes before a number: {number: {what comes after: (shape, height)}}}.
    """

    def __init__(self, model: nn.Module, shapes: dict, heights: dict):
        patterns = list(_patterns(model))
        stacks = {name + "." if name else "" for name, module in model.named_modules() if _is_stack(module)}
        self.spans, self.containers = {}, {}
        for key in shapes:
            spans = {
                (len(stack) + a, len(stack) + b)
                for stack in stacks
                if key.startswith(stack)
                for a, b in _number(key, stack)
            }
            spans |= set(_timms(patterns, key))
            self.spans[key] = sorted(spans)
            for start, end in self.spans[key]:
                layers = self.containers.setdefault(key[:start], {})
                layers.setdefault(int(key[start:end]), {})[key[end:]] = shapes[key], heights.get(key)

    def component(self, key: str) -> str:
        """A key without the numbers of its layers."""
        for start, end in reversed(self.spans[key]):
            key = f"{key[:start]}*{key[end:]}"
        return key


def _number(key, stack):
    match = re.match(r"(\d+)\.", key[len(stack) :])
    return [match.span(1)] if match else []


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
        method: one of ``LAYER_SELECTION``, applied to each run of layers of the same shapes.

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
    if len(theirs) == len(ours):
        return dict(zip(sorted(ours), sorted(theirs), strict=True))
    large, small = _stages(theirs), _stages(ours)
    t, s = (sum(len(run) for stage in stages for run in stage) for stages in (large, small))
    if t < s:
        raise InputError(f"{name}: teacher has {t} layers, student {s}: a teacher must be at least as deep")
    if len(large) != len(small):
        raise InputError(f"{name}: teacher's layers are of {len(large)} resolutions, student's of {len(small)}")
    chosen = {}
    for their_runs, our_runs in zip(large, small, strict=True):
        prefix = len(our_runs) == 1 and len(our_runs[0]) <= len(their_runs[0])  # the student's stage ends after it
        if len(our_runs) != len(their_runs) and not prefix:
            kinds = (" + ".join(str(len(run)) for run in runs) for runs in (their_runs, our_runs))
            raise InputError("{}: teacher's layers are of the kinds {}, student's of {}".format(name, *kinds))
        for their_run, our_run in zip(their_runs, our_runs, strict=False):
            if len(their_run) < len(our_run):
                raise InputError(
                    f"{name}: teacher has {len(their_run)} layers of a kind, student {len(our_run)}: "
                    "a teacher must be at least as deep"
                )
            indices = layer_indices(method, len(their_run), len(our_run))
            for index, unit in zip(indices, our_run, strict=True):
                if len(unit) != len(their_run[index]):
                    raise InputError(
                        f"{name}: teacher's layers are of {len(their_run[index])} modules, student's of {len(unit)}"
                    )
                chosen.update(zip(unit, their_run[index], strict=True))
    return chosen


def _stages(layers):
    """Layers as [stage of one resolution: [run of the same shapes: [numbers that make one layer]]]."""
    units = []
    for number in sorted(layers):
        content = layers[number]
        leaf = all("." not in rest.lstrip(".") for rest in content)  # a plain stack: a convolution and what follows
        if not units or not leaf or any(len(shape) > 1 for shape, _ in content.values()):
            units.append([number])
        else:
            units[-1].append(number)
    kinds, heights = [], []
    for unit in units:
        content = {(place, rest): value for place, number in enumerate(unit) for rest, value in layers[number].items()}
        kinds.append(tuple((where, shape) for where, (shape, _) in sorted(content.items())))
        found = [height for _, height in content.values() if height is not None and height > 1]  # 1: squeezed
        heights.append(min(found) if found else heights[-1] if heights else None)
    stages = []
    for _, stage in groupby(range(len(units)), key=heights.__getitem__):
        stages.append([[units[i] for i in run] for _, run in groupby(stage, key=kinds.__getitem__)])
    return stages
