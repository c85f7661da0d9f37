"""Where the layers of a model add to its residual streams, found by running it.

A stream is seen where a norm or a dense layer takes it, where a batch normalisation gives it (the shortcut of a
ResNet), and where it comes out of a sum, behind which there may be an activation. Between two such places, at most one
layer may add to it:

    after = before + gain y + constant                                                                             (12)

with y the output of that layer's last dense layer, and a gain (LayerScale, batch normalisation) for each neuron.
"""

from collections import Counter
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from weight_selection.projection.activation_tap import ActivationTap
from weight_selection.projection.images import images_in
from weight_selection.projection.traced_model import TracedModel

TOLERANCE = 1e-3  # relative; where (12) does not hold the difference is as large as what is compared


@dataclass(frozen=True)
class StreamSum:
    """A dense layer whose output is added to a stream.

    Attributes:
        before, after: keys of the norms or dense layers that take the stream before and after it. If an activation
            comes between the sum and the next of them, ``after`` is None.
        gain, constant: of (12), (d,).
        by_place: the layer takes and gives rows place by place, those of all images together, where the stream has them
            image by image (attention of PyTorch).
        given: ``before`` is a batch normalisation that gives the stream.
    """

    before: str
    after: str | None
    gain: Tensor
    constant: Tensor
    by_place: bool = False
    given: bool = False


def rows(traced: TracedModel, key: str, x: Tensor) -> Tensor:
    """What a dense layer or a norm takes or gives, as rows (n, channels); ``key`` is of its weight or gain."""
    batch_norm = isinstance(traced.symmetries.module_of(key), _BatchNorm)
    if (x.ndim if batch_norm else len(traced.structure.shapes[key])) > 2:  # of images the channels are dimension 1
        x = x.movedim(1, -1)
    return x.reshape(-1, x.shape[-1])


def by_place(rows: Tensor, images: int) -> Tensor:
    """Bring rows from an order image by image to an order place by place."""
    return rows.unflatten(0, (images, -1)).transpose(0, 1).flatten(0, 1)


def find_sums(traced: TracedModel, batch: Tensor) -> dict:
    """{key of a dense weight: its ``StreamSum``}, of the layers for which (12) holds.

    Args:
        batch: of inputs. Rows of other layers may be in another order, such as that of windows; then (12) fails.
    """
    seen = _Seen(traced)
    tap = ActivationTap(traced, seen.dense, seen.norm, batch_norm=seen.batch_norm, added=seen.added)
    with torch.no_grad(), tap:
        traced.run(batch)
    images = images_in(batch)
    times, found = Counter(one[:2] for one in seen.places), {}
    writes = [(place, *write) for place, *write in seen.writes if seen.ran[write[0]] == 1]
    for place, key, group, y in writes:
        earlier = max((other for other, *_, g, _ in seen.writes if g == group and other < place), default=0)
        later = min((other for other, *_, g, _ in seen.writes if g == group and other > place), default=None)
        befores, afters = (
            [one for one in part if one.group == group and times[one[:2]] == 1]
            for part in (seen.places[earlier:place], seen.places[place:later])
        )
        afters = [one for one in afters if not one.given]
        added = [one._replace(rows=rows(traced, key, one.rows)) for one in seen.places[place:later] if one.key is None]
        pairs = product((False, True), befores, afters + added)
        sums = (_fitted(before, after, y, images, turned) for turned, before, after in pairs)
        if (one := next(filter(None, sums), None)) is not None:
            found[key] = one
    return found


def stream_taken(traced: TracedModel, key: str) -> int | None:
    """The neuron group of what a norm or a dense layer takes; None if that is not one whole group."""
    symmetries, module = traced.symmetries, traced.symmetries.module_of(key)
    if symmetries.is_norm(key) or isinstance(module, _BatchNorm):
        return traced.group_of(key)
    dim = symmetries.dense.get(key, 0 if isinstance(module, nn.Conv2d) else None)
    slices = () if dim is None else symmetries.slices(key, dim)
    return slices[0].group if len(slices) == 1 else None


class _Place(NamedTuple):
    """Where a stream is seen.

    Attributes:
        key: of the norm or dense layer that takes it, or of the batch normalisation that gives it; None of a sum.
        given: whether a batch normalisation gives it.
        group: its neuron group; None of a sum.
        rows: of a sum, the tensor.
    """

    key: str | None
    given: bool
    group: int | None
    rows: Tensor


class _Seen:
    """What a pass shows of streams.

    Attributes:
        places: [``_Place``] in their order.
        writes: [(how many places came before it, key, neuron group, rows)] of what dense layers give.
        ran: how often each dense layer ran.
    """

    def __init__(self, traced):
        self.traced, self.places, self.writes, self.ran = traced, [], [], Counter()

    def norm(self, key, x, y):
        self._place(key, x)
        return y

    def batch_norm(self, key, x, y):
        self._place(key, x)
        self._place(key, y, given=True)
        return y

    def added(self, y):
        if y.is_floating_point() and y.ndim > 1:
            self.places.append(_Place(None, False, None, y.clone()))

    def dense(self, key, x, y):
        self._place(key, x)
        symmetries = self.traced.symmetries
        slices = symmetries.slices(key, symmetries.output_dim(key)) if key in symmetries.dense else ()
        self.ran[key] += 1
        if len(slices) == 1:
            self.writes.append((len(self.places), key, slices[0].group, rows(self.traced, key, y).clone()))
        return y

    def _place(self, key, x, given=False):
        group = stream_taken(self.traced, key)
        if group is not None:  # the model may change what it shows in place
            self.places.append(_Place(key, given, group, rows(self.traced, key, x).clone()))


def _fitted(before, after, y, images, turned):
    """The ``StreamSum`` of places before and after, if (12) holds."""
    x, later = before.rows, after.rows
    if not x.shape == later.shape == y.shape or turned and len(x) % images:
        return None
    if len(x) < 3:
        return None  # a line goes through any two points
    x, later = (by_place(rows, images) if turned else rows for rows in (x, later))
    added, given = (later - x).double(), y.double()
    means = added.mean(0), given.mean(0)
    added, given = added - means[0], given - means[1]
    if (x - x.mean(0)).norm() < TOLERANCE * x.norm():
        return None  # the same in all rows: anything could be before
    gain = (added * given).sum(0) / given.square().sum(0).clamp(min=torch.finfo(given.dtype).tiny)
    if not (added - gain * given).norm() < TOLERANCE * added.norm():
        return None
    return StreamSum(before.key, after.key, gain, means[0] - gain * means[1], turned, before.given)
