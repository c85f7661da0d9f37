"""The tracer: it follows one forward pass and finds which neurons of which tensors are the same.

Every index along every dimension of every parameter gets a label. The model runs once on the meta device, where no
number is computed. Beside each activation travel the labels of its neurons:

- An operation that moves data (view, split, concatenation, roll) moves the labels by the very same operation.
- Where two tensors meet in a sum or a product, their labels become the same.
- Where a matrix product sums over a dimension, the labels of both sides become the same. The product carries the
  labels of the weight's other dimension.
- A dimension that meets no neuron, such as a kernel's width or a table of positions, holds positions.

An operation without a rule is refused by name.
"""

import re
from dataclasses import dataclass
from functools import partial
from itertools import chain

import torch
import torch.nn as nn
from torch.nn.modules.module import _EXTRA_STATE_KEY_SUFFIX as EXTRA_STATE
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from weight_selection.copies import computed, copy_of
from weight_selection.tracing.labels import BlockConstraint, Labels, compact, core, fit, unique_rows, varying
from weight_selection.tracing.meta_results import MetaResults
from weight_selection.tracing.repetitions import Repetitions


class Untraceable(Exception):
    """The tracer cannot follow neurons through something in a forward pass; the message says through what."""


class RefusedInputs(Untraceable):
    """The forward pass itself fails on the inputs that it was given."""


def _names(text):
    return frozenset(text.split())


# What operations do to labels, by their names in torch.ops.aten.
MOVES = _names("""
    view _unsafe_view t permute transpose expand unbind select slice unsqueeze squeeze split split_with_sizes
    unsafe_split repeat roll flip unfold alias clone detach as_strided_
""")  # they move data: the operation itself moves the labels
ALONE = _names("""
    gelu relu relu_ silu silu_ sigmoid sigmoid_ hardsigmoid hardsigmoid_ hardswish hardswish_ hardtanh hardtanh_ elu
    elu_ celu selu leaky_relu leaky_relu_ softplus log_sigmoid_forward mish mish_ tanh tanh_ exp log sqrt rsqrt
    reciprocal square neg abs sin cos erf clamp clamp_ clamp_min clamp_max zero_ _softmax _safe_softmax _log_softmax
    _to_copy logical_not bitwise_not
""")  # they work on each element by itself, or normalise lines
ALONG_LINES = _names("_softmax _safe_softmax _log_softmax")  # those that normalise lines
TOGETHER = _names("""
    add add_ sub sub_ rsub mul mul_ div div_ pow maximum minimum addcmul where copy_ floor_divide remainder masked_fill
    masked_fill_ eq ne gt ge lt le _prelu_kernel
""")  # they combine tensors element by element
OVER_SPACE = _names("""
    avg_pool2d max_pool2d_with_indices _adaptive_avg_pool2d adaptive_max_pool2d upsample_nearest2d upsample_bilinear2d
    upsample_bicubic2d upsample_linear1d _upsample_bilinear2d_aa _upsample_bicubic2d_aa constant_pad_nd
    reflection_pad2d replication_pad2d avg_pool3d max_pool3d_with_indices _adaptive_avg_pool3d upsample_nearest1d
    upsample_nearest3d upsample_trilinear3d reflection_pad1d replication_pad1d
""")  # they change height and width, or the length of a line
REDUCTIONS = _names("mean sum amax amin max min linalg_vector_norm var all any")
# They give one value everywhere.
UNIFORM = _names("empty zeros ones full scalar_tensor new_zeros zeros_like ones_like empty_like")
CONSTANTS = UNIFORM | _names("arange linspace eye lift_fresh _assert_async")
REPEATS = _names("expand view _unsafe_view")  # with the last two sizes as before, they repeat a matrix
NO_VALUES = (
    r"meta (device type )?tensor|'Meta' backend|Meta kernel"  # in PyTorch's complaints that a tensor has no values
)
ASKS_IF_CAUSAL = {nn.TransformerEncoder: "is_causal", nn.TransformerDecoder: "tgt_is_causal"}  # a module's option
KEEP = _names("alias clone detach as_strided_")  # those of the moves that leave every element where it is


class Tracer(TorchDispatchMode):
    """Follows labels through everything that runs under it.

    Attributes:
        labels: which labels mean the same neuron.
        constraints: the ``BlockConstraint`` found, in order of execution.
        heights: {id of a convolution's weight: height of its output}.
        met: ids of the tensors that took part in an operation.
        attentions: of each attention the labels of queries, of values and of keys, each (heads, head_dim).
        multiplied: tensors of labels of neurons that a product of two activations joins, or pairs with others.
        sums: {id of a matrix of weights: the dimension over which a product sums}.
        resized: {storage of a tensor: storage of the images that it was interpolated or pooled from}.
    """

    def __init__(self):
        super().__init__()
        self.labels = Labels()
        self.constraints = []
        self.heights = {}
        self.met = set()
        self.attentions, self.multiplied, self.sums = [], [], {}
        self.resized = {}
        self._results = MetaResults()
        self._weights = {}  # id of a parameter's view: (the view, the parameter, is it transposed)
        self._axes = {}  # id of a tensor: (the tensor, which keeps the id its own, its list of AxisLabels)
        self._uniform = {}  # storage of a tensor that has one value everywhere: the tensor
        self._differing = {}  # storage of a tensor without labels: (it, the dimensions along which its values differ)
        self._repetitions = Repetitions(self._differs)

    def get(self, tensor):
        """The ``AxisLabels`` of a tensor, one for each independent axis of neurons."""
        return self._axes.get(id(tensor), (None, ()))[1] if isinstance(tensor, torch.Tensor) else ()

    def put(self, tensor, axes):
        """Give a tensor its ``AxisLabels``; those that do not vary say nothing."""
        self._axes[id(tensor)] = tensor, [axis for axis in map(compact, axes) if varying(axis)]

    def label(self, tensor):
        """Give every dimension of a parameter new labels; returns them, (size,) for each dimension."""
        labels = {dim: self.labels.new(size) for dim, size in enumerate(tensor.shape)}
        shapes = {dim: [-1 if other == dim else 1 for other in range(tensor.ndim)] for dim in labels}
        self.put(tensor, [labels[dim].view(shapes[dim]).expand(tensor.shape) for dim in labels])
        self._weights[id(tensor)] = tensor, tensor, False
        return tuple(labels.values())

    def label_channels(self, images):
        """Give the channels of images, (batch, channels, height, width), new labels; returns them, (channels,)."""
        channels = self.labels.new(images.shape[1])
        self.put(images, [channels.view(1, -1, 1, 1).expand(images.shape)])
        return channels

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = self._results.run(func, args, kwargs)
        name = func.overloadpacket.__name__
        if name in CONSTANTS:
            if name in UNIFORM:
                self._uniform[_storage(out)] = out
            return out
        arguments = list(chain(*map(_tensors, (*args, *kwargs.values()))))
        self.met.update(map(id, arguments))
        labelled = any(map(self.get, arguments))
        rule = self.RULES.get(name)
        if labelled and rule is None:
            raise Untraceable(f"{func} is no operation that neurons can be followed through")
        if labelled:
            rule(self, func, out, *args, **kwargs)
        elif name in ALONE | KEEP and self._is_uniform(args[0]):
            self._uniform[_storage(out)] = out
        elif name in ALONE | TOGETHER and isinstance(out, torch.Tensor):
            dims = (dim + out.ndim - x.ndim for x in arguments for dim in self._differs(x))
            self._differing[_storage(out)] = out, frozenset(dims) & varying(out)
        if name.endswith("_") and len(arguments) > 1:  # written into
            self._uniform.pop(_storage(out), None)
            self._differing.pop(_storage(out), None)
        if not labelled and name in MOVES:
            self._repetitions.note_move(func, out, *args, **kwargs)
        elif not labelled and name in (ALONE | TOGETHER) - ALONG_LINES:
            self._repetitions.note_elementwise(out, arguments)
        elif name.endswith("_"):
            self._repetitions.forget(out)
        return out

    def _is_uniform(self, tensor):
        return _storage(tensor) in self._uniform

    def _differs(self, tensor):
        """The dimensions along which the values of a tensor may differ."""
        if self._is_uniform(tensor):
            return frozenset()
        found = self._differing.get(_storage(tensor))
        return found[1] if found and found[0] is tensor else varying(tensor)  # an expanded dimension holds one value

    # -- rules: each gives the outputs of an operation their labels

    def _move(self, func, out, x, *args, **kwargs):
        self._note_view(func, out, x)
        if func.overloadpacket.__name__ in KEEP:
            if out.shape != x.shape:
                raise Untraceable(f"{func} changes a tensor's layout")
            self.put(out, self.get(x))
            return
        outs = [[] for _ in out] if isinstance(out, (tuple, list)) else [[]]
        for axis in self.get(x):
            if func in (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default):
                moved = axis.reshape(out.shape)
            else:
                moved = func(axis, *args, **kwargs)
            for into, piece in zip(outs, moved if isinstance(out, (tuple, list)) else [moved], strict=True):
                into.append(piece)
        for tensor, axes in zip(out if isinstance(out, (tuple, list)) else [out], outs, strict=True):
            self.put(tensor, axes)

    def _alone(self, func, out, x, *args, **kwargs):
        first = out[0] if isinstance(out, tuple) else out
        self.put(first, self.get(x))

    def _together(self, func, out, *args, **kwargs):
        tensors = [arg for arg in chain(*map(_tensors, args)) if arg.ndim]
        if func.overloadpacket is torch.ops.aten.copy_:  # the values before it do not count
            if out.untyped_storage().nbytes() != out.numel() * out.itemsize:
                raise Untraceable("a part of a tensor is written over")
            self.put(out, self.meet(tensors[1:], out.shape))
        else:
            self.put(out, self.meet(tensors, out.shape))

    def _over_space(self, func, out, x, *args, **kwargs):
        first = out[0] if isinstance(out, tuple) else out
        self.resized[_storage(first)] = _storage(x)
        axes = []
        for axis in self.get(x):
            dims = varying(axis)
            changed = {dim for dim in dims if first.shape[dim] != x.shape[dim]}
            if func.overloadpacket is torch.ops.aten.constant_pad_nd and changed:
                axes.append(self._padded(axis, changed, first.shape, args[0]))
            elif max(dims) < 2 or func.overloadpacket is torch.ops.aten.constant_pad_nd:
                axes.append(fit(axis, first.shape))
            elif min(dims) >= 2:  # what is interpolated or pooled along are positions
                self._positions(core(axis))
            else:
                raise Untraceable(f"{func} runs along neurons")
        self.put(first, axes)

    def _padded(self, axis, dims, shape, pads):
        """Labels of neurons that get constants beside them; the constants are neurons of no parameter."""
        kept = core(axis)
        size = [shape[dim] if dim in dims else n for dim, n in enumerate(kept.shape)]
        padded = self.labels.new(torch.Size(size).numel()).view(size)
        inside = padded
        for dim in dims:
            inside = inside.narrow(dim, max(pads[2 * (axis.ndim - 1 - dim)], 0), kept.shape[dim])
        inside.copy_(kept)
        return padded.expand(shape)

    def _cat(self, func, out, tensors, dim=0):
        dim = dim % out.ndim
        stacked = func.overloadpacket is torch.ops.aten.stack
        pieces = [[axis.unsqueeze(dim) if stacked else axis for axis in self.get(tensor)] for tensor in tensors]
        shapes = [(*t.shape[:dim], 1, *t.shape[dim:]) if stacked else tuple(t.shape) for t in tensors]
        result = []
        for kind, parts in _aligned(pieces, dim):
            present = [part for part in parts if part is not None]
            if kind and not stacked and not any(dim in varying(part) for part in present):
                for part in present[1:]:  # rows or tokens are joined: each has the same neurons
                    self.labels.join(core(present[0]).narrow(dim, 0, 1), core(part).narrow(dim, 0, 1))
                result.append(fit(present[0].narrow(dim, 0, 1), out.shape))
            elif any(part is None and axes for part, axes in zip(parts, pieces, strict=True)):
                for part in present:  # tokens are put beside an image's positions
                    self._positions(core(part))
            else:
                filled = []
                for part, shape in zip(parts, shapes, strict=True):
                    size = [n if d == dim or d in kind else 1 for d, n in enumerate(shape)]
                    if part is None:  # constants are neurons of no parameter
                        part = self.labels.new(torch.Size(size).numel()).view(size)
                    filled.append(core(part).expand(size))
                result.append(fit(torch.cat(filled, dim), out.shape))
        self.put(out, result)

    def _index(self, func, out, x, indices, *args, **kwargs):
        axes = []
        self._indices(indices)
        picked = [dim for dim, index in enumerate(indices) if index is not None]
        for axis in self.get(x):
            if varying(axis) & set(picked):  # indices pick from positions
                self._positions(core(axis))
            else:
                zeros = [None if index is None else torch.zeros(index.shape, dtype=torch.int64) for index in indices]
                axes.append(axis[tuple(slice(None) if index is None else index for index in zeros)])
        self.put(out, axes)

    def _embedding(self, func, out, weight, indices, *args):
        """Rows of a table are looked up: its rows are positions, its columns neurons."""
        self._indices([indices])
        for axis in self.get(weight):
            if 0 in varying(axis):
                self._positions(core(axis))
        self.put(out, [axis[:1].expand(out.shape) for axis in self.get(weight) if 0 not in varying(axis)])

    def _pixel_shuffle(self, func, out, x, factor):
        """Channels become the pixels of patches, which are positions."""
        for axis in self.get(x):
            self._positions(core(axis))

    def _indices(self, indices):
        """The numbers in a tensor that something is looked up by are no neurons."""
        for axis in chain(*map(self.get, indices)):
            self._positions(core(axis))

    def _reduce(self, func, out, x, *args, **kwargs):
        first = out[0] if isinstance(out, tuple) else out
        if func.overloadpacket is torch.ops.aten.linalg_vector_norm:
            args = args[1:]
        dims = args[0] if args else kwargs.get("dim")
        if dims is None or (isinstance(dims, (list, tuple)) and not dims):
            dims = range(x.ndim)
        dims = {dim % x.ndim for dim in ([dims] if isinstance(dims, int) else dims)}
        if _is_images(x) and dims == {2, 3}:
            self.resized[_storage(first)] = _storage(x)
        kept = first.ndim == x.ndim
        axes = []
        for axis in self.get(x):
            if varying(axis) & dims:
                axis = self._heads(axis, dims)
                if axis is None:
                    continue
            for dim in sorted(dims, reverse=True):
                axis = axis.narrow(dim, 0, 1) if kept else axis.select(dim, 0)
            axes.append(axis)
        self.put(first, axes)

    def _heads(self, axis, dims):
        """Labels of the heads that remain when a sum runs over ``dims``; None if there is only one."""
        rest = sorted(varying(axis) - dims)
        if not rest:
            return None
        rows = core(axis).permute(rest + [dim for dim in range(axis.ndim) if dim not in rest])
        matrix, places = unique_rows(rows.flatten(len(rest)).flatten(0, len(rest) - 1))
        if len(matrix) == 1:
            return None
        heads = self.labels.new(len(matrix), derived=True)
        self.constraints.append(BlockConstraint(heads, matrix))
        shape = [axis.shape[dim] if dim in rest else 1 for dim in range(axis.ndim)]
        return heads[places].view(shape).expand(axis.shape)

    def _positions(self, labels):
        self.labels.positions.append(labels.flatten())
        return labels

    def meet(self, tensors, shape):
        """Labels of an element-wise combination of tensors that broadcast to ``shape``."""
        result, filled = [], frozenset()
        tensors = sorted(tensors, key=lambda tensor: not self.get(tensor))  # constants meet labels, not the reverse
        for tensor in tensors:
            if self._is_uniform(tensor):
                continue
            lead = len(shape) - tensor.ndim
            full = frozenset(dim + lead for dim in self._differs(tensor))
            axes = [core(axis)[(None,) * lead].expand(shape) for axis in self.get(tensor)]
            if tensor is tensors[0] or not filled and not result:
                result, filled = axes, full
                continue
            told = [axis for axis in result if axes or self._tells_apart(tensor, full, axis)]
            untold = [axis for axis in result if not any(axis is other for other in told)]
            result = self._match(told, filled, axes, full) + untold
            filled |= full
        return result

    def _tells_apart(self, constants, full, axis):
        """Whether constants, whose values may differ along the dimensions ``full``, are others for some neurons."""
        return not varying(axis) & full or not self._repetitions.same_for_all(axis, constants)

    def _match(self, ours, our_full, theirs, their_full):
        theirs = list(theirs)
        kept = []
        for axis in ours:
            dims = varying(axis)
            twin = next((other for other in theirs if varying(other) == dims), None)
            if twin is not None:
                theirs = [other for other in theirs if other is not twin]
                self.labels.join(core(axis), core(twin))
                if self._is_derived(axis) and not self._is_derived(twin):
                    axis = twin
                kept.append(axis)
                continue
            kept += self._unmatched(axis, theirs, their_full)
        for axis in theirs:
            kept += self._unmatched(axis, ours, our_full)
        solid = [axis for axis in kept if not self._is_derived(axis)]
        return [k for k in kept if not self._is_derived(k) or not any(varying(k) < varying(s) for s in solid)]

    def _unmatched(self, axis, others, full):
        """The labels that an axis keeps after it met a tensor without an axis along the same dimensions."""
        dims, covered = varying(axis), False
        for other in others:
            part = varying(other)
            if part < dims:
                self._constrain(axis, other, part)
            covered = covered or dims < part  # the other axis gets the constraint
        if covered:
            return []
        met = (dims & full).difference(*map(varying, others))
        if met and met == dims:
            self._positions(core(axis))
            if not others:
                self.labels.constants.append(core(axis).flatten())
            return []
        if met:
            self._constrain(axis, None, met)
        return [axis]

    def _constrain(self, axis, other, part):
        """Record that ``other``, which varies along ``part``, indexes blocks of labels that vary along more."""
        order = sorted(part) + [dim for dim in range(axis.ndim) if dim not in part]
        rows = core(axis).permute(order)
        matrix = rows.flatten(len(part)).flatten(0, len(part) - 1)
        labels = None
        if other is not None:
            labels = core(other).permute(order).flatten()
        if len(matrix) > 4096 or (labels is not None and len(labels) != len(matrix)):
            raise Untraceable("neurons are spread over positions")
        if other is not None and self._is_derived(other):
            self._note_shared(matrix)
        self.constraints.append(BlockConstraint(labels, matrix))

    def _is_derived(self, axis):
        return bool(self.labels.derived[core(axis).flatten()[0]])

    # -- products

    def _sum(self, ours, our_dim, theirs, their_dim, alike=False):
        """Join the neurons over which a product sums; returns labels of the heads that remain (of ours, of theirs).

        ``alike``: one side has the same value everywhere, such as the first state of an LSTM.
        """
        ours, theirs = self._one(ours, our_dim), self._one(theirs, their_dim)
        if ours is not None and theirs is not None:
            a, b = core(ours).movedim(our_dim, -1), core(theirs).movedim(their_dim, -1)
            free = varying(ours) - {our_dim}, varying(theirs) - {their_dim}
            if free[0] == free[1]:
                self._note_shared(a)
                self._note_shared(b)
                self.labels.join(a, b)
            elif not free[0] or not free[1]:
                many, few = (a, b) if free[0] else (b, a)
                rows = many.reshape(-1, many.shape[-1])
                self.constraints.append(BlockConstraint(few.reshape(-1), unique_rows(rows)[0].T))
            else:
                raise Untraceable("a product sums over neurons that differ from place to place")
        elif not alike and (ours is not None or theirs is not None):
            lone, dim = (ours, our_dim) if ours is not None else (theirs, their_dim)
            if varying(lone) == {dim}:
                self._positions(core(lone))
            else:  # each head has the same positions
                self._constrain(lone, None, {dim})
        heads = None if ours is None else self._heads(ours, {our_dim})
        if heads is not None:
            return [heads], []
        heads = None if theirs is None else self._heads(theirs, {their_dim})
        return [], [] if heads is None else [heads]

    def _note_shared(self, labels):
        """Note labels (heads, ..., head_dim) that are the same for several heads."""
        rows = labels.flatten(0, -2) if labels.ndim > 1 else labels[None]
        if len(unique_rows(rows)[0]) < len(rows):
            self.labels.shared.append(labels)

    def _one(self, axes, dim):
        """The axis that varies along a dimension over which a product sums, or None."""
        found = [axis for axis in axes if dim in varying(axis)]
        found = [axis for axis in found if not self._is_derived(axis)] or found[:1]
        if len(found) > 1:
            raise Untraceable("a product sums over several kinds of neurons at once")
        return found[0] if found else None

    def _product(self, func, out, *args, **kwargs):
        """mm, bmm, addmm, baddbmm: (..., i, k) x (..., k, j) -> (..., i, j)."""
        added, (a, b) = args[:-2], args[-2:]
        last = a.ndim - 1
        self._note_product(a, b)
        ours, theirs = self.get(a), self.get(b)
        alike = self._is_uniform(a) or self._is_uniform(b)
        mine, their = self._sum(ours, last, theirs, last - 1, alike)
        mine += [axis for axis in ours if last not in varying(axis)]
        their += [axis for axis in theirs if last - 1 not in varying(axis)]
        for heads in filter(self._is_derived, mine):  # values that all heads share
            self.labels.shared += [core(axis) for axis in their if not varying(axis) & varying(heads)]
        result = self._match(
            [fit(axis.narrow(last, 0, 1), out.shape) for axis in mine],
            frozenset(),
            [fit(axis.narrow(last - 1, 0, 1), out.shape) for axis in their],
            frozenset(),
        )
        self.put(out, result)
        if added:
            self.put(out, self.meet([out, *added], out.shape))

    def _note_view(self, func, out, x):
        """Note that a tensor is a view of a parameter: the whole matrix, perhaps once for each sample, or a part."""
        if id(x) in self._weights and isinstance(out, torch.Tensor):
            _, weight, transposed = self._weights[id(x)]
            flips = func is torch.ops.aten.t.default
            repeats = func.overloadpacket.__name__ in REPEATS and out.shape[-2:] == x.shape[-2:]
            self._weights[id(out)] = out, weight if flips or repeats else None, transposed ^ flips

    def _note_product(self, a, b):
        """Note which dimension of a weight a product sums over, and of two activations what kind of product it is."""
        last = a.ndim - 1
        weights = [self._weights.get(id(tensor)) for tensor in (a, b)]
        for found, dim in zip(weights, (1, 0), strict=True):
            if found is not None and found[1] is not None and found[1].ndim == 2:
                self.sums[id(found[1])] = 1 - dim if found[2] else dim
        if weights != [None, None]:
            return
        ours, theirs = self._neurons(a, last, last - 1), self._neurons(b, last - 1, last)
        summed, left = zip(ours, theirs, strict=True)
        if None not in summed and left == (None, None):  # scores: queries times keys
            queries, keys = core(summed[0]).movedim(last, -1), core(summed[1]).movedim(last - 1, -1)
            rows, others = (unique_rows(some.reshape(-1, some.shape[-1]))[0] for some in (queries, keys))
            self.attentions.append([rows, None, others])
        elif summed == (None, None) and None in left:  # attention times values
            axis, dim = (left[0], last - 1) if left[1] is None else (left[1], last)
            if axis is not None and self.attentions and self.attentions[-1][1] is None:
                rows = core(axis).movedim(dim, -1)
                self.attentions[-1][1] = unique_rows(rows.reshape(-1, rows.shape[-1]))[0]
                self.multiplied.append(core(axis).flatten())
            return
        self.multiplied += [core(axis).flatten() for axis in summed + left if axis is not None]

    def _neurons(self, tensor, *dims):
        """For each of these dimensions the axis that varies along it, but not of heads alone; or None."""
        axes = [axis for axis in self.get(tensor) if not self._is_derived(axis)]
        return [next((axis for axis in axes if dim in varying(axis)), None) for dim in dims]

    def _convolution(self, func, out, x, weight, bias, stride, padding, dilation, transposed, output_padding, groups):
        self.heights[id(weight)] = out.shape[2]
        self._check_kernels(weight)
        if any(varying(axis) == {0, 1} for axis in self.get(x)) and groups == x.shape[1]:
            self._convolution_of_heads(out, x, weight, bias)
            return
        passing = [axis for axis in self.get(x) if varying(axis) != {1}]
        if any(1 in varying(axis) or self._slides(varying(axis), x, weight, out) for axis in passing):
            raise Untraceable("a convolution slides along neurons")
        weights = [[core(axis).flatten() for axis in self.get(weight) if varying(axis) == {dim}] for dim in (0, 1)]
        into, outof = weights if transposed else weights[::-1]  # labels of the kernels' inputs and outputs
        inputs = [core(axis).flatten() for axis in self.get(x) if varying(axis) == {1}]
        result = outof[0] if outof else None
        if groups == 1:
            self._sum(inputs, 0, into, 0)
        elif transposed and (groups != x.shape[1] or out.shape[1] != groups):
            raise Untraceable("a transposed convolution has groups")
        elif groups == x.shape[1]:
            result = self._depthwise(weights[0][0] if weights[0] else None, self._one(inputs, 0), groups, out.shape[1])
        else:
            self._grouped(self._one(inputs, 0), into, result, groups)
        if result is None and out.shape[1] > 1:
            raise Untraceable("a convolution has kernels that are no weights")
        axes = [fit(axis, out.shape) for axis in passing]
        if result is not None:
            for axis in self.get(bias) if bias is not None else ():
                self.labels.join(result, core(axis))
            axes.append(result.view(-1, *[1] * (out.ndim - 2)).expand(out.shape))
        self.put(out, axes)

    def _check_kernels(self, weight):
        for axis in self.get(weight):
            if not varying(axis) & {0, 1}:
                self._positions(core(axis))
            elif len(varying(axis)) > 1:
                raise Untraceable("the kernels of a convolution are computed from other weights")

    def _depthwise(self, kernels, inputs, groups, outputs):
        """Each channel is convolved by itself: the outputs are the inputs' neurons. Returns their labels."""
        if inputs is None:
            return kernels
        if kernels is None:
            return inputs.repeat_interleave(outputs // groups)
        self.labels.join(kernels.view(groups, -1), inputs.view(groups, 1))
        return kernels

    def _grouped(self, inputs, into, outputs, groups):
        """Record that the channels of a grouped convolution come in ``groups`` blocks."""
        group = self.labels.new(groups)
        if inputs is not None:
            blocks = inputs.view(groups, -1)
            self.constraints.append(BlockConstraint(group, blocks, always=True))
            if into:
                self.constraints.append(BlockConstraint(into[0], blocks.T))
        if outputs is not None:
            self.constraints.append(BlockConstraint(group, outputs.view(groups, -1), always=True))

    @staticmethod
    def _slides(dims, x, weight, out):
        """Whether a convolution mixes the values along these dimensions of its input."""
        return any(dim < 2 or weight.shape[dim] > 1 or out.shape[dim] != x.shape[dim] for dim in dims)

    def _convolution_of_heads(self, out, x, weight, bias):
        """A depthwise convolution over (heads, head_dim, height, width) whose kernels all heads share."""
        result = [fit(axis, out.shape) for axis in self.get(x)]
        for parameter in (weight, bias):
            for axis in self.get(parameter) if parameter is not None else ():
                if varying(axis) == {0}:
                    shared = core(axis).view(1, -1, *[1] * (out.ndim - 2)).expand(out.shape)
                    result = self._match(result, frozenset(), [shared], frozenset())
        self.put(out, result)

    # -- normalisations

    def _norm_of_channels(self, func, out, x, *args, **kwargs):
        count = 2 if func.overloadpacket is torch.ops.aten.native_group_norm else 4
        shape = [1, -1, *[1] * (x.ndim - 2)]
        result, full = list(self.get(x)), frozenset(dim for dim, size in enumerate(x.shape) if size > 1)
        for parameter in args[:count]:
            if parameter is not None:
                axes = [core(axis).view(shape).expand(x.shape) for axis in self.get(parameter)]
                result = self._match(result, full, axes, frozenset({1}))
        if func.overloadpacket is torch.ops.aten.native_group_norm and 1 < args[5] < x.shape[1]:
            for axis in result:
                if varying(axis) == {1}:
                    matrix = core(axis).view(args[5], -1)
                    self.constraints.append(BlockConstraint(self.labels.new(args[5]), matrix, always=True))
        self.put(out[0], result)

    def _layer_norm(self, func, out, x, shape, weight, bias, *args):
        self.put(out[0], self.meet([t for t in (x, weight, bias) if t is not None], x.shape))

    def _glu(self, func, out, x, dim=-1):
        """One half is multiplied by the sigmoid of the other."""
        halves = [axis.chunk(2, dim) for axis in self.get(x)]
        ours, theirs = ([pair[number] for pair in halves] for number in (0, 1))
        self.put(out, self._match(ours, frozenset(), theirs, frozenset()))

    def _im2col(self, func, out, x, *args):  # (batch, channels * kernel positions, places)
        axes = [core(axis) for axis in self.get(x)]
        if any(varying(axis) != {1} for axis in axes):
            raise Untraceable("a convolution slides along neurons")
        times = out.shape[1] // x.shape[1]
        self.put(out, [c.flatten().repeat_interleave(times).view(1, -1, 1).expand(out.shape) for c in axes])

    def _col2im(self, func, out, x, *args):
        axes = []
        for axis in self.get(x):
            if varying(axis) != {1}:
                raise Untraceable("a convolution slides along neurons")
            rows = core(axis).view(out.shape[1], -1)
            self.labels.join(rows, rows[:, :1])
            axes.append(rows[:, 0].view(1, -1, 1, 1).expand(out.shape))
        self.put(out, axes)

    RULES = {
        **dict.fromkeys(MOVES, _move),
        **dict.fromkeys(ALONE, _alone),
        **dict.fromkeys(TOGETHER, _together),
        **dict.fromkeys(OVER_SPACE, _over_space),
        **dict.fromkeys(REDUCTIONS, _reduce),
        **dict.fromkeys(("cat", "stack"), _cat),
        **dict.fromkeys(("mm", "bmm", "addmm", "baddbmm"), _product),
        **dict.fromkeys(("native_batch_norm", "native_group_norm"), _norm_of_channels),
        "native_layer_norm": _layer_norm,
        "convolution": _convolution,
        "im2col": _im2col,
        "col2im": _col2im,
        "index": _index,
        "pixel_shuffle": _pixel_shuffle,
        "embedding": _embedding,
        "glu": _glu,
    }


def _aligned(pieces, dim):
    """Match the axes of tensors that are concatenated along ``dim``: those that vary along the same other dimensions.

    Yields (these dimensions, [the axis of each tensor, or None]).
    """
    kinds = [[varying(axis) - {dim} for axis in axes] for axes in pieces]
    for kind in dict.fromkeys(kind for found in kinds for kind in found):
        for nth in range(max(found.count(kind) for found in kinds)):
            parts = []
            for axes, found in zip(pieces, kinds, strict=True):
                fitting = [axis for axis, its in zip(axes, found, strict=True) if its == kind]
                parts.append(fitting[nth] if nth < len(fitting) else None)
            yield kind, parts


def _storage(tensor):
    """The memory that a tensor shares with its views."""
    return tensor.untyped_storage()._cdata


def _tensors(value):
    """The tensors inside an argument of an operation."""
    if isinstance(value, torch.Tensor):
        return (value,)
    return tuple(item for item in value if isinstance(item, torch.Tensor)) if isinstance(value, (list, tuple)) else ()


@dataclass(frozen=True)
class Trace:
    """What one forward pass tells of a model.

    Attributes:
        dims: {key: labels of each dimension}, of every tensor in the state_dict.
        labels, constraints: as of ``Tracer``.
        heights: {key of a convolution's weight: height of its output}.
        met: keys of the tensors that the forward pass uses.
        output_layers: {name of a linear layer or convolution that gives an output of the model: number of its outputs}.
        attentions, multiplied: as of ``Tracer``, of attentions with values.
        sums: {key of a matrix of weights: the dimension over which a product sums}.
    """

    dims: dict
    labels: Labels
    constraints: list
    heights: dict
    met: frozenset
    output_layers: dict
    attentions: list
    multiplied: list
    sums: dict


def trace(model: nn.Module, inputs: tuple | dict) -> Trace:
    """Follow the neurons of a model through a forward pass. Its weights are neither read nor changed.

    Args:
        model: on any device, also on the meta device.
        inputs: example inputs of the forward pass, its arguments or its keyword arguments. They are moved to the meta
            device, and numbers to float32 as the model. The channels of images, (batch, channels, height, width), are
            no neurons.

    Raises:
        Untraceable: the model does something that neurons cannot be followed through.
        RefusedInputs: its forward pass fails on the inputs.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise Untraceable("it is a TorchScript program; give the module that it was made from")
    for key, value in model.state_dict().items():
        if is_lazy(value):
            raise Untraceable(f"{key} has no shape yet; run the model once on example inputs")
        if not isinstance(value, torch.Tensor) and not _is_extra(key):
            raise Untraceable(f"{key} is no tensor, as in quantised models; give the model as it was before")
    skeleton = skeleton_of(model).float().eval()
    tracer = Tracer()
    inputs = tree_map_only(torch.Tensor, _on_meta, inputs)
    channels = [tracer.label_channels(images) for images in tree_leaves(inputs) if _is_images(images)]
    state = tensors_of(skeleton, keep_vars=True)
    labelled = {}  # a tied tensor has one set of labels
    for value in state.values():
        if id(value) not in labelled:
            labelled[id(value)] = tracer.label(value)
    modules = _Modules(skeleton)
    try:
        with torch.no_grad(), modules, tracer:
            output = run_forward(skeleton, inputs)
    except Untraceable as reason:
        raise Untraceable(modules.where() + str(reason)) from reason
    except (RuntimeError, AssertionError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
        reason = " ".join((str(error).strip() or type(error).__name__).splitlines()[0].split())
        if re.search(NO_VALUES, reason):
            message = f"its forward pass looks at the values of tensors, which a trace does not have ({reason})"
            raise Untraceable(modules.where() + message) from error
        raise RefusedInputs(f"{modules.where()}its forward pass of {_shapes(inputs)} fails ({reason})") from error
    tracer.labels.positions += channels
    return Trace(
        dims={key: labelled[id(value)] for key, value in state.items()},
        labels=tracer.labels,
        constraints=tracer.constraints,
        heights={key: tracer.heights[id(value)] for key, value in state.items() if id(value) in tracer.heights},
        met=frozenset(key for key, value in state.items() if id(value) in tracer.met),
        output_layers=modules.giving(output, tracer.resized),
        attentions=[found for found in tracer.attentions if found[1] is not None],
        multiplied=tracer.multiplied,
        sums={key: tracer.sums[id(value)] for key, value in state.items() if id(value) in tracer.sums},
    )


def tensors_of(model: nn.Module, **options) -> dict:
    """A model's state_dict without what its modules add beside tensors (``get_extra_state``)."""
    return {key: value for key, value in model.state_dict(**options).items() if not _is_extra(key)}


def _is_extra(key):
    return key.rpartition(".")[2] == EXTRA_STATE


def _on_meta(tensor):
    return tensor.detach().to("meta", torch.float32 if tensor.is_floating_point() else tensor.dtype)


def _is_images(value):
    return isinstance(value, torch.Tensor) and value.ndim == 4 and value.is_floating_point()


def _shapes(inputs):
    """The inputs in words, for errors: (1, 3, 224, 224) images, or what was given."""
    named = inputs.items() if isinstance(inputs, dict) else (("", value) for value in inputs)
    words = [f"{name} {tuple(value.shape)}".strip() for name, value in named if isinstance(value, torch.Tensor)]
    return f"{words[0]} images" if len(words) == 1 and any(map(_is_images, tree_leaves(inputs))) else ", ".join(words)


class _Modules:
    """Notes which module runs, for errors, and what linear layers and convolutions give: some give the outputs."""

    def __init__(self, model):
        self.model = model
        self.running = []  # names of the modules whose forward has begun and not ended
        self.given = []  # (output, name, number of outputs) of a linear layer or convolution

    def __enter__(self):
        self.hooks = []
        for name, module in self.model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):  # takes no hooks
                continue
            self.hooks.append(module.register_forward_pre_hook(partial(self._begin, name)))
            if type(module) in ASKS_IF_CAUSAL:
                self.hooks.append(module.register_forward_pre_hook(_is_not_causal, with_kwargs=True))
            self.hooks.append(module.register_forward_hook(partial(self._end, name)))
        return self

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()

    def _begin(self, name, module, args):
        self.running.append(name)

    def _end(self, name, module, args, output):
        self.running.pop()
        if isinstance(module, nn.Linear):
            self.given.append((output, name, module.out_features))
        elif isinstance(module, nn.modules.conv._ConvNd):
            self.given.append((output, name, module.out_channels))

    def where(self) -> str:
        """The innermost module in which the forward pass stopped, as the beginning of an error."""
        return f"in {self.running[-1]}: " if self.running and self.running[-1] else ""

    def giving(self, output, resized) -> dict:
        """{name of the layer: number of its outputs}, of the tensors in the model's output, also if it resizes them."""
        storages = {_storage(tensor) for tensor in tree_leaves(output) if isinstance(tensor, torch.Tensor)}
        while before := {resized[storage] for storage in storages & resized.keys()} - storages:
            storages |= before
        return {name: size for given, name, size in self.given if _storage(given) in storages}


def _is_not_causal(module, args, kwargs):
    """Tell a transformer of PyTorch to take its mask as it is, and not to look at values whether the mask is causal."""
    option = ASKS_IF_CAUSAL[type(module)]
    return args, {**kwargs, option: kwargs.get(option) or False}


def run_forward(model: nn.Module, inputs: tuple | dict):
    """What a model gives for inputs: a tuple of arguments, or a dict of keyword arguments."""
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def skeleton_of(model: nn.Module) -> nn.Module:
    """A copy on the meta device, which shares no weight and takes no memory.

    Where its config lets a model choose, the copy computes attention from matrix products: fused kernels do not run on
    the meta device, and masks for them are made by looking at values.

    Raises:
        InputError: as ``copy_of``.
    """
    memo = {}
    for tensor in chain(model.parameters(), model.buffers(), computed(model)):
        bare = tensor.detach().to("meta")
        memo[id(tensor)] = nn.Parameter(bare, requires_grad=False) if isinstance(tensor, nn.Parameter) else bare
    skeleton = copy_of(model, memo)
    for module in skeleton.modules():
        if hasattr(getattr(module, "config", None), "_attn_implementation"):  # Hugging Face's
            module.config._attn_implementation = "eager"
    return skeleton
