"""What Hugging Face's models answer about themselves: their task's modules, their base model, their positions.

Its models say much in their classes and configs: the kind (``model_type``), the prefix of the base model, the size of
images. Names of classes say the rest: a base model is a ``...Model``, one for a task a ``...For<Task>``.
"""

import json
import re
from pathlib import Path

import huggingface_hub
import torch.nn as nn
from transformers import PreTrainedModel

from weight_selection.sources.architectures import HALVES, NO_KEYS, Architecture, keys_inside
from weight_selection.sources.facts import ModelFacts, facts_of_any, first_convolution
from weight_selection.sources.transformers_inputs import example_inputs, image_shape, token_heads

# Tasks whose modules are a classifier. Language models and decoders of masked images are selected.
CLASSIFICATION = r"For(\w*Classification|QuestionAnswering|MultipleChoice|NextSentencePrediction)"
INSIDE_HEADS = r"For((Semantic|Instance|Universal)?Segmentation|ObjectDetection)$"  # whose other modules are selected
NORM, ATTENTION = r"Norm", r"Attention"  # in the names of classes
KINDS = ("layer_type", "attention_type", "use_rope")  # attributes of a module that say its kind of attention
MLP = r"(MLP|Mlp|FFN|FeedForward|Intermediate|Output|LayerFF)$"
MLP_LAYERS = r"(fc|pwconv|pointwise_conv)\d$"  # in the names of modules; their blocks have no class for the MLP
POSITIONS = r"(^|\.)(position_embeddings?|embed_positions|wpe)(\.weight)?$"
POOLER = r"(^|\.)pooler\."  # from which no head reads but those of classes of sequences


def model_facts(model: nn.Module) -> ModelFacts:
    """What one of Hugging Face's models answers; it may be on the meta device."""
    if not isinstance(model, PreTrainedModel):  # a part of one
        return facts_of_any(model)
    inputs = example_inputs(model)
    name, convolution = first_convolution(model) if "pixel_values" in inputs else (None, None)
    first = {f"{name}.weight": convolution} if name else {}
    prefix = _base_prefix(model)
    inside = re.search(INSIDE_HEADS, type(model).__name__)
    classifier = None if inside else keys_inside(_classifier(model)) or NO_KEYS
    components = {**_components(model), "patch_embed": keys_inside([name] if name else [])}
    components["pos_embed"] = POSITIONS if any(re.search(POSITIONS, key) for key in model.state_dict()) else None
    return ModelFacts(
        architecture=Architecture(
            name=model.config.model_type,
            classifier=classifier,
            components={component: pattern for component, pattern in components.items() if pattern},
        ),
        inputs=inputs or None,
        attention_kinds=_attention_kinds(model),
        first_convolutions=first,
        grid=_grid(model.config, convolution) if name else None,
        token_heads=token_heads(model),
        position_embeddings=_positions_of_patches(model, name) if name else (),
        normalization=(recorded_normalization(model) or HALVES) if name else None,  # 0.5 is ViT's
        prefix=prefix,
        spare=rf"{POOLER}|^(?!{re.escape(prefix)})" if prefix else POOLER,
    )


def recorded_normalization(model: nn.Module) -> tuple | None:
    """(mean, std) by channel of a model's images, as its preprocessor_config.json says; None without one."""
    place = model.name_or_path
    path = Path(place, "preprocessor_config.json") if place else None
    if place and not path.is_file() and place.count("/") == 1:
        path = huggingface_hub.try_to_load_from_cache(place, "preprocessor_config.json")
    if not isinstance(path, (str, Path)) or not Path(path).is_file():
        return None
    recorded = json.loads(Path(path).read_text(encoding="utf-8"))
    known = isinstance(recorded, dict) and recorded.get("image_mean") and recorded.get("image_std")
    return (tuple(recorded["image_mean"]), tuple(recorded["image_std"])) if known else None


def _base_prefix(model):
    """What stands before the keys of the base model that a model with a head wraps."""
    inner = model.base_model
    if inner is not model:
        wraps = type(inner).__name__.endswith("Model")  # else a part of a base model, such as an encoder
        return f"{model.base_model_prefix}." if wraps else ""
    towers = [name for name, child in model.named_children() if _is_base(child)]
    return f"{towers[0]}." if len(towers) == 1 and "For" in type(model).__name__ else ""


def _is_base(module):
    return isinstance(module, PreTrainedModel) and type(module).__name__.endswith("Model")


def _classifier(model):
    """Names of the modules that belong to a task of classification: all beside the base model."""
    if not re.search(CLASSIFICATION, type(model).__name__):
        return ()
    children = model.named_children()
    return [name for name, m in children if m is not model.base_model and not isinstance(m, PreTrainedModel)]


def _components(model):
    """{name that ``exclude`` takes: pattern}, of the modules that have tensors of their own (Table 10)."""
    found = {"attention": [], "norm": [], "mlp": []}
    classes = {name: type(module).__name__ for name, module in model.named_modules()}
    for name, module in model.named_modules():
        if next(module.parameters(recurse=False), None) is None:
            continue
        parts = name.split(".")
        around = [classes[".".join(parts[:end])] for end in range(1, len(parts) + 1)]
        if re.search(NORM, classes[name]):
            found["norm"].append(name)
        elif any(re.search(ATTENTION, cls) for cls in around):
            found["attention"].append(name)
        elif any(re.search(MLP, cls) for cls in around) or re.search(MLP_LAYERS, name):
            found["mlp"].append(name)
    return {component: keys_inside(names) for component, names in found.items()}


def _attention_kinds(model):
    """{name of a module: its kind of attention}."""
    found = {}
    for name, module in model.named_modules():
        words = [f"{kind} {getattr(module, kind)}" for kind in KINDS if hasattr(module, kind)]
        if hasattr(module, "sliding_window"):
            words.append("full" if module.sliding_window is None else "sliding")
        if words:
            found[name] = ", ".join(words)
    return found


def _grid(config, convolution):
    """(height, width) of the grid of patches."""
    sides = zip(image_shape(config)[1:], convolution.kernel_size, convolution.stride, strict=True)
    return tuple((size - kernel) // stride + 1 for size, kernel, stride in sides)


def _positions_of_patches(model, convolution):
    """Keys of the position embeddings that stand in a module around the first convolution."""
    parts = convolution.split(".")
    around = {".".join(parts[:end]) for end in range(len(parts))}
    found = ((key, re.search(POSITIONS, key)) for key in model.state_dict())
    return tuple(key for key, match in found if match and key[: match.start()] in around)
