"""Which neurons of a model's tensors are the same neurons: found by following one forward pass, assumed of none.

Every index along every dimension of every parameter gets a label. The model runs once on the meta device, where no
number is computed, and beside each activation goes which labels its dimensions carry. What moves data (views, splits,
concatenations, rolls) moves the labels by the very same operation. Where two tensors meet in a sum or a product their
labels become one; where a matrix product sums over a dimension, the labels of both sides become one and the labels of
the weight's other dimension take over. What is met by no neuron, such as a kernel's width or a table of positions, is
marked as a position.
"""

import copy
import math
from dataclasses import dataclass
from itertools import chain

import torch
import torch.nn as nn
from torch.utils._python_dispatch import TorchDispatchMode

from weight_selection.sources.membership import recorded_names
from weight_selection.tracing.labels import Labels, Link, compact, core, fit, unique_rows, varying


class Untraceable(Exception):
    """A forward pass does what neurons cannot be followed through; the message says what."""


def _names(text):
    return frozenset(text.split())


# What operations do to labels, by their names in torch.ops.aten. Everything else is refused.
MOVES = _names("""
    view _unsafe_view t permute transpose expand unbind select slice unsqueeze squeeze split split_with_sizes
    unsafe_split repeat roll flip unfold alias clone detach as_strided_
""")  # of data: done to the labels by the operation itself
ALONE = _names("""
    gelu relu relu_ silu silu_ sigmoid sigmoid_ hardsigmoid hardsigmoid_ hardswish hardswish_ hardtanh hardtanh_ elu
    elu_ leaky_relu leaky_relu_ softplus mish mish_ tanh tanh_ exp log sqrt rsqrt reciprocal square neg abs sin cos erf
    clamp clamp_ clamp_min clamp_max _softmax _safe_softmax _to_copy logical_not bitwise_not
""")  # each element by itself, or lines normalised
TOGETHER = _names("""
    add add_ sub sub_ rsub mul mul_ div div_ pow maximum minimum addcmul where copy_ floor_divide remainder masked_fill
    masked_fill_ eq ne gt ge lt le
""")  # tensors met element by element
OVER_SPACE = _names("""
    avg_pool2d max_pool2d_with_indices _adaptive_avg_pool2d adaptive_max_pool2d upsample_nearest2d upsample_bilinear2d
    upsample_bicubic2d upsample_linear1d _upsample_bilinear2d_aa _upsample_bicubic2d_aa constant_pad_nd
    reflection_pad2d replication_pad2d
""")  # height and width change
REDUCTIONS = _names("mean sum amax amin max min linalg_vector_norm var all any")
# of one value everywhere
UNIFORM = _names("empty zeros ones full scalar_tensor new_zeros zeros_like ones_like empty_like")
CONSTANTS = UNIFORM | _names("arange linspace eye lift_fresh _assert_async")
KEEP = _names("alias clone detach as_strided_")  # of the moves, those that leave every element where it is


class Tracer(TorchDispatchMode):
    """Follows labels through what is run under it.

    Attributes:
        labels: classes of labels.
        links: what ``Link`` describes, in order of execution.
        heights: {id of a convolution's weight: height of what it gives}.
    """

    def __init__(self):
        super().__init__()
        self.labels = Labels()
        self.links = []
        self.heights = {}
        self._layers = {}  # id of a tensor: (the tensor, so that its id stays its own, its labels)
        self.met = set()  # ids of tensors that took part
        self._uniform = {}  # storage of a tensor with one value everywhere: the tensor

    def get(self, tensor):
        return self._layers.get(id(tensor), (None, ()))[1] if isinstance(tensor, torch.Tensor) else ()

    def put(self, tensor, layers):
        self._layers[id(tensor)] = tensor, [layer for layer in map(compact, layers) if varying(layer)]

    def label(self, tensor):
        """New labels for every dimension of a parameter, a tuple."""
        labels = {dim: self.labels.new(size) for dim, size in enumerate(tensor.shape)}
        shapes = {dim: [-1 if other == dim else 1 for other in range(tensor.ndim)] for dim in labels}
        self.put(tensor, [labels[dim].view(shapes[dim]).expand(tensor.shape) for dim in labels])
        return tuple(labels.values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
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
        if name.endswith("_") and len(arguments) > 1:  # written into
            self._uniform.pop(_storage(out), None)
        return out

    def _is_uniform(self, tensor):
        return _storage(tensor) in self._uniform

    # -- rules: each gives the outputs their labels

    def _move(self, func, out, x, *args, **kwargs):
        if func.overloadpacket.__name__ in KEEP:
            if out.shape != x.shape:
                raise Untraceable(f"{func} changes a tensor's layout")
            self.put(out, self.get(x))
            return
        outs = [[] for _ in out] if isinstance(out, (tuple, list)) else [[]]
        for layer in self.get(x):
            if func in (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default):
                moved = layer.reshape(out.shape)
            else:
                moved = func(layer, *args, **kwargs)
            for into, piece in zip(outs, moved if isinstance(out, (tuple, list)) else [moved], strict=True):
                into.append(piece)
        for tensor, layers in zip(out if isinstance(out, (tuple, list)) else [out], outs, strict=True):
            self.put(tensor, layers)

    def _alone(self, func, out, x, *args, **kwargs):
        first = out[0] if isinstance(out, tuple) else out
        self.put(first, self.get(x))

    def _together(self, func, out, *args, **kwargs):
        tensors = [arg for arg in chain(*map(_tensors, args)) if arg.ndim]
        if func.overloadpacket is torch.ops.aten.copy_:  # what was there before does not count
            if out.untyped_storage().nbytes() != out.numel() * out.itemsize:
                raise Untraceable("a part of a tensor is written over")
            self.put(out, self.meet(tensors[1:], out.shape))
        else:
            self.put(out, self.meet(tensors, out.shape))

    def _over_space(self, func, out, x, *args, **kwargs):
        first = out[0] if isinstance(out, tuple) else out
        layers = []
        for layer in self.get(x):
            dims = varying(layer)
            changed = {dim for dim in dims if first.shape[dim] != x.shape[dim]}
            if func.overloadpacket is torch.ops.aten.constant_pad_nd and changed:
                layers.append(self._padded(layer, changed, first.shape, args[0]))
            elif max(dims) < 2 or func.overloadpacket is torch.ops.aten.constant_pad_nd:
                layers.append(fit(layer, first.shape))
            elif min(dims) >= 2:  # interpolated or pooled along what are positions, then
                self._positions(core(layer))
            else:
                raise Untraceable(f"{func} runs along neurons")
        self.put(first, layers)

    def _padded(self, layer, dims, shape, pads):
        """Labels of neurons beside constants, which are neurons of no parameter."""
        kept = core(layer)
        size = [shape[dim] if dim in dims else n for dim, n in enumerate(kept.shape)]
        padded = self.labels.new(torch.Size(size).numel()).view(size)
        inside = padded
        for dim in dims:
            inside = inside.narrow(dim, max(pads[2 * (layer.ndim - 1 - dim)], 0), kept.shape[dim])
        inside.copy_(kept)
        return padded.expand(shape)

    def _cat(self, func, out, tensors, dim=0):
        dim = dim % out.ndim
        stacked = func.overloadpacket is torch.ops.aten.stack
        pieces = [[layer.unsqueeze(dim) if stacked else layer for layer in self.get(tensor)] for tensor in tensors]
        shapes = [(*t.shape[:dim], 1, *t.shape[dim:]) if stacked else tuple(t.shape) for t in tensors]
        result = []
        for kind, parts in _aligned(pieces, dim):
            present = [part for part in parts if part is not None]
            if kind and not stacked and not any(dim in varying(part) for part in present):
                for part in present[1:]:  # rows, tokens: each has the same neurons
                    self.labels.join(core(present[0]).narrow(dim, 0, 1), core(part).narrow(dim, 0, 1))
                result.append(fit(present[0].narrow(dim, 0, 1), out.shape))
            elif any(part is None and layers for part, layers in zip(parts, pieces, strict=True)):
                for part in present:  # tokens beside an image's positions
                    self._positions(core(part))
            else:
                filled = []
                for part, shape in zip(parts, shapes, strict=True):
                    size = [n if d == dim or d in kind else 1 for d, n in enumerate(shape)]
                    if part is None:  # constants: neurons of no parameter
                        part = self.labels.new(torch.Size(size).numel()).view(size)
                    filled.append(core(part).expand(size))
                result.append(fit(torch.cat(filled, dim), out.shape))
        self.put(out, result)

    def _index(self, func, out, x, indices, *args, **kwargs):
        layers = []
        picked = [dim for dim, index in enumerate(indices) if index is not None]
        for layer in self.get(x):
            if varying(layer) & set(picked):  # what indices pick from are positions
                self._positions(core(layer))
            else:
                zeros = [None if index is None else torch.zeros(index.shape, dtype=torch.int64) for index in indices]
                layers.append(layer[tuple(slice(None) if index is None else index for index in zeros)])
        self.put(out, layers)

    def _reduce(self, func, out, x, *args, **kwargs):
        first = out[0] if isinstance(out, tuple) else out
        if func.overloadpacket is torch.ops.aten.linalg_vector_norm:
            args = args[1:]
        dims = args[0] if args else kwargs.get("dim")
        if dims is None or (isinstance(dims, (list, tuple)) and not dims):
            dims = range(x.ndim)
        dims = {dim % x.ndim for dim in ([dims] if isinstance(dims, int) else dims)}
        kept = first.ndim == x.ndim
        layers = []
        for layer in self.get(x):
            if varying(layer) & dims:
                layer = self._heads(layer, dims)
                if layer is None:
                    continue
            for dim in sorted(dims, reverse=True):
                layer = layer.narrow(dim, 0, 1) if kept else layer.select(dim, 0)
            layers.append(layer)
        self.put(first, layers)

    def _heads(self, layer, dims):
        """Labels of what is left when neurons are summed over ``dims``: heads, if there are several; else None."""
        rest = sorted(varying(layer) - dims)
        if not rest:
            return None
        rows = core(layer).permute(rest + [dim for dim in range(layer.ndim) if dim not in rest])
        matrix, places = unique_rows(rows.flatten(len(rest)).flatten(0, len(rest) - 1))
        if len(matrix) == 1:
            return None
        heads = self.labels.new(len(matrix), derived=True)
        self.links.append(Link(heads, matrix))
        shape = [layer.shape[dim] if dim in rest else 1 for dim in range(layer.ndim)]
        return heads[places].view(shape).expand(layer.shape)

    def _positions(self, labels):
        self.labels.positions.append(labels.flatten())
        return labels

    def meet(self, tensors, shape):
        """Labels of the element-wise combination of tensors that broadcast to ``shape``."""
        result, filled = [], frozenset()
        for tensor in tensors:
            if self._is_uniform(tensor):
                continue
            lead = len(shape) - tensor.ndim
            full = frozenset(dim + lead for dim in varying(tensor))  # an expanded dimension has one value
            layers = [core(layer)[(None,) * lead].expand(shape) for layer in self.get(tensor)]
            if tensor is tensors[0] or not filled and not result:
                result, filled = layers, full
                continue
            result = self._match(result, filled, layers, full)
            filled |= full
        return result

    def _match(self, ours, our_full, theirs, their_full):
        theirs = list(theirs)
        kept = []
        for layer in ours:
            dims = varying(layer)
            twin = next((other for other in theirs if varying(other) == dims), None)
            if twin is not None:
                theirs = [other for other in theirs if other is not twin]
                self.labels.join(core(layer), core(twin))
                if self._is_derived(layer) and not self._is_derived(twin):
                    layer = twin
                kept.append(layer)
                continue
            kept += self._unmatched(layer, theirs, their_full)
        for layer in theirs:
            kept += self._unmatched(layer, ours, our_full)
        solid = [layer for layer in kept if not self._is_derived(layer)]
        return [k for k in kept if not self._is_derived(k) or not any(varying(k) < varying(s) for s in solid)]

    def _unmatched(self, layer, others, full):
        """What remains of labels that meet a tensor which has none along the same dimensions."""
        dims, covered = varying(layer), False
        for other in others:
            part = varying(other)
            if part < dims:
                self._link(layer, other, part)
            covered = covered or dims < part  # linked from the other side
        if covered:
            return []
        met = (dims & full).difference(*map(varying, others))
        if met and met == dims:
            self._positions(core(layer))
            return []
        if met:
            self._link(layer, None, met)
        return [layer]

    def _link(self, layer, other, part):
        """Record that ``other``, which depends on the dimensions ``part``, meets labels that depend on more."""
        order = sorted(part) + [dim for dim in range(layer.ndim) if dim not in part]
        rows = core(layer).permute(order)
        matrix = rows.flatten(len(part)).flatten(0, len(part) - 1)
        labels = None
        if other is not None:
            labels = core(other).permute(order).flatten()
        if len(matrix) > 4096 or (labels is not None and len(labels) != len(matrix)):
            raise Untraceable("neurons are spread over positions")
        self.links.append(Link(labels, matrix))

    def _is_derived(self, layer):
        return bool(self.labels.derived[core(layer).flatten()[0]])

    # -- products

    def _sum(self, ours, our_dim, theirs, their_dim):
        """Let two operands' neurons meet in a sum of products; labels of heads that it leaves: (of ours, of theirs)."""
        ours, theirs = self._one(ours, our_dim), self._one(theirs, their_dim)
        if ours is not None and theirs is not None:
            a, b = core(ours).movedim(our_dim, -1), core(theirs).movedim(their_dim, -1)
            free = varying(ours) - {our_dim}, varying(theirs) - {their_dim}
            if free[0] == free[1]:
                self.labels.join(a, b)
            elif not free[0] or not free[1]:
                many, few = (a, b) if free[0] else (b, a)
                rows = many.reshape(-1, many.shape[-1])
                self.links.append(Link(few.reshape(-1), unique_rows(rows)[0].T))
            else:
                raise Untraceable("a product sums over neurons that differ from place to place")
        elif ours is not None or theirs is not None:
            lone, dim = (ours, our_dim) if ours is not None else (theirs, their_dim)
            if varying(lone) != {dim}:
                raise Untraceable("a product sums over neurons with what are none")
            self._positions(core(lone))
        heads = None if ours is None else self._heads(ours, {our_dim})
        if heads is not None:
            return [heads], []
        heads = None if theirs is None else self._heads(theirs, {their_dim})
        return [], [] if heads is None else [heads]

    def _one(self, layers, dim):
        """Of labels that depend on a dimension those to sum over, or None."""
        found = [layer for layer in layers if dim in varying(layer)]
        found = [layer for layer in found if not self._is_derived(layer)] or found[:1]
        if len(found) > 1:
            raise Untraceable("a product sums over several kinds of neurons at once")
        return found[0] if found else None

    def _product(self, func, out, *args, **kwargs):
        """mm, bmm, addmm, baddbmm: (..., i, k) x (..., k, j) -> (..., i, j)."""
        added, (a, b) = args[:-2], args[-2:]
        last = a.ndim - 1
        ours, theirs = self.get(a), self.get(b)
        mine, their = self._sum(ours, last, theirs, last - 1)
        mine += [layer for layer in ours if last not in varying(layer)]
        their += [layer for layer in theirs if last - 1 not in varying(layer)]
        result = self._match(
            [fit(layer.narrow(last, 0, 1), out.shape) for layer in mine],
            frozenset(),
            [fit(layer.narrow(last - 1, 0, 1), out.shape) for layer in their],
            frozenset(),
        )
        self.put(out, result)
        if added:
            self.put(out, self.meet([out, *added], out.shape))

    def _convolution(self, func, out, x, weight, bias, stride, padding, dilation, transposed, output_padding, groups):
        self.heights[id(weight)] = out.shape[2]
        into, outof = (0, 1) if transposed else (1, 0)
        for layer in self.get(weight):
            if not varying(layer) & {0, 1}:
                self._positions(core(layer))
            elif len(varying(layer)) > 1:
                raise Untraceable("the kernels of a convolution are computed from other weights")
        if any(varying(layer) == {0, 1} for layer in self.get(x)) and groups == x.shape[1]:
            self._convolution_of_heads(out, x, weight, bias)
            return
        passing = [layer for layer in self.get(x) if varying(layer) != {1}]
        if any(1 in varying(layer) or self._slides(varying(layer), x, weight, out) for layer in passing):
            raise Untraceable("a convolution slides along neurons")
        weights = {dim: [core(lay).flatten() for lay in self.get(weight) if varying(lay) == {dim}] for dim in (0, 1)}
        inputs = [core(layer).flatten() for layer in self.get(x) if varying(layer) == {1}]
        result = weights[outof][0] if weights[outof] else None
        if groups == 1:
            self._sum(inputs, 0, weights[into], 0)
        elif groups == x.shape[1]:  # depthwise: what comes out is what went in
            inputs = self._one(inputs, 0)
            if transposed:
                if out.shape[1] != groups:
                    raise Untraceable("a transposed convolution has groups")
                result = weights[0][0] if weights[0] else None
            if inputs is not None and result is not None:
                self.labels.join(result.view(groups, -1), inputs.view(groups, 1))
            elif inputs is not None:
                result = inputs.repeat_interleave(out.shape[1] // groups)
        else:
            if transposed:
                raise Untraceable("a transposed convolution has groups")
            group = self.labels.new(groups)
            inputs = self._one(inputs, 0)
            if inputs is not None:
                matrix = inputs.view(groups, -1)
                self.links.append(Link(group, matrix, always=True))
                if weights[into]:
                    self.links.append(Link(weights[into][0], matrix.T))
            if result is not None:
                self.links.append(Link(group, result.view(groups, -1), always=True))
        if result is None and out.shape[1] > 1:
            raise Untraceable("a convolution has kernels that are no weights")
        layers = [fit(layer, out.shape) for layer in passing]
        if result is not None:
            for layer in self.get(bias) if bias is not None else ():
                self.labels.join(result, core(layer))
            layers.append(result.view(-1, *[1] * (out.ndim - 2)).expand(out.shape))
        self.put(out, layers)

    @staticmethod
    def _slides(dims, x, weight, out):
        """Whether a convolution mixes what lies along dimensions of its input."""
        return any(dim < 2 or weight.shape[dim] > 1 or out.shape[dim] != x.shape[dim] for dim in dims)

    def _convolution_of_heads(self, out, x, weight, bias):
        """A depthwise convolution (heads, head_dim, height, width) that all heads share."""
        result = [fit(layer, out.shape) for layer in self.get(x)]
        for parameter in (weight, bias):
            for layer in self.get(parameter) if parameter is not None else ():
                if varying(layer) == {0}:
                    shared = core(layer).view(1, -1, *[1] * (out.ndim - 2)).expand(out.shape)
                    result = self._match(result, frozenset(), [shared], frozenset())
        self.put(out, result)

    # -- normalisations

    def _norm_of_channels(self, func, out, x, *args, **kwargs):
        count = 2 if func.overloadpacket is torch.ops.aten.native_group_norm else 4
        shape = [1, -1, *[1] * (x.ndim - 2)]
        result, full = list(self.get(x)), frozenset(dim for dim, size in enumerate(x.shape) if size > 1)
        for parameter in args[:count]:
            if parameter is not None:
                layers = [core(layer).view(shape).expand(x.shape) for layer in self.get(parameter)]
                result = self._match(result, full, layers, frozenset({1}))
        if func.overloadpacket is torch.ops.aten.native_group_norm and 1 < args[5] < x.shape[1]:
            for layer in result:
                if varying(layer) == {1}:
                    matrix = core(layer).view(args[5], -1)
                    self.links.append(Link(self.labels.new(args[5]), matrix, always=True))
        self.put(out[0], result)

    def _layer_norm(self, func, out, x, shape, weight, bias, *args):
        self.put(out[0], self.meet([t for t in (x, weight, bias) if t is not None], x.shape))

    def _im2col(self, func, out, x, *args):  # (batch, channels * kernel positions, places)
        layers = [core(layer) for layer in self.get(x)]
        if any(varying(layer) != {1} for layer in layers):
            raise Untraceable("a convolution slides along neurons")
        times = out.shape[1] // x.shape[1]
        self.put(out, [c.flatten().repeat_interleave(times).view(1, -1, 1).expand(out.shape) for c in layers])

    def _col2im(self, func, out, x, *args):
        layers = []
        for layer in self.get(x):
            if varying(layer) != {1}:
                raise Untraceable("a convolution slides along neurons")
            rows = core(layer).view(out.shape[1], -1)
            self.labels.join(rows, rows[:, :1])
            layers.append(rows[:, 0].view(1, -1, 1, 1).expand(out.shape))
        self.put(out, layers)

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
    }


def _aligned(pieces, dim):
    """Layers of several tensors that go together: those that depend on the same dimensions besides ``dim``.

    Yields (these dimensions, [layer of each tensor, or None]).
    """
    kinds = [[varying(layer) - {dim} for layer in layers] for layers in pieces]
    for kind in dict.fromkeys(kind for found in kinds for kind in found):
        for nth in range(max(found.count(kind) for found in kinds)):
            parts = []
            for layers, found in zip(pieces, kinds, strict=True):
                fitting = [layer for layer, its in zip(layers, found, strict=True) if its == kind]
                parts.append(fitting[nth] if nth < len(fitting) else None)
            yield kind, parts


def _storage(tensor):
    """What a tensor and its views have in common."""
    return tensor.untyped_storage()._cdata


def _tensors(value):
    """The tensors in an argument of an operation."""
    if isinstance(value, torch.Tensor):
        return (value,)
    return tuple(item for item in value if isinstance(item, torch.Tensor)) if isinstance(value, (list, tuple)) else ()


@dataclass(frozen=True)
class Traced:
    """What one forward pass tells of a model.

    Attributes:
        dims: {key: labels of each dimension}.
        labels, links: as of ``Tracer``.
        heights: {key of a convolution: height of what it gives}.
        met: keys of the tensors that the forward pass uses.
    """

    dims: dict
    labels: Labels
    links: list
    heights: dict
    met: frozenset


def trace(model: nn.Module) -> Traced:
    """Follow the neurons of a timm model through a forward pass; its weights are neither read nor changed.

    Raises:
        Untraceable: the model does something that neurons cannot be followed through.
    """
    skeleton = _skeleton(model).float().eval()
    tracer = Tracer()
    images = torch.empty(1, *input_size(model), device="meta")
    tracer.put(images, [(channels := tracer.labels.new(images.shape[1])).view(1, -1, 1, 1).expand(images.shape)])
    state = skeleton.state_dict(keep_vars=True)
    dims = {}
    known = {}
    for key, value in state.items():
        if id(value) not in known:
            known[id(value)] = tracer.label(value)
        dims[key] = known[id(value)]
    try:
        with torch.no_grad(), tracer:
            skeleton(images)
    except (RuntimeError, AssertionError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
        raise Untraceable(f"its forward pass of {tuple(images.shape)} images fails ({error})") from error
    tracer.labels.positions.append(channels)
    heights = {key: tracer.heights[id(value)] for key, value in state.items() if id(value) in tracer.heights}
    met = frozenset(key for key, value in state.items() if id(value) in tracer.met)
    return Traced(dims, tracer.labels, tracer.links, heights, met)


def _skeleton(model):
    """A copy on the meta device, which shares no weight and takes no memory."""
    tensors = chain(model.parameters(), model.buffers())
    memo = {}
    for tensor in tensors:
        bare = tensor.detach().to("meta")
        memo[id(tensor)] = nn.Parameter(bare, requires_grad=False) if isinstance(tensor, nn.Parameter) else bare
    return copy.deepcopy(model, memo)


def input_size(model: nn.Module) -> tuple:
    """(channels, height, width) of the images that a timm model is built for."""
    channels, *size = model.pretrained_cfg["input_size"]
    readers = first_convolutions(model)
    for name, module in model.named_modules():  # an embedding of patches may ask for one size
        if getattr(module, "img_size", None) and any(key.startswith(f"{name}.") for key in readers):
            size = module.img_size
    for convolution in readers.values():
        times = convolution.in_channels / channels
        if times == 1 or math.isqrt(int(times)) ** 2 != times:  # else squares of pixels were moved into channels
            channels = convolution.in_channels
    return channels, *size


def first_convolutions(model: nn.Module) -> dict:
    """{key of its weight: convolution that reads the image}, as timm records them."""
    modules = {name: model.get_submodule(name) for name in recorded_names(model, "first_conv")}
    return {f"{name}.weight": module for name, module in modules.items() if isinstance(module, nn.Conv2d)}
