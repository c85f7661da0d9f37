"""Data sets as the options describe them, and what happens to their images."""

from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from timm.data import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_INCEPTION_MEAN,
    IMAGENET_INCEPTION_STD,
    auto_augment,
    create_transform,
)

from models.weights import training_options
from program import InputError
from sources import SOURCES
from utils import main_first, say


def to_pixels(image) -> torch.Tensor:
    """uint8 (height, width, 3) of a PIL image in RGB."""
    return torch.from_numpy(np.array(image))


def build_dataset(args, train: bool) -> tuple:
    """Build the training or the test set that the options describe.

    Returns:
        (dataset of (uint8 (height, width, 3), label), number of classes).

    Raises:
        InputError: the files are not there and cannot be downloaded; some are missing or cannot be read; class folders
            are empty or differ.
    """
    source = SOURCES[args.data_set]
    if source.layout is None:
        return source.build(None, train, to_pixels, False), source.classes
    if args.data_path is None:
        raise InputError(f"--data_path is missing: the directory that holds {source.layout} of {args.data_set}")
    if source.folders:
        roots = [Path(args.data_path) / "train", Path(args.data_path) / "val"]
        if args.eval_data_path is not None:
            roots = [Path(args.data_path), Path(args.eval_data_path)]
        dataset = _open_folder(source, roots[not train], args.data_set)
        if not train and not args.eval and dataset.classes != (other := _class_folders(roots[0])):
            odd = sorted(set(dataset.classes) ^ set(other))[0]
            raise InputError(
                f"--data_path {args.data_path}: class folder {odd} is in only one of {roots[0]} and {roots[1]}"
            )
        return dataset, len(dataset.classes)
    dataset = main_first(lambda: _open_or_download(args, source, train))
    if len(dataset) != (complete := source.images[not train]):  # a part of the set may be meant, so it is no error
        part = "training" if train else "test"
        found = f"{len(dataset):,} {part} images of {args.data_set}, not {complete:,}"
        say(f"warning: --data_path {args.data_path}: {found}")
    return dataset, source.classes


def _class_folders(root):
    return sorted(path.name for path in root.iterdir() if path.is_dir())


def _open_folder(source, root, name):
    if not root.is_dir():
        raise InputError(f"--data_path: no directory {root}; {name} needs {source.layout}, or --eval_data_path")
    try:
        return source.build(root, None, to_pixels, None)
    except FileNotFoundError as error:  # torchvision's word for no class folders and for empty ones
        raise InputError(f"--data_path: {root} must hold class folders with images in them: {error}") from error


# What torchvision raises for files that are missing, damaged or cut off, for a package that it does without until it
# needs it (scipy) and for connections that break.
UNREADABLE = (RuntimeError, OSError, ValueError, ImportError, HTTPException)


def _open_or_download(args, source, train):
    if not Path(args.data_path).is_dir():
        raise InputError(
            f"--data_path {args.data_path}: no such directory; make it, and {args.data_set} is downloaded into it, "
            f"or name the one that holds {source.layout}"
        )

    try:
        return source.build(args.data_path, train, to_pixels, False)
    except RuntimeError:  # torchvision's word for files that are not there or fail their check sum
        pass
    except UNREADABLE as error:  # there, but torchvision would take it for complete and download nothing
        raise InputError(
            f"--data_path {args.data_path}: cannot read {source.layout} of {args.data_set} ({error}); "
            "if it is incomplete, unpack it again, or remove it to have it downloaded"
        ) from error
    try:
        return source.build(args.data_path, train, to_pixels, True)
    except UNREADABLE as error:
        raise InputError(
            f"--data_path {args.data_path}: holds no complete {source.layout} of {args.data_set}, and downloading "
            f"and reading it failed ({error})"
        ) from error


# ---------------------------------------------------------------------------------------------------------
# Transforms


def normalization(imagenet: bool) -> tuple:
    """Mean and standard deviation, by channel, that images are normalised with: ImageNet's, or 0.5 and 0.5."""
    if imagenet:
        return IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    return IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD


def trained_config(model: nn.Module, path, option: str) -> dict:
    """A model's timm configuration, with the ``mean`` and ``std`` of images that its weights were trained with.

    A checkpoint of main.py says itself what these were.

    Args:
        model: of timm.
        path: file of the weights that ``option`` named, or None if they are timm's.
    """
    options = {} if path is None else training_options(path, option)
    if isinstance(options.get("imagenet_default_mean_and_std"), bool):
        mean, std = normalization(options["imagenet_default_mean_and_std"])
        return model.pretrained_cfg | {"mean": mean, "std": std}
    return model.pretrained_cfg


def build_transform(args, train: bool):
    """timm's transform from a PIL image to a normalised (3, input_size, input_size) tensor.

    Training: random resized crop, flip, RandAugment, random erasing (Table 13). Test: resize to 256/224 of the input
    size and crop the centre; from 384 pixels on, squash the whole image, as ConvNeXt does.
    """
    mean, std = normalization(args.imagenet_default_mean_and_std)
    common = {"input_size": args.input_size, "mean": mean, "std": std}
    if train:
        try:
            transform = create_transform(
                **common,
                is_training=True,
                scale=tuple(args.scale),
                hflip=args.hflip,
                color_jitter=args.color_jitter,
                auto_augment=None if args.aa == "none" else args.aa,
                interpolation=args.train_interpolation,
                re_prob=args.reprob,
                re_mode=args.remode,
                re_count=args.recount,
            )
        except (AssertionError, ValueError, KeyError) as error:  # timm's ways of refusing a policy
            raise InputError(f"--aa {args.aa}: no policy of timm's; such as rand-m9-mstd0.5-inc1, or none") from error
        return _with_posterize_to_black(transform)
    squash = args.crop_pct is None and args.input_size >= 384
    return create_transform(
        **common,
        is_training=False,
        interpolation="bicubic",
        crop_pct=1.0 if squash else args.crop_pct or 224 / 256,
        crop_mode="squash" if squash else "center",
    )


def _with_posterize_to_black(transform):
    """Let RandAugment posterize to 0 bits, which the paper's policy draws and Pillow refuses from some version on."""
    for step in transform.transforms:
        operations = getattr(step, "ops", None) or [op for group in getattr(step, "policy", ()) for op in group]
        for operation in operations:
            if operation.aug_fn is auto_augment.posterize:
                operation.aug_fn = _posterize
    return transform


def _posterize(image, bits, **_):
    """timm's operation; no bits leave a black image, as they always did."""
    return image.point(lambda value: 0) if bits == 0 else auto_augment.posterize(image, bits)
