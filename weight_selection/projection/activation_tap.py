"""A tap on a running model: it shows what dense layers, normalisations and LayerScales take and give."""

from collections.abc import Callable
from functools import partial
from threading import get_ident

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from weight_selection.projection.symmetries import RMS_NORM
from weight_selection.projection.traced_model import TracedModel

# Function: places of the input and of the weight among its arguments.
DENSE = {F.linear: (0, 1), F.conv2d: (0, 1), torch.conv2d: (0, 1), torch.addmm: (1, 2)}
DENSE |= dict.fromkeys((torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__), (0, 1))
PRODUCTS = {"mul", "mul_", "__mul__", "__rmul__"}
SUMS = {"add", "add_"}


class ActivationTap(TorchFunctionMode):
    """While it is active (``with ActivationTap(...):``), it calls the given functions as the model's layers run.

    A layer whose weight the model computes from parameters (weight standardisation) has no key and is not shown.

    Args:
        traced: the model that is going to run, in this thread.
        dense: ``(key of the weight, input, output) -> output``, called after every linear layer and convolution. The
            model goes on with the output that it returns.
        norm: the same, called with the key of the gain after every ``layer_norm``, and after every module that is an
            RMS norm, by whatever operations.
        scaled: ``(key of a parameter, other factor)``, called before every product with a parameter.
        batch_norm: as ``norm``, called after every batch normalisation that has a gain.
        before: ``(key of the weight, input)``, called before every linear layer, convolution and, if ``batch_norm`` is
            given, batch normalisation. It may change their parameters.
        added: called after every sum with what it gives.
    """

    def __init__(
        self,
        traced: TracedModel,
        dense: Callable,
        norm: Callable | None = None,
        scaled: Callable | None = None,
        batch_norm: Callable | None = None,
        before: Callable | None = None,
        added: Callable | None = None,
    ):
        super().__init__()
        self.parameters = dict(traced.model.named_parameters())
        self.keys = {id(parameter): key for key, parameter in self.parameters.items()}
        self.places = {parameter.data_ptr(): key for key, parameter in self.parameters.items()}
        self.dense, self.norm, self.scaled, self.added = dense, norm, scaled, added
        self.before = before or (lambda key, x: None)
        layers = {func: (*places, self.before, dense) for func, places in DENSE.items()}
        layers[F.layer_norm] = 0, 2, lambda key, x: None, norm
        layers[F.batch_norm] = 0, 3, self.before, batch_norm
        self._layers = {func: layer for func, layer in layers.items() if layer[-1] is not None}
        keys = [key for key in self.parameters if norm is not None and traced.symmetries.kind(key) == RMS_NORM]
        self._rms_norms = {key: traced.model.get_submodule(key.rpartition(".")[0]) for key in keys}

    def __enter__(self):
        thread = get_ident()  # other passes of the model have taps of their own

        def show(key, module, args, kwargs, y):
            return self.norm(key, next(iter((*args, *kwargs.values()))), y) if get_ident() == thread else y

        self._hooks = [
            module.register_forward_hook(partial(show, key), with_kwargs=True)
            for key, module in self._rms_norms.items()
        ]
        return super().__enter__()

    def __exit__(self, *raised):
        for hook in self._hooks:
            hook.remove()
        super().__exit__(*raised)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in self._layers:
            taken, weight, before, show = self._layers[func]
            key = self.keys.get(id(args[weight] if len(args) > weight else kwargs.get("weight")))
            if key is not None:
                before(key, args[taken])
                return show(key, args[taken], func(*args, **kwargs))
        elif func is F.multi_head_attention_forward:
            with _HiddenProducts(self):
                return func(*args, **kwargs)
        elif self.added is not None and getattr(func, "__name__", "") in SUMS:
            y = func(*args, **kwargs)
            self.added(y)
            return y
        elif self.scaled is not None and getattr(func, "__name__", "") in PRODUCTS:
            factors = (*args, *kwargs.values())[:2]
            for one, other in (factors, factors[::-1]):
                if id(one) in self.keys:
                    self.scaled(self.keys[id(one)], other)
        return func(*args, **kwargs)


class _HiddenProducts(TorchDispatchMode):
    """Shows the linear layers inside a function of PyTorch, where a mode for functions does not see them.

    They run as products of rows, (n, channels), with the transpose of a whole weight. The bias is part of the product,
    or is added to it later.
    """

    def __init__(self, tap: ActivationTap):
        super().__init__()
        self.tap = tap

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func not in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default):
            return func(*args, **kwargs)
        x, weight = args[-2:]
        key = self.tap.places.get(weight.data_ptr())
        if key is None or self.tap.parameters[key].shape != weight.T.shape:
            return func(*args, **kwargs)
        self.tap.before(key, x)
        y = func(*args, **kwargs)
        bias = self.tap.parameters.get(f"{key.removesuffix('weight')}bias")
        if bias is None or func is torch.ops.aten.addmm.default:
            return self.tap.dense(key, x, y)
        return self.tap.dense(key, x, y + bias) - bias
