"""Layers: which parts of a model repeat, and which of the teacher's layers each of the student's starts from.

A library may know where layers are: timm does, as its optimisers give them learning rates of their own. Beyond that,
numbered modules are layers if all in a container are of one class, however they are named: ``0``, ``encoder_layer_0``.
The rules of layer selection choose among the layers of one kind in a stage, as any of these can stand for another. A
layer that downsamples, or that has another kind of attention, can only stand for its like.
"""

import re
from collections import defaultdict
from itertools import groupby

import torch.nn as nn

from weight_selection.errors import InputError
from weight_selection.rules import layer_indices

NUMBER = re.compile(r"(\d+)\.")


class Layers:
    """The layers of a model.

    Args:
        model: on any device.
        shapes: {key: shape} of its tensors.
        heights: {key of a convolution: height of its output}.
        patterns, attention_kinds: what its library knows, as of ``ModelFacts``.

    Attributes:
        spans: {key: places of the layers' numbers in it, (first character, one after the last)}, outermost first.
        containers: {text before a number, such as "blocks.": {number: {text after it, with a star for the number of
            any layer inside: (shape, height) of the first such tensor}}}.
        attention: {text before a number: {number: words for the layer's kind of attention}}.
    """

    def __init__(self, model: nn.Module, shapes: dict, heights: dict, patterns: list, attention_kinds: dict):
        stacks = {f"{name}.{text}".removeprefix(".") for name, text in _stacks(model, bool(patterns))}
        self.spans, self.containers = {}, {}
        for key in shapes:
            spans = {m.span(1) for stack in stacks if key.startswith(stack) and (m := NUMBER.match(key, len(stack)))}
            spans |= set(_known(patterns, key))
            self.spans[key] = sorted(spans)
            for number, (start, end) in enumerate(self.spans[key]):
                layers = self.containers.setdefault(key[:start], {})
                inside = _starred(key, self.spans[key][number + 1 :])[end:]
                layers.setdefault(int(key[start:end]), {}).setdefault(inside, (shapes[key], heights.get(key)))
        self.attention = {
            text: {number: _words(f"{text}{number}", attention_kinds) for number in layers}
            for text, layers in self.containers.items()
        }

    def starred_key(self, key: str) -> str:
        """A key with a star in place of each layer's number."""
        return _starred(key, self.spans[key])


def _words(layer, attention_kinds):
    """The words for the modules in a layer, in one; "" if there are none."""
    return "; ".join(word for name, word in attention_kinds.items() if f"{name}.".startswith(f"{layer}."))


def _starred(key, spans):
    for start, end in reversed(spans):
        key = f"{key[:start]}*{key[end:]}"
    return key


def _known(patterns, key):
    """The place of a layer's number in a key, as its library knows it: a list of one, or an empty one."""
    for pattern, counts_layers in patterns:
        match = pattern.match(key)
        if match and match.re.groups:  # a pattern without a number, of a stem, leaves the answer to the next
            return [match.span(match.re.groups)] if counts_layers and match[match.re.groups] else []
    return []


def _stacks(model, patterns):
    """Where a model's modules are layers: (name of the module that holds them, text before their numbers).

    A container of modules of one class holds layers. If no pattern says where layers are, so do a list of modules
    without children (the linear layers of an MLP), and any module with numbered parts that have the same tensors.
    """
    for name, module in model.named_modules():
        for text, children in _numbered(module).items():
            kinds = {type(child) for child in children}
            composite = next(children[0].children(), None) is not None
            if len(kinds) > 1 or patterns and (text or not composite):
                continue
            if isinstance(module, CONTAINERS) and len(children) == len(module):
                found = composite or isinstance(module, nn.ModuleList)
            else:
                found = composite and not kinds & set(CONTAINERS) and _repeat(children)
            if found:
                yield name, text


CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


def _numbered(module):
    """{text before a number: the modules of that name}, of the children of a module."""
    found = defaultdict(list)
    for name, child in module.named_children():
        if match := re.fullmatch(r"(.*?)\d+", name):
            found[match[1]].append(child)
    return found


def _repeat(modules):
    """Whether several modules have the same tensors, of the same shapes."""
    contents = [{key: value.shape for key, value in module.state_dict().items()} for module in modules]
    return len(modules) > 1 and contents.count(contents[0]) == len(contents)


def teacher_keys(teacher: Layers, student: Layers, method: str, prefixes: tuple = ("", "")) -> dict:
    """{student key: key of the teacher's tensor that it starts from}.

    Args:
        method: one of ``LAYER_SELECTION``, applied to the layers of each kind in a stage.
        prefixes: what stands before the keys of the base model, in the teacher and in the student.

    Raises:
        InputError: the teacher has fewer layers somewhere, or they come in other kinds.
    """
    chosen = {}  # (student's container, teacher's): {student's layer: teacher's}
    found = {}
    for key, spans in student.spans.items():
        teacher_key, done = (prefixes[0], len(prefixes[1])) if key.startswith(prefixes[1]) else ("", 0)
        for start, end in spans:
            teacher_key += key[done:start]
            pair = key[:start], teacher_key
            if pair not in chosen:
                chosen[pair] = _choose(teacher, student, teacher_key, key[:start], method)
            teacher_key += str(chosen[pair][int(key[start:end])])
            done = end
        found[key] = teacher_key + key[done:]
    return found


def _choose(teacher, student, their_text, our_text, method):
    """{student's layer: teacher's} of one container of layers."""
    name, ours = their_text.rstrip("."), student.containers[our_text]
    if their_text not in teacher.containers:
        raise InputError(f"{name}: the student has layers there, the teacher has none; name a teacher with them")
    theirs = teacher.containers[their_text]
    attention = teacher.attention[their_text], student.attention[our_text]
    if set(attention[1].values()) <= set(attention[0].values()):  # else no layer of the teacher's is of such a kind
        theirs, ours = map(_marked, (theirs, ours), attention)
    if _pattern(theirs) == _pattern(ours):
        return dict(zip(sorted(ours), sorted(theirs), strict=True))
    large, small = _stages(theirs), _stages(ours)
    t, s = (sum(len(kind) for stage in stages for kind in stage) for stages in (large, small))
    if t < s:
        raise InputError(f"{name}: teacher has {t} layers, student {s}: a teacher must be at least as deep")
    if len(large) != len(small):
        raise InputError(
            f"{name}: teacher's layers are of {len(large)} resolutions, student's of {len(small)}; give both as many"
        )
    chosen = {}
    for their_kinds, our_kinds in zip(large, small, strict=True):
        left = iter(their_kinds)
        for these in our_kinds:
            needed = _tensors(ours, these[0])
            if len(their_kinds) == len(our_kinds):
                those = next(left)  # if their tensors differ, the plan says in what
                those = those if _marks(theirs, those[0]) == _marks(ours, these[0]) else None
            else:
                fitting = (kind for kind in left if needed <= _tensors(theirs, kind[0]) and len(kind) >= len(these))
                those = next(fitting, None)
            if those is None or len(those[0]) != len(these[0]):
                counts = (" + ".join(str(len(kind)) for kind in kinds) for kinds in (their_kinds, our_kinds))
                words = "{}: teacher's layers are of the kinds {}, student's of {}; give both the same kinds"
                raise InputError(words.format(name, *counts))
            if len(those) < len(these):
                raise InputError(
                    f"{name}: teacher has {len(those)} layers of a kind, student {len(these)}: "
                    "a teacher must be at least as deep"
                )
            for index, numbers in zip(layer_indices(method, len(those), len(these)), these, strict=True):
                chosen.update(zip(numbers, those[index], strict=True))
    return chosen


def _marked(layers, attention):
    """Layers whose kind of attention stands among their tensors, with a space before it."""
    return {number: content | {f" {attention[number]}": ((), None)} for number, content in layers.items()}


def _marks(layers, numbers):
    """The kinds of attention that ``_marked`` has put into a layer."""
    return [rest for number in numbers for rest in layers[number] if rest.startswith(" ")]


def _pattern(layers):
    """For each layer the first one that has the same tensors."""
    kinds = [frozenset(layers[number]) for number in sorted(layers)]
    return [kinds.index(kind) for kind in kinds]


def _tensors(layers, numbers):
    """The tensors of a layer, each by the place of its module in the layer and the rest of its key."""
    return {(place, rest) for place, number in enumerate(numbers) for rest in layers[number]}


def _stages(layers):
    """Sort layers: [stage of one resolution: [layers of one kind: [numbers that make one layer]]].

    Layers are of one kind if they have the same tensors and shapes, and if the image shrinks alike inside them. Only a
    plain stack, with poolings between its layers, has several stages.
    """
    plain = all("." not in rest.lstrip(".") for content in layers.values() for rest in content)
    grouped = []
    for number in sorted(layers):
        if grouped and plain and all(len(shape) < 2 for shape, _ in layers[number].values()):
            grouped[-1].append(number)  # a normalisation belongs to the convolution before it
        else:
            grouped.append([number])
    kinds, heights = [], []
    for numbers in grouped:
        content = [(place, rest, *layers[n][rest]) for place, n in enumerate(numbers) for rest in sorted(layers[n])]
        seen = [height for *_, height in content if height is not None]
        kinds.append(tuple((place, rest, shape, height and height / seen[0]) for place, rest, shape, height in content))
        heights.append(seen[0] if plain and seen else None)
    stages = []
    for _, stage in groupby(range(len(grouped)), key=heights.__getitem__):
        of_kind = {}
        for index in stage:
            of_kind.setdefault(kinds[index], []).append(grouped[index])
        stages.append(list(of_kind.values()))
    return stages
