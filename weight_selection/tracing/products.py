"""Rules of products: of matrices, and of convolutions with their kernels.

Where a product sums over a dimension, the labels of both sides become the same. It carries those of their other
dimensions on. A projection wants to know what was multiplied by what, so this is noted too.
"""

import torch

from weight_selection.tracing.labels import BlockConstraint, along, core, fit, unique_rows, varying
from weight_selection.tracing.tracer import Tracer, Untraceable, as_rows

REPEATS = frozenset(("expand", "view", "_unsafe_view"))  # with the last two sizes as before, they repeat a matrix


def product(tracer: Tracer, func, out, *args, **kwargs):
    """mm, bmm, addmm, baddbmm: (..., i, k) x (..., k, j) -> (..., i, j)."""
    added, (a, b) = args[:-2], args[-2:]
    last = a.ndim - 1
    _note_product(tracer, a, b)
    ours, theirs = tracer.get(a), tracer.get(b)
    mine, their = _sum(tracer, ours, last, theirs, last - 1, tracer.is_uniform(a) or tracer.is_uniform(b))
    mine += [axis for axis in ours if last not in varying(axis)]
    their += [axis for axis in theirs if last - 1 not in varying(axis)]
    for heads in filter(tracer.is_derived, mine):  # values that all heads share
        tracer.labels.shared += [core(axis) for axis in their if not varying(axis) & varying(heads)]
    mine = [fit(axis.narrow(last, 0, 1), out.shape) for axis in mine]
    their = [fit(axis.narrow(last - 1, 0, 1), out.shape) for axis in their]
    axes = tracer.match(mine, their)
    if not added:
        return axes
    tracer.put(out, axes)
    return tracer.meet([out, *added], out.shape)


def note_view(tracer: Tracer, func, out, x):
    """Note that a tensor is a view of a parameter: the whole matrix, perhaps once for each sample, or a part."""
    if id(x) in tracer.views and isinstance(out, torch.Tensor):
        _, weight, transposed = tracer.views[id(x)]
        flips = func is torch.ops.aten.t.default
        repeats = func.overloadpacket.__name__ in REPEATS and out.shape[-2:] == x.shape[-2:]
        tracer.views[id(out)] = out, weight if flips or repeats else None, transposed ^ flips


def _note_product(tracer, a, b):
    """Note which dimension of a weight a product sums over, and of two activations what kind of product it is."""
    last = a.ndim - 1
    views = [tracer.views.get(id(tensor)) for tensor in (a, b)]
    for found, dim in zip(views, (1, 0), strict=True):
        if found is not None and found[1] is not None and found[1].ndim == 2:
            tracer.sums[id(found[1])] = 1 - dim if found[2] else dim
    if views != [None, None]:
        return
    ours, theirs = _neurons(tracer, a, last, last - 1), _neurons(tracer, b, last - 1, last)
    summed, left = zip(ours, theirs, strict=True)
    if None not in summed and left == (None, None):  # scores: queries times keys
        queries, keys = _heads_of(summed[0], last), _heads_of(summed[1], last - 1)
        tracer.attentions.append([queries, None, keys])
    elif summed == (None, None) and None in left:  # attention times values
        axis, dim = (left[0], last - 1) if left[1] is None else (left[1], last)
        if axis is not None and tracer.attentions and tracer.attentions[-1][1] is None:
            tracer.attentions[-1][1] = _heads_of(axis, dim)
            tracer.multiplied.append(core(axis).flatten())
        return
    tracer.multiplied += [core(axis).flatten() for axis in summed + left if axis is not None]


def _neurons(tracer, tensor, *dims):
    """For each of these dimensions the axis that varies along it, but not of heads alone; or None."""
    axes = [axis for axis in tracer.get(tensor) if not tracer.is_derived(axis)]
    return [next((axis for axis in axes if dim in varying(axis)), None) for dim in dims]


def _heads_of(axis, dim):
    """The different labels (heads, head_dim) along a dimension."""
    return unique_rows(as_rows(axis, set(range(axis.ndim)) - {dim}))[0]


def _sum(tracer, ours, our_dim, theirs, their_dim, alike=False):
    """Join the neurons over which a product sums; returns labels of the heads that remain (of ours, of theirs).

    ``alike``: one side has the same value everywhere, such as the first state of an LSTM.
    """
    ours, theirs = _one(tracer, ours, our_dim), _one(tracer, theirs, their_dim)
    if ours is not None and theirs is not None:
        a, b = core(ours).movedim(our_dim, -1), core(theirs).movedim(their_dim, -1)
        free = varying(ours) - {our_dim}, varying(theirs) - {their_dim}
        if free[0] == free[1]:
            tracer.note_shared(a)
            tracer.note_shared(b)
            tracer.labels.join(a, b)
        elif not free[0] or not free[1]:
            many, few = (a, b) if free[0] else (b, a)
            rows = many.reshape(-1, many.shape[-1])
            tracer.constraints.append(BlockConstraint(few.reshape(-1), unique_rows(rows)[0].T))
        else:
            raise Untraceable("a product sums over neurons that differ from place to place")
    elif not alike and (ours is not None or theirs is not None):
        lone, dim = (ours, our_dim) if ours is not None else (theirs, their_dim)
        if varying(lone) == {dim}:
            tracer.positions(lone)
        else:  # each head has the same positions
            tracer.constrain(lone, {dim})
    mine = [] if ours is None else tracer.heads(ours, {our_dim})
    return mine, [] if mine or theirs is None else tracer.heads(theirs, {their_dim})


def _one(tracer, axes, dim):
    """The axis that varies along a dimension over which a product sums, or None."""
    found = [axis for axis in axes if dim in varying(axis)]
    found = [axis for axis in found if not tracer.is_derived(axis)] or found[:1]
    if len(found) > 1:
        raise Untraceable("a product sums over several kinds of neurons at once")
    return found[0] if found else None


def convolution(tracer: Tracer, func, out, x, weight, bias, *options):
    """A convolution, also with groups of channels, and also transposed."""
    transposed, _, groups = options[-3:]
    tracer.heights[id(weight)] = out.shape[2]
    _check_kernels(tracer, weight)
    axes = tracer.get(x)
    if any(varying(axis) == {0, 1} for axis in axes) and groups == x.shape[1]:
        return _convolution_of_heads(tracer, out, x, weight, bias)
    passing = [axis for axis in axes if varying(axis) != {1}]
    mixed = {dim for axis in passing for dim in varying(axis)}
    if any(dim < 2 or weight.shape[dim] > 1 or out.shape[dim] != x.shape[dim] for dim in mixed):
        raise Untraceable("a convolution slides along neurons")
    weights = [[core(axis).flatten() for axis in tracer.get(weight) if varying(axis) == {dim}] for dim in (0, 1)]
    into, outof = weights if transposed else weights[::-1]  # labels of the kernels' inputs and outputs
    inputs = [core(axis).flatten() for axis in axes if varying(axis) == {1}]
    result = outof[0] if outof else None
    if groups == 1:
        _sum(tracer, inputs, 0, into, 0)
    elif transposed and (groups != x.shape[1] or out.shape[1] != groups):
        raise Untraceable("a transposed convolution has groups")
    elif groups == x.shape[1]:
        kernels = weights[0][0] if weights[0] else None
        result = _depthwise(tracer, kernels, _one(tracer, inputs, 0), groups, out.shape[1])
    else:
        _grouped(tracer, _one(tracer, inputs, 0), into, result, groups)
    if result is None and out.shape[1] > 1:
        raise Untraceable("a convolution has kernels that are no weights")
    axes = [fit(axis, out.shape) for axis in passing]
    if result is not None:
        for axis in tracer.get(bias):
            tracer.labels.join(result, core(axis))
        axes.append(along(1, result, out.shape))
    return axes


def _check_kernels(tracer, weight):
    for axis in tracer.get(weight):
        if not varying(axis) & {0, 1}:
            tracer.positions(axis)
        elif len(varying(axis)) > 1:
            raise Untraceable("the kernels of a convolution are computed from other weights")


def _convolution_of_heads(tracer, out, x, weight, bias):
    """A depthwise convolution over (heads, head_dim, height, width) whose kernels all heads share."""
    result = [fit(axis, out.shape) for axis in tracer.get(x)]
    for axis in (*tracer.get(weight), *tracer.get(bias)):
        if varying(axis) == {0}:
            result = tracer.match(result, [along(1, core(axis).flatten(), out.shape)])
    return result


def _depthwise(tracer, kernels, inputs, groups, outputs):
    """Each channel is convolved by itself: the outputs are the inputs' neurons. Returns their labels."""
    if inputs is None:
        return kernels
    if kernels is None:
        return inputs.repeat_interleave(outputs // groups)
    tracer.labels.join(kernels.view(groups, -1), inputs.view(groups, 1))
    return kernels


def _grouped(tracer, inputs, into, outputs, groups):
    """Record that the channels of a grouped convolution come in ``groups`` blocks."""
    group = tracer.labels.new(groups)
    if inputs is not None:
        blocks = inputs.view(groups, -1)
        tracer.constraints.append(BlockConstraint(group, blocks, always=True))
        if into:
            tracer.constraints.append(BlockConstraint(into[0], blocks.T))
    if outputs is not None:
        tracer.constraints.append(BlockConstraint(group, outputs.view(groups, -1), always=True))
