"""Layers that the student leaves out: the last dense layer before them also gives what they would have added.

In a residual stream x_j = x_i + y_i + m, layer i adds y_i and the layers between i and j add m. A student that keeps i
and goes on with j has lost m. The last dense layer of its layer i therefore gives both, see (10) in up_maps.py.

We do this only between layers that are kept. We do not approximate layers dropped at the end; doing so gave worse
features (docs/results.md).
"""

from collections.abc import Iterable
from dataclasses import dataclass

from weight_selection.layers import Layers


@dataclass(frozen=True)
class Skipped:
    """Layers of the teacher that the student leaves out, between one that it keeps and the next.

    Attributes:
        before, last: names of the layer before them, and of the last that is left out.
    """

    before: str
    last: str


def find_skipped(entries: dict, teacher: Layers, student: Layers, up_mapped: Iterable) -> dict:
    """Find the layers that the student leaves out.

    Args:
        entries: {student's key: its entry of the plan}, of the selected tensors.
        up_mapped: keys of the student's dense weights with an up map.

    Returns:
        {key of a student's dense weight: the ``Skipped`` layers that it is to make up for}.
    """
    kept, ends = {}, {}
    for key, entry in entries.items():
        spans = teacher.spans[entry.teacher_key], student.spans[key]
        if len(spans[0]) != len(spans[1]):  # only in one of the two models its numbered modules have the same shapes
            continue
        for (start, end), (_, ours) in zip(*spans, strict=True):
            container, number = entry.teacher_key[:start], int(entry.teacher_key[start:end])
            kept.setdefault(container, set()).add(number)
            if key in up_mapped:
                ends[key[:ours]] = key, container, number
    skipped = {}
    for key, container, number in ends.values():
        after = [other for other in kept[container] if other > number]
        missing = [n for n in teacher.containers[container] if number < n < min(after, default=0)]
        if missing:
            skipped[key] = Skipped(f"{container}{number}", f"{container}{max(missing)}")
    return skipped
