"""timm's models, under the paper's names as well as timm's own, and what timm knows of them."""

import contextlib
import difflib
import inspect
import math
import re
import sys
import warnings
from dataclasses import is_dataclass
from functools import partial
from pathlib import Path

import timm
import torch
import torch.nn as nn
from timm.layers import to_2tuple
from timm.models import is_model
from timm.models._hub import load_model_config_from_path
from torch.overrides import TorchFunctionMode

from weight_selection.errors import InputError
from weight_selection.sources.architectures import (
    NO_KEYS,
    Architecture,
    declared_architecture,
    found_components,
    keys_inside,
)
from weight_selection.sources.directories import CONFIG, Directory, read_config
from weight_selection.sources.facts import ModelFacts, first_convolution
from weight_selection.sources.names import TIMM, place_of, split_name
from weight_selection.sources.names import check_name as check_scheme

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

BUILD = "build_model_with_cfg"  # timm's function that creates a model
GENERATORS = ("_gen_", "_create_")  # functions of timm that compute the arguments of a class begin so
# What a config.json must not say: arguments of timm's create_model that are not the model's, and of its configuration
# what names files.
CALLERS_OWN = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"}
LOADED = {"url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source"}
IMAGE_SIZE = 224  # pixels; of a model of timm's class that timm's factory did not build


def check_name(name: str, option: str) -> None:
    """Raise InputError, with near matches, unless ``create_model`` knows the name that ``option`` gave."""
    if split_name(name)[0]:
        check_scheme(name, option, TIMM)
        return
    if name in PAPER_MODELS or is_model(name):
        return
    if Path(name).is_dir() or "/" in name:
        timms = "local-dir" if Path(name).is_dir() else "hf-hub"
        hint = f"write transformers:{name}, or {timms}:{name} of one that timm saved"
    else:
        known = list(PAPER_MODELS) + timm.list_models()
        near = difflib.get_close_matches(name.split(".")[0], known, n=4, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}?" if near else "timm.list_models() names them all"
    raise InputError(f"{option} {name}: no such model; {hint}")


def architecture_of(name: str, option: str) -> tuple:
    """What a name stands for: (timm's architecture, the arguments that it is created with).

    Raises:
        InputError: as ``check_name``, or timm did not save what is in the directory or repository of that name.
    """
    check_name(name, option)
    place = place_of(name, option, "save a copy and name it local-dir:DIR")
    return PAPER_MODELS.get(name, (name, {})) if place is None else _saved_architecture(place)


def _saved_architecture(place):
    """As ``architecture_of``, of a directory or repository that timm saved a model in."""
    config = read_config(place)
    if not isinstance(config.get("architecture"), str):
        hint = "write transformers: before its name" if "model_type" in config else "name one that timm saved"
        raise InputError(f"{place.where}: its {CONFIG} has no architecture of timm's; {hint}")
    try:
        cfg, architecture, kwargs = load_model_config_from_path(place.file(CONFIG).parent)
        for key in CALLERS_OWN & kwargs.keys():
            raise ValueError(f"model_args has {key}, which is not the model's")
        check_name(architecture, f"{place.where}: {CONFIG},")
    except (TypeError, ValueError, AttributeError, LookupError) as error:  # timm trusts what it reads
        raise InputError(f"{place.where}: its {CONFIG} is not timm's ({error})") from error
    cfg = {key: value for key, value in cfg.items() if key not in LOADED}
    if isinstance(place, Directory):
        return architecture, {**kwargs, "pretrained_cfg": {**cfg, "file": str(place.path), "source": "local-dir"}}
    return architecture, {**kwargs, "pretrained_cfg": {**cfg, "hf_hub_id": place.name, "source": "hf-hub"}}


def create_model(
    name: str, *, option: str = "--model", input_size: int | None = None, device: str | torch.device = "cpu", **kwargs
) -> nn.Module:
    """Build a model with its random initialisation, or with ``pretrained=True`` its published weights.

    Args:
        name: one of ``PAPER_MODELS`` or any name timm accepts, old or new, with or without a tag or a scheme.
        option: the command-line option the name came from, for errors.
        input_size: side of the square input in pixels; ``img_size`` of models whose weights depend on it.
        device: where to create it; ``"meta"`` gives shapes without memory.
        **kwargs: timm's own (num_classes, drop_path_rate, embed_dim, depth, ...).

    Raises:
        InputError: unknown name or tag, or arguments the architecture refuses.
    """
    architecture, defaults = architecture_of(name, option)
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
        given = " ".join(f"{key}={value}" for key, value in kwargs.items() if key != "pretrained_cfg")
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
        if "multiple values for" not in str(error):
            raise
    of_timm = inspect.signature(timm.create_model).parameters
    own = {key: value for key, value in kwargs.items() if key not in of_timm}
    with _overriding(architecture, own):
        return timm.create_model(architecture, **{key: value for key, value in kwargs.items() if key in of_timm})


@contextlib.contextmanager
def _overriding(architecture, kwargs):
    """Let the models that timm builds take these arguments in place of those that their names fix.

    Some of timm's names compute the arguments of the class from others, such as EfficientNet's channel_multiplier, in
    a function whose name begins with one of ``GENERATORS``. Such an argument is given to that function.

    Yields:
        [(function, its arguments)] of these functions and of ``build_model_with_cfg``, as they are called.
    """
    entrypoint = timm.models.model_entrypoint(timm.models.split_model_name_tag(architecture)[0])
    module = sys.modules[entrypoint.__module__]
    left, calls = dict(kwargs), []

    def overridden(name, function):
        parameters = inspect.signature(function).parameters

        def call(*args, **given):
            given = dict(zip(parameters, args, strict=False)) | given
            taken = [key for key in left if key in parameters or name == BUILD]
            given |= {key: left.pop(key) for key in taken}
            calls.append((function, given))
            return function(**given)

        return call

    own = {name: value for name, value in vars(module).items() if name == BUILD or _computes_arguments(name, value)}
    vars(module).update({name: overridden(name, function) for name, function in own.items()})
    try:
        yield calls
    finally:
        vars(module).update(own)


def _computes_arguments(name, value):
    return name.startswith(GENERATORS) and "pretrained" in inspect.signature(value).parameters


def arguments_of(name: str, kwargs: dict, option: str) -> dict:
    """{argument: value} that timm builds a model of this name with: given, fixed by the name, or the class's default.

    Args:
        name, kwargs, option: as of ``create_model``.
    """
    architecture, defaults = architecture_of(name, option)
    kwargs = {**defaults, **kwargs}
    of_timm = {key: kwargs.pop(key) for key in inspect.signature(timm.create_model).parameters if key in kwargs}
    with _on("meta"), _overriding(architecture, kwargs) as calls:
        timm.create_model(architecture, **of_timm)
    arguments = {}
    for function, given in reversed(calls):  # the last one builds; what it is called by, the user can give
        parameters = inspect.signature(function).parameters
        if function.__name__ != BUILD:
            fixed = {key: value.default for key, value in parameters.items() if value.kind is not value.VAR_KEYWORD}
            given = {key: value for key, value in (fixed | given).items() if key in fixed}
            arguments |= {key: value for key, value in given.items() if key not in ("variant", "pretrained")}
            continue
        defaults = {
            key: value.default
            for key, value in inspect.signature(given["model_cls"]).parameters.items()
            if value.default is not value.empty
        }
        config = given.get("model_cfg")
        defaults |= vars(config) if is_dataclass(config) else {}
        arguments |= defaults | {key: value for key, value in given.items() if key not in parameters}
    return arguments


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
    """Raise InputError unless a model takes square images of that side in pixels, and gives a vector for each.

    It is in evaluation mode then. ``name`` begins with the option that names it.
    """
    try:
        with torch.no_grad():
            outputs = model.eval()(torch.zeros(1, 3, input_size, input_size))
    except (RuntimeError, AssertionError, ValueError) as error:  # too small for the last stage, no multiple of a patch
        raise InputError(f"--input_size {input_size}: {name} cannot take it: {error}") from error
    if getattr(outputs, "ndim", None) != 2:
        raise InputError(f"{name}: does not give one vector for an image; change its arguments")


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
    first, convolution = first_convolution(model)
    head = model.get_classifier() if hasattr(model, "get_classifier") else None
    classifier = next((name for name, module in model.named_modules() if module is head), None)
    channels = convolution.in_channels if first else 3
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
