"""The rules of operations: what each does to the labels of its arguments. One without a rule is refused by name."""

from itertools import chain, zip_longest

import torch

from weight_selection.tracing.known_values import tensors_among
from weight_selection.tracing.labels import BlockConstraint, along, core, fit, moved, storage, varying
from weight_selection.tracing.products import convolution, note_view, product
from weight_selection.tracing.tracer import Tracer, Untraceable

aten = torch.ops.aten


def _names(text):
    return frozenset(text.split())


# What operations do to labels, by their names in torch.ops.aten.
MOVES = _names("""
    view _unsafe_view t permute transpose expand unbind select slice unsqueeze squeeze split split_with_sizes
    unsafe_split repeat roll flip unfold
""")  # they move data: the operation itself moves the labels
TURNS = _names("transpose_")  # they do so in place
KEEP = _names("alias clone detach as_strided_")  # they leave every element where it is
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
    upsample_bicubic2d upsample_linear1d _upsample_bilinear2d_aa _upsample_bicubic2d_aa reflection_pad2d
    replication_pad2d avg_pool3d max_pool3d_with_indices _adaptive_avg_pool3d upsample_nearest1d upsample_nearest3d
    upsample_trilinear3d reflection_pad1d replication_pad1d
""")  # they change height and width, or the length of a line
CHOOSES = _names("topk")  # it also says where the largest numbers are
REDUCTIONS = _names("mean sum amax amin max min linalg_vector_norm var all any")
# They give one value everywhere.
UNIFORM = _names("""
    empty zeros ones full scalar_tensor empty_like zeros_like ones_like full_like new_empty new_zeros new_ones new_full
""")
CONSTANTS = UNIFORM | _names("arange linspace eye lift_fresh _assert_async")


def follow(tracer: Tracer, func, out, args: tuple, kwargs: dict) -> None:
    """Give what an operation of ``torch.ops.aten`` gave its labels; of constants, note where their values differ.

    Raises:
        Untraceable: there are labels, and no rule says what becomes of them.
    """
    name = func.overloadpacket.__name__
    out, *others = out if isinstance(out, tuple) else (out,)  # besides come places, or statistics
    if name in CONSTANTS:
        if name in UNIFORM:
            tracer.uniform[storage(out)] = out
        return
    tensors = tensors_among(chain(args, kwargs.values()))
    tracer.met.update(map(id, tensors))
    labelled = any(map(tracer.get, tensors))
    if labelled:
        if name not in RULES or "out" in kwargs:
            raise Untraceable(f"{func} is no operation that neurons can be followed through")
        axes = RULES[name](tracer, func, out, *args, **kwargs)
        if isinstance(out, torch.Tensor):
            tracer.put(out, axes)
        else:  # several tensors, and of each axis a part for each
            for tensor, *parts in zip(out, *axes, strict=True):
                tracer.put(tensor, parts)
        if name in CHOOSES:
            _note_places(tracer, others[0], *args, **kwargs)
    elif (name in ALONE or name in KEEP) and tracer.is_uniform(args[0]):
        tracer.uniform[storage(out)] = out
    elif name in ALONE or name in TOGETHER:
        dims = (dim + out.ndim - x.ndim for x in tensors for dim in tracer.differs(x))
        tracer.differing[storage(out)] = out, frozenset(dims) & varying(out)
    if name.endswith("_"):
        tracer.places.pop(storage(out), None)
        if len(tensors) > 1 or name in TURNS:  # written into, or turned
            tracer.uniform.pop(storage(out), None)
            tracer.differing.pop(storage(out), None)
    if not labelled and (name in MOVES or name in KEEP):
        tracer.repetitions.note_move(func, out, *args, **kwargs)
    elif not labelled and (name in ALONE or name in TOGETHER) and name not in ALONG_LINES:
        tracer.repetitions.note_elementwise(out, tensors)
    elif name.endswith("_"):
        tracer.repetitions.forget(out)


def _move(tracer, func, out, x, *args, **kwargs):
    note_view(tracer, func, out, x)
    return [moved(func, axis, args, kwargs) for axis in tracer.get(x)]


def _turn(tracer, func, out, x, *args):
    """The tensor is turned already, and its labels are those of before; other tensors may share them."""
    move = getattr(aten, func.overloadpacket.__name__.removesuffix("_"))
    return [move(axis, *args) for axis in tracer.get(x)]


def _keep(tracer, func, out, x, *args, **kwargs):
    note_view(tracer, func, out, x)
    if out.shape != x.shape:
        raise Untraceable(f"{func} changes a tensor's layout")
    return tracer.get(x)


def _alone(tracer, func, out, x, *args, **kwargs):
    return tracer.get(x)


def _together(tracer, func, out, *args, **kwargs):
    return tracer.meet([tensor for tensor in tensors_among(args) if tensor.ndim], out.shape)


def _copy(tracer, func, out, into, source, *args):
    """The values before it do not count."""
    axes = tracer.meet([source], out.shape)
    if out.untyped_storage().nbytes() != out.numel() * out.itemsize:
        tracer.put_part(out, axes)
    else:
        tracer.assembled.pop(storage(out), None)
    return axes


def _over_space(tracer, func, out, x, *args, **kwargs):
    tracer.resized[storage(out)] = storage(x)
    for axis in tracer.get(x):
        if max(varying(axis)) < 2:
            yield fit(axis, out.shape)
        elif min(varying(axis)) >= 2:  # what is interpolated or pooled along are positions
            tracer.positions(axis)
        else:
            raise Untraceable(f"{func} runs along neurons")


def _pad(tracer, func, out, x, pads, *args):
    """Neurons get constants beside them; the constants are neurons of no parameter."""
    tracer.resized[storage(out)] = storage(x)
    for axis in tracer.get(x):
        dims = {dim for dim in varying(axis) if out.shape[dim] != x.shape[dim]}
        if not dims:
            yield fit(axis, out.shape)
            continue
        kept = core(axis)
        size = [out.shape[dim] if dim in dims else n for dim, n in enumerate(kept.shape)]
        padded = tracer.labels.new(torch.Size(size).numel()).view(size)
        inside = padded
        for dim in dims:
            inside = inside.narrow(dim, max(pads[2 * (axis.ndim - 1 - dim)], 0), kept.shape[dim])
        inside.copy_(kept)
        yield padded.expand(out.shape)


def _cat(tracer, func, out, tensors, dim=0):
    dim = dim % out.ndim
    stacked = func.overloadpacket is aten.stack
    pieces = [[axis.unsqueeze(dim) if stacked else axis for axis in tracer.get(tensor)] for tensor in tensors]
    shapes = [(*t.shape[:dim], 1, *t.shape[dim:]) if stacked else tuple(t.shape) for t in tensors]
    for kind, parts in _aligned(pieces, dim):
        present = [part for part in parts if part is not None]
        if kind and not stacked and not any(dim in varying(part) for part in present):
            for part in present[1:]:  # rows or tokens are joined: each has the same neurons
                tracer.labels.join(core(present[0]).narrow(dim, 0, 1), core(part).narrow(dim, 0, 1))
            yield fit(present[0].narrow(dim, 0, 1), out.shape)
        elif any(part is None and axes for part, axes in zip(parts, pieces, strict=True)):
            tracer.positions(*present)  # tokens are put beside an image's positions
        else:
            filled = []
            for part, shape in zip(parts, shapes, strict=True):
                size = [n if d == dim or d in kind else 1 for d, n in enumerate(shape)]
                if part is None:  # constants are neurons of no parameter
                    part = tracer.labels.new(torch.Size(size).numel()).view(size)
                filled.append(core(part).expand(size))
            yield fit(torch.cat(filled, dim), out.shape)


def _aligned(pieces, dim):
    """Match the axes of tensors that are concatenated along ``dim``: those that vary along the same other dimensions.

    Yields (these dimensions, the axis of each tensor or None).
    """
    for kind in dict.fromkeys(varying(axis) - {dim} for axis in chain(*pieces)):
        fitting = ([axis for axis in axes if varying(axis) - {dim} == kind] for axes in pieces)
        for parts in zip_longest(*fitting):
            yield kind, parts


def _index(tracer, func, out, x, indices, *args, **kwargs):
    """Indices, whose numbers are no neurons, pick from positions; or from neurons, if they say which are largest."""
    tracer.positions(*chain(*map(tracer.get, indices)))
    picked = {dim for dim, index in enumerate(indices) if index is not None}
    first = tuple(
        slice(None) if index is None else torch.zeros([1] * index.ndim, dtype=torch.int64) for index in indices
    )
    for axis in tracer.get(x):
        if not varying(axis) & picked:
            yield core(axis)[first].expand(out.shape)
        else:
            _pick(tracer, axis, *(index for index in indices if index is not None))


def _gather(tracer, func, out, x, dim, index, *args, **kwargs):
    """Along one dimension it picks elements."""
    for axis in tracer.get(x):
        if dim % x.ndim not in varying(axis):
            yield fit(axis.narrow(dim, 0, 1), out.shape)
        else:
            _pick(tracer, axis, index)


def _pick(tracer, axis, *indices):
    """Note what indices pick along an axis: the neurons, such as experts, that they are numbers of, or positions."""
    _, taken = tracer.places.get(storage(indices[0]), (None, ())) if len(indices) == 1 else (None, ())
    if len(varying(axis)) == 1 and core(axis).numel() == len(taken):
        tracer.labels.join(core(axis).flatten(), taken)
        tracer.picked.append(taken)
    else:
        tracer.positions(axis)


def _topk(tracer, func, out, x, count, dim=-1, *args, **kwargs):
    """The largest numbers may be those of any neurons."""
    for axis in tracer.get(x):
        for rest in tracer.heads(axis, {dim % x.ndim}) if dim % x.ndim in varying(axis) else [axis]:
            yield fit(rest.narrow(dim, 0, 1), out.shape)


def _note_places(tracer, places, x, count, dim=-1, *args, **kwargs):
    """Note of which neurons the largest numbers are."""
    axes = [axis for axis in tracer.get(x) if varying(axis) == {dim % x.ndim}]
    if len(axes) == 1:
        tracer.places[storage(places)] = places, core(axes[0]).flatten()
        tracer.compared.append(core(axes[0]).flatten())


def _embedding(tracer, func, out, weight, indices, *args):
    """Rows of a table are looked up: its rows are positions, its columns neurons."""
    tracer.positions(*tracer.get(indices))
    tracer.positions(*(axis for axis in tracer.get(weight) if 0 in varying(axis)))
    return [axis[:1].expand(out.shape) for axis in tracer.get(weight) if 0 not in varying(axis)]


def _as_complex(tracer, func, out, x):
    """Two neurons become one number, which rotary embeddings turn: they stay together."""
    for axis in map(core, tracer.get(x)):
        tracer.labels.join(axis[..., 0], axis[..., -1])
        yield axis[..., 0].expand(out.shape)


def _as_real(tracer, func, out, x):
    return [axis[..., None].expand(out.shape) for axis in tracer.get(x)]


def _pixel_shuffle(tracer, func, out, x, factor):
    """Channels become the pixels of patches, which are positions."""
    tracer.positions(*tracer.get(x))
    return []


def _reduce(tracer, func, out, x, *args, **kwargs):
    if func.overloadpacket is aten.linalg_vector_norm:
        args = args[1:]
    dims = args[0] if args else kwargs.get("dim")
    dims = {dim % x.ndim for dim in ([dims] if isinstance(dims, int) else dims or range(x.ndim))}
    if x.ndim == 4 and dims == {2, 3}:
        tracer.resized[storage(out)] = storage(x)
    for axis in tracer.get(x):
        for rest in tracer.heads(axis, dims) if varying(axis) & dims else [axis]:
            for dim in sorted(dims, reverse=True):
                rest = rest.narrow(dim, 0, 1) if out.ndim == x.ndim else rest.select(dim, 0)
            yield rest


def _norm_of_channels(tracer, func, out, x, *args):
    """Its weight, bias, mean and variance have a number for each channel."""
    result, full = tracer.get(x), frozenset(dim for dim, size in enumerate(x.shape) if size > 1)
    for parameter in tensors_among(args):
        axes = [along(1, core(axis), x.shape) for axis in tracer.get(parameter)]
        result = tracer.match(result, axes, full, frozenset({1}))
    if func is aten.native_group_norm.default and 1 < (groups := args[5]) < x.shape[1]:
        for axis in result:
            if varying(axis) == {1}:
                matrix = core(axis).view(groups, -1)
                tracer.constraints.append(BlockConstraint(tracer.labels.new(groups), matrix, always=True))
    return result


def _glu(tracer, func, out, x, dim=-1):
    """One half is multiplied by the sigmoid of the other."""
    halves = [axis.chunk(2, dim) for axis in tracer.get(x)]
    return tracer.match([half for half, _ in halves], [half for _, half in halves])


def _im2col(tracer, func, out, x, *args):  # (batch, channels * kernel positions, places)
    axes = [core(axis) for axis in tracer.get(x)]
    if any(varying(axis) != {1} for axis in axes):
        raise Untraceable("a convolution slides along neurons")
    times = out.shape[1] // x.shape[1]
    return [along(1, channels.flatten().repeat_interleave(times), out.shape) for channels in axes]


def _col2im(tracer, func, out, x, *args):
    for axis in tracer.get(x):
        if varying(axis) != {1}:
            raise Untraceable("a convolution slides along neurons")
        rows = core(axis).view(out.shape[1], -1)
        tracer.labels.join(rows, rows[:, :1])
        yield along(1, rows[:, 0], out.shape)


# Each gives the labels of what its operation gave.
RULES = {
    **dict.fromkeys(MOVES, _move),
    **dict.fromkeys(KEEP, _keep),
    **dict.fromkeys(TURNS, _turn),
    **dict.fromkeys(ALONE, _alone),
    **dict.fromkeys((*TOGETHER, "native_layer_norm"), _together),
    **dict.fromkeys(OVER_SPACE, _over_space),
    **dict.fromkeys(REDUCTIONS, _reduce),
    **dict.fromkeys(("cat", "stack"), _cat),
    **dict.fromkeys(("mm", "bmm", "addmm", "baddbmm"), product),
    **dict.fromkeys(("native_batch_norm", "native_group_norm"), _norm_of_channels),
    "copy_": _copy,
    "constant_pad_nd": _pad,
    "convolution": convolution,
    "im2col": _im2col,
    "col2im": _col2im,
    "index": _index,
    "view_as_complex": _as_complex,
    "view_as_real": _as_real,
    "gather": _gather,
    **dict.fromkeys(CHOOSES, _topk),
    "pixel_shuffle": _pixel_shuffle,
    "embedding": _embedding,
    "glu": _glu,
}
