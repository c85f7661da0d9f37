"""What torchvision's models answer about themselves: their classifier, the images that they take, their positions.

Its models share no class and record nothing, but their authors named the parts alike: the classifier is ``fc``,
``head`` (whatever is put in place of that one layer), or the last layer of ``classifier`` or ``heads``.
"""

import re

import torch
import torch.nn as nn

from weight_selection.sources.architectures import IMAGENET, Architecture, found_components, keys_inside
from weight_selection.sources.facts import ModelFacts, first_convolution

IMAGE_SIZE = 224  # pixels; of models that take images of any size
INCEPTION_SIZE = 299
CLASSIFIERS = {"fc": True, "head": True, "heads": False, "classifier": False}  # name: is all of it the classifier
AUXILIARY = ("aux1", "aux2", "AuxLogits", "aux_classifier")  # classifiers that only training uses
TAKES_IMAGES = re.compile(r"torchvision\.models\.((quantization|segmentation)\.)?\w+")  # others take videos or lists
MLPS = {"ConvNeXt": r"\.block\.[35]\.", "MaxVit": r"\.mlp_layer\.[13]\."}  # those that are no module of their own
LAYERS = {"VGG": r"^features\.(\d+)\."}  # plain stacks: convolutions with poolings between them


def model_facts(model: nn.Module) -> ModelFacts:
    """What one of torchvision's models answers; it may be on the meta device."""
    base = [cls for cls in type(model).__mro__ if cls.__module__.startswith("torchvision.")][-1]
    root, takes_images = base.__name__, TAKES_IMAGES.fullmatch(base.__module__)
    first, convolution = first_convolution(model)
    classifier = _classifier(dict(model.named_modules()))
    size = _image_size(model, root)
    channels = convolution.in_channels if first else 3
    patch = getattr(model, "patch_size", None) if root == "VisionTransformer" else None
    return ModelFacts(
        architecture=Architecture(
            name=root.lower(),
            classifier=keys_inside(classifier) if classifier else None,
            components=found_components(model, (first,)) | ({"mlp": MLPS[root]} if root in MLPS else {}),
        ),
        inputs=(torch.empty(1, channels, size, size, device="meta"),) if takes_images else None,
        layer_patterns=[(re.compile(LAYERS[root]), True)] if root in LAYERS else [],
        first_convolutions={f"{first}.weight": convolution} if first else {},
        grid=(size // patch, size // patch) if patch else None,
        position_embeddings=("encoder.pos_embedding",) if patch else (),
        normalization=IMAGENET,
    )


def _classifier(modules):
    """Names of the modules that belong to the task: the layers that give the classes, and auxiliary classifiers."""
    names = []
    for name, whole in CLASSIFIERS.items():
        inside = {path: module for path, module in modules.items() if path == name or path.startswith(f"{name}.")}
        layers = [path for path, module in inside.items() if isinstance(module, (nn.Linear, nn.Conv2d))]
        names += [name] if whole and layers else layers[-1:]
    return (*names, *(name for name in AUXILIARY if name in modules)) if names else ()


def _image_size(model, root):
    """Side of the square images that a model takes, in pixels."""
    if root == "VisionTransformer":
        return model.image_size
    if root == "MaxVit":
        return 4 * model.blocks[0].grid_size[0]  # its stem and its first block halve the image
    return INCEPTION_SIZE if root == "Inception3" else IMAGE_SIZE
