"""Operations on the meta device, of which PyTorch works out the result once for each kind of arguments.

For most operations it does so in Python, which takes longer than to follow their labels. The layers of a model repeat.
"""

from functools import cache

import torch


class MetaResults:
    """Runs operations. One that gave new tensors for such arguments before gives empty tensors like those.

    Nothing else could come out: tensors on the meta device have shapes, strides and types, but no values.
    """

    def __init__(self):
        self._known = {}  # (operation, kinds of its arguments): (shape, strides, type) of the result, or of each

    def run(self, func, args: tuple, kwargs: dict):
        """``func(*args, **kwargs)``, of an operation of ``torch.ops``."""
        if not _is_functional(func):
            return func(*args, **kwargs)
        key = func, _kind(args), _kind(tuple(kwargs.items()))
        known = self._known.get(key)
        if known is None:
            out = func(*args, **kwargs)
            if all(tensor.is_meta for tensor in (out if isinstance(out, tuple) else (out,))):
                self._known[key] = _kind(out)
            return out
        return _empty(known) if isinstance(known[0], torch.Size) else tuple(map(_empty, known))


@cache
def _is_functional(func):
    """Whether an operation gives new tensors and changes none."""
    schema = func._schema
    aliases = any(value.alias_info is not None for value in (*schema.arguments, *schema.returns))
    return not aliases and bool(schema.returns) and all(str(value.type) == "Tensor" for value in schema.returns)


def _kind(value):
    """All of an argument that decides what tensors on the meta device come out."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    if isinstance(value, (tuple, list)):
        return tuple(map(_kind, value))
    return type(value), value


def _empty(kind):
    shape, strides, dtype, _ = kind
    return torch.empty_strided(shape, strides, dtype=dtype, device="meta")
