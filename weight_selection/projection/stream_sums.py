"""Where the layers of a model add to its residual streams, found by running it.

A stream is seen where a norm or a dense layer takes it. Between two such places, at most one layer may add to it:

    after = before + gain y + constant                                                                             (12)

with y the output of that layer's last dense layer, and a gain (LayerScale, batch normalisation) for each neuron.
"""

from collections import Counter
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from weight_selection.projection.activation_tap import ActivationTap, vectors
from weight_selection.projection.images import images_in
from weight_selection.projection.traced_model import TracedModel

TOLERANCE = 1e-3  # relative; where (12) does not hold the difference is as large as what is compared


@dataclass(frozen=True)
class StreamSum:
    """A dense layer whose output is added to a stream.

    Attributes:
        before, after: keys of the norms or dense layers that take the stream before and after it.
        gain, constant: of (12), (d,).
        by_place: the layer takes and gives rows place by place, those of all images together, where the stream has them
            image by image (attention of PyTorch).
    """

    before: str
    after: str
    gain: Tensor
    constant: Tensor
    by_place: bool = False


def rows(traced: TracedModel, key: str, x: Tensor) -> Tensor:
    """What a dense layer or a norm takes or gives, as rows (n, channels); ``key`` is of its weight or gain."""
    batch_norm = isinstance(traced.symmetries.modules[key.rpartition(".")[0]], _BatchNorm)
    return vectors(x, x.ndim if batch_norm else len(traced.structure.shapes[key]))


def by_place(rows: Tensor, images: int) -> Tensor:
    """Bring rows from an order image by image to an order place by place."""
    return rows.unflatten(0, (images, -1)).transpose(0, 1).flatten(0, 1)


def find_sums(traced: TracedModel, batch: Tensor) -> dict:
    """{key of a dense weight: its ``StreamSum``}, of the layers for which (12) holds.

    Args:
        batch: of inputs. Rows of other layers may be in another order, such as that of windows; then (12) fails.
    """
    seen = _Seen(traced)
    with torch.no_grad(), ActivationTap(traced, seen.dense, seen.norm):
        traced.run(batch)
    images = images_in(batch)
    times, found = Counter(key for key, *_ in seen.places), {}
    writes = [(place, *write) for place, *write in seen.writes if seen.ran[write[0]] == 1]
    for place, key, group, y in writes:
        earlier = max((other for other, *_, g, _ in seen.writes if g == group and other < place), default=0)
        later = min((other for other, *_, g, _ in seen.writes if g == group and other > place), default=None)
        befores = [(k, x) for k, g, x in seen.places[earlier:place] if g == group and times[k] == 1]
        afters = [(k, x) for k, g, x in seen.places[place:later] if g == group and times[k] == 1]
        pairs = [(before, after) for before in befores for after in afters]
        sums = (_fitted(*before, *after, y, images, turned) for turned in (False, True) for before, after in pairs)
        if (one := next(filter(None, sums), None)) is not None:
            found[key] = one
    return found


def stream_taken(traced: TracedModel, key: str) -> int | None:
    """The neuron group of what a norm or a dense layer takes; None if that is not one whole group."""
    symmetries = traced.symmetries
    if symmetries.is_norm(key):
        return traced.group_of(key)
    dim = symmetries.dense.get(
        key, 0 if isinstance(symmetries.modules.get(key[: -len(".weight")]), nn.Conv2d) else None
    )
    slices = () if dim is None else symmetries.slices(key, dim)
    return slices[0].group if len(slices) == 1 else None


class _Seen:
    """What a pass shows of streams.

    Attributes:
        places: [(key, neuron group, rows)] of what norms and dense layers take.
        writes: [(how many places came before it, key, neuron group, rows)] of what dense layers give.
        ran: how often each dense layer ran.
    """

    def __init__(self, traced):
        self.traced, self.places, self.writes, self.ran = traced, [], [], Counter()

    def norm(self, key, x, y):
        self._place(key, x)
        return y

    def dense(self, key, x, y):
        self._place(key, x)
        symmetries = self.traced.symmetries
        slices = symmetries.slices(key, symmetries.output_dim(key)) if key in symmetries.dense else ()
        self.ran[key] += 1
        if len(slices) == 1:
            self.writes.append((len(self.places), key, slices[0].group, rows(self.traced, key, y).clone()))
        return y

    def _place(self, key, x):
        group = stream_taken(self.traced, key)
        if group is not None:
            self.places.append((key, group, rows(self.traced, key, x).clone()))  # the model may change it in place


def _fitted(before, x, after, later, y, images, turned):
    """The ``StreamSum`` of rows before and after, if (12) holds."""
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
    return StreamSum(before, after, gain, means[0] - gain * means[1], turned)
