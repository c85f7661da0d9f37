"""timm's models, under the paper's names as well as timm's own, and what timm knows of them."""

import contextlib
import difflib
import inspect
import math
import re
import sys
import warnings
from functools import partial

import timm
import torch
import torch.nn as nn
from timm.layers import to_2tuple
from timm.models import is_model
from torch.overrides import TorchFunctionMode

from weight_selection.errors import InputError
from weight_selection.sources.architectures import (
    NO_KEYS,
    Architecture,
    declared_architecture,
    found_components,
    keys_inside,
)
from weight_selection.sources.facts import ModelFacts

# The paper's name -> timm's architecture and what differs from it. Kept out of timm's registry, where some of
# these names mean something else. The CLIP variants normalise before the first block, as CLIP's ViT-B does. OpenAI
# trained that with QuickGELU, which is within 0.021 of GELU; timm's name for it has GELU, and so have these, so that
# CLIP's student differs from the other teachers' only in what its weights need (act_layer=quick_gelu gives the other).
PAPER_MODELS = {
    "vit_tiny": ("vit_tiny_patch16_224", {}),
    "vit_small": ("vit_small_patch16_224", {}),
    "vit_base": ("vit_base_patch16_224", {}),
    "vit_large": ("vit_large_patch16_224", {}),
    "vit_a": ("vit_tiny_patch16_224", {"depth": 6}),  # Table 6: half of ViT-T's depth
    "vit_tiny_clip": ("vit_tiny_patch16_224", {"pre_norm": True, "norm_layer": partial(nn.LayerNorm, eps=1e-5)}),
    "vit_base_clip": ("vit_base_patch16_clip_224", {}),
    "convnext_femto": ("convnext_femto", {"conv_mlp": False}),  # linear layers, as ConvNeXt-T; timm's has 1x1 kernels
    "convnext_tiny": ("convnext_tiny", {}),
}

IMAGE_SIZE = 224  # pixels; of a model of timm's class that timm's factory did not build


def check_name(name: str, option: str) -> None:
    """Raise InputError, with near matches, unless ``create_model`` knows the name that ``option`` gave."""
    if name in PAPER_MODELS or is_model(name):
        return
    known = list(PAPER_MODELS) + timm.list_models()
    near = difflib.get_close_matches(name.split(".")[0], known, n=4, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}?" if near else "timm.list_models() names them all"
    raise InputError(f"{option} {name}: no such model; {hint}")


def create_model(
    name: str, *, option: str = "--model", input_size: int | None = None, device="cpu", **kwargs
) -> nn.Module:
    """Build a model with its random initialisation, or with ``pretrained=True`` its published weights.

    Args:
        name: one of ``PAPER_MODELS`` or any name timm accepts, old or new, with or without a tag.
        option: the command-line option the name came from, for errors.
        input_size: side of the square input in pixels; ``img_size`` of models whose weights depend on it.
        device: where to create it; ``"meta"`` gives shapes without memory.
        **kwargs: timm's own (num_classes, drop_path_rate, embed_dim, depth, ...).

    Raises:
        InputError: unknown name or tag, or arguments the architecture refuses.
    """
    check_name(name, option)
    architecture, defaults = PAPER_MODELS.get(name, (name, {}))
    kwargs = {**defaults, **kwargs}
    try:
        with _on(device), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Mapping deprecated model name")  # timm's old names are welcome here
            if input_size is not None and "img_size" not in kwargs:
                with _on("meta"):
                    config = _build(architecture, {**kwargs, "pretrained": False}).pretrained_cfg
                if config.get("fixed_input_size"):
                    kwargs["img_size"] = input_size
            model = _build(architecture, kwargs)
    except (TypeError, ValueError, AssertionError, RuntimeError, LookupError, ArithmeticError, AttributeError) as error:
        given = " ".join(f"{key}={value}" for key, value in kwargs.items())
        raise InputError(f"{option} {name}: timm cannot build it with {given or 'no arguments'}: {error}") from error
    channels, *size = model.pretrained_cfg["input_size"]  # timm keeps the published weights' even if told otherwise
    built = kwargs.get("in_chans", channels), *to_2tuple(kwargs.get("img_size") or input_size or size)
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": built}
    return model


def _build(architecture, kwargs):
    """Build timm's model, also with arguments that its name fixes and that timm itself refuses for many names."""
    try:
        return timm.create_model(architecture, **kwargs)
    except TypeError as error:
        if "multiple values for keyword argument" not in str(error):
            raise
    entrypoint = timm.models.model_entrypoint(timm.models.split_model_name_tag(architecture)[0])
    of_timm = inspect.signature(timm.create_model).parameters
    own = {key: value for key, value in kwargs.items() if key not in of_timm}
    with _overriding(sys.modules[entrypoint.__module__], own):
        return timm.create_model(architecture, **{key: value for key, value in kwargs.items() if key in of_timm})


@contextlib.contextmanager
def _overriding(module, kwargs):
    """Let the models that a module of timm builds take these arguments in place of those that their names fix."""
    build = module.build_model_with_cfg
    module.build_model_with_cfg = lambda *args, **given: build(*args, **given | kwargs)
    try:
        yield
    finally:
        module.build_model_with_cfg = build


@contextlib.contextmanager
def _on(device):
    """Create tensors there, and on the meta device, where they have no values, let nothing fill them."""
    with torch.device(device), _Unfilled() if str(device) == "meta" else contextlib.nullcontext():
        yield


class _Unfilled(TorchFunctionMode):
    """Skips the operations of initialisations; for a large model on the meta device they take most of the time."""

    FILLING = ("normal_", "uniform_", "erfinv_", "mul_", "add_", "clamp_", "fill_", "zero_", "copy_")

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in self.FILLING and args and getattr(args[0], "is_meta", False):
            return args[0]
        return func(*args, **(kwargs or {}))


def check_input_size(model: nn.Module, input_size: int, name: str) -> None:
    """Raise InputError unless a model, then in evaluation mode, takes square images of that side in pixels."""
    check_images(model, torch.zeros(1, 3, input_size, input_size), f"--input_size {input_size}: {name} cannot take it")


def check_images(model: nn.Module, images: torch.Tensor, complaint: str) -> None:
    """Raise InputError, complaint and reason, unless a model, then in evaluation mode, takes images of that size."""
    try:
        with torch.no_grad():
            model.eval()(images)
    except (RuntimeError, AssertionError, ValueError) as error:  # too small for the last stage, no multiple of a patch
        raise InputError(f"{complaint}: {error}") from error


# ---------------------------------------------------------------------------------------------------------
# What timm knows of a model


def model_facts(model: nn.Module) -> ModelFacts:
    """What a timm model answers; it may be on the meta device."""
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    return ModelFacts(
        architecture=declared_architecture(model) or _undeclared(model),
        inputs=(torch.empty(1, *input_size(model), device="meta"),),
        layer_patterns=layer_patterns(model),
        first_convolutions=first_convolutions(model),
        grid=grid and tuple(grid),
        position_embeddings=("pos_embed",),
    )


def _undeclared(model):
    root = [cls for cls in type(model).__mro__ if cls.__module__.startswith("timm.models.")][-1]
    filter_fn = getattr(sys.modules[root.__module__], "checkpoint_filter_fn", None)
    return Architecture(
        name=root.__name__.lower(),  # a subclass, such as a distilled variant, is of the architecture that it extends
        classifier=keys_inside(recorded_names(model, "classifier")) or NO_KEYS,
        components=found_components(model, recorded_names(model, "first_conv")),
        filter_fn=filter_fn and f"{root.__module__}:{filter_fn.__name__}",
    )


def recorded_names(model: nn.Module, what: str) -> tuple:
    """Names of the modules that timm records as a model's ``first_conv`` or ``classifier``: none, one or several."""
    names = _config(model).get(what) or ()
    return (names,) if isinstance(names, str) else names


def _config(model):
    """What timm records of a model; of one that timm's factory did not build, as much of it as can be found."""
    if hasattr(model, "pretrained_cfg"):
        return model.pretrained_cfg
    modules = dict(model.named_modules())
    first = next((name for name, module in modules.items() if isinstance(module, nn.Conv2d)), None)
    head = model.get_classifier() if hasattr(model, "get_classifier") else None
    classifier = next((name for name, module in modules.items() if module is head), None)
    channels = modules[first].in_channels if first else 3
    return {"input_size": (channels, IMAGE_SIZE, IMAGE_SIZE), "first_conv": first, "classifier": classifier}


def input_size(model: nn.Module) -> tuple:
    """(channels, height, width) of the images that a timm model is built for; sizes in pixels."""
    channels, *size = _config(model)["input_size"]
    convolutions = first_convolutions(model)
    for name, module in model.named_modules():  # an embedding of patches may ask for one size
        if getattr(module, "img_size", None) and any(key.startswith(f"{name}.") for key in convolutions):
            size = module.img_size
    for convolution in convolutions.values():
        times = convolution.in_channels / channels
        if times == 1 or math.isqrt(int(times)) ** 2 != times:  # else squares of pixels were moved into channels
            channels = convolution.in_channels
    return channels, *size


def first_convolutions(model: nn.Module) -> dict:
    """{key of the weight: convolution}, of those that timm records to take the image."""
    modules = {name: model.get_submodule(name) for name in recorded_names(model, "first_conv")}
    return {f"{name}.weight": module for name, module in modules.items() if isinstance(module, nn.Conv2d)}


def layer_patterns(model: nn.Module) -> list:
    """timm's regular expressions of keys, [(pattern, does its number count layers)], in their order.

    timm has them (``group_matcher``) to give layers learning rates of their own. The last bracket of a pattern holds
    the number.
    """
    matcher = model.group_matcher(coarse=False) if hasattr(model, "group_matcher") else {}
    patterns = []
    for given in matcher.values() if isinstance(matcher, dict) else ():
        for pattern, suffix in given if isinstance(given, (list, tuple)) else [(given, None)]:
            patterns.append((re.compile(pattern), suffix is None))
    return patterns
