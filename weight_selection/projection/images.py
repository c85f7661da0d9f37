"""Calibration: a few images, without labels, and what a model's dense layers take and give while it sees them."""

import hashlib
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.data import create_transform
from torch.overrides import TorchFunctionMode
from torchvision.datasets.folder import IMG_EXTENSIONS

from datasets import ImageFiles
from weight_selection import CALIBRATION_IMAGES, NOISE, check_calibration
from weight_selection.errors import InputError
from weight_selection.files import sha256
from weight_selection.image_files import BadImage

BATCH_SIZE = 16
DENSE = {F.linear, F.conv2d, torch.conv2d}
PRODUCTS = {"mul", "mul_", "__mul__", "__rmul__"}


class Calibration:
    """Images in batches; they are made or read anew each time, so that they need no memory.

    Args:
        source: ``noise``, or a directory, searched with all below it.
        count: number of images; of a directory that has more, a random draw. None: ``CALIBRATION_IMAGES``, or all that
            a directory has if these are fewer.
        side: of the square images in pixels. None: as the student takes them.
        size: (channels, height, width) that the student is built for.
        config: the teacher's pretrained_cfg: its mean, std and interpolation.
        seed: of the draw and of the noise.

    Raises:
        InputError: no such directory, no images in it, or not as many as ``count``.
    """

    def __init__(self, source, count: int | None, side: int | None, size: tuple, config: dict, seed: int):
        check_calibration(source, count, side)
        if seed < 0:
            raise InputError(f"--seed {seed}: give a number from 0 up")
        self.size = (size[0], side, side) if side else tuple(size)
        self.config, self.seed, self.images = config, seed, None
        self.count = count or CALIBRATION_IMAGES
        if str(source) == NOISE:
            return
        root = Path(source)
        if self.size[0] != 3:
            raise InputError(
                f"--calibration {root}: images are RGB, the model takes {self.size[0]} channels; use {NOISE}"
            )
        files = (Path(folder, name) for folder, _, names in os.walk(root, followlinks=True) for name in names)
        paths = sorted(path for path in files if path.suffix.lower() in IMG_EXTENSIONS)
        if not paths:
            raise InputError(
                f"--calibration {root}: no images there ({' '.join(IMG_EXTENSIONS)}); name another directory"
            )
        if len(paths) < (count or 1):
            raise InputError(
                f"--calibration {root}: {len(paths)} images there, --calibration_images asks for {count}; give fewer"
            )
        self.count = min(self.count, len(paths))
        words = ("mean", "std", "interpolation", "crop_pct")
        transform = create_transform(self.size, **{word: config[word] for word in words})
        self.images = ImageFiles([(paths[index], None) for index in draw(len(paths), self.count, seed)], transform)

    def __len__(self):
        return -(-self.count // BATCH_SIZE)

    @property
    def sha256(self):
        """SHA-256 of the lines of the images' SHA-256, in their order, as hexadecimal digits; None of noise."""
        if self.images is None:
            return None
        lines = (f"{sha256(path)}\n" for path, _ in self.images.samples)
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def __iter__(self):
        """Batches, float32 (n, channels, height, width), normalised."""
        for first in range(0, self.count, BATCH_SIZE):
            indices = range(first, min(first + BATCH_SIZE, self.count))
            yield torch.stack([self._noise(index) if self.images is None else self._read(index) for index in indices])

    def _read(self, index):
        try:
            return self.images[index][0]
        except BadImage as error:
            raise InputError(f"--calibration: {error}; remove it, or give another directory") from error

    def _noise(self, index):
        mean, std = (torch.tensor(self.config[word])[: self.size[0], None, None] for word in ("mean", "std"))
        return (noise(self.size, np.random.SeedSequence((self.seed, index))) - mean) / std


def draw(total: int, count: int, seed: int) -> list:
    """``count`` of ``total`` indices without replacement, ascending."""
    return sorted(np.random.Generator(np.random.PCG64(seed)).permutation(total)[:count].tolist())


def noise(size: tuple, entropy) -> torch.Tensor:
    """Noise with what photographs have in common: amplitudes that fall as 1/frequency, channels that are much alike,
    brightness and contrast of their own.

    Args:
        size: (channels, height, width).
        entropy: seed of numpy's generator.

    Returns:
        float32 in 0..1, about 0.5 +- 0.25.
    """
    channels, height, width = size
    random = np.random.Generator(np.random.PCG64(entropy))
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = np.inf
    layers = np.fft.irfft2(np.fft.rfft2(random.standard_normal((1 + channels, height, width))) / frequency, s=size[1:])
    layers /= layers.std(axis=(1, 2), keepdims=True)
    image = 0.85 * layers[:1] + 0.5 * layers[1:]  # light, and colour
    image = random.uniform(0.4, 1.2) * image + random.normal(0, 0.4) + random.normal(0, 0.3, (channels, 1, 1))
    return torch.from_numpy((0.5 + 0.25 * image).clip(0, 1)).float()


def check_batches(images, channels: int, count: int | None, side: int | None):
    """Images of a caller's own, in batches.

    Args:
        images: a tensor (n, channels, height, width), or an iterable of such.
        channels: of the model.
        count, side: must be None: all are taken, as they are.

    Raises:
        InputError: they are something else, or can be gone through only once.
    """
    for option, value in (("calibration_images", count), ("calibration_size", side)):
        if value is not None:
            raise InputError(f"{option}={value}: has no effect with images given as tensors; leave it out")
    if isinstance(images, torch.Tensor):
        images = images.split(BATCH_SIZE)
    if not hasattr(images, "__iter__") or iter(images) is images:
        raise InputError(f"calibration: a {type(images).__name__} cannot be gone through three times; give a list")
    first = next(iter(images), None)
    if not isinstance(first, torch.Tensor) or not first.is_floating_point() or first.ndim != 4 or not len(first):
        found = f"{first.dtype} {tuple(first.shape)}" if isinstance(first, torch.Tensor) else type(first).__name__
        raise InputError(f"calibration: batches must be floating point (n, {channels}, height, width), not {found}")
    if first.shape[1] != channels:
        raise InputError(f"calibration: images have {first.shape[1]} channels, the model takes {channels}")
    return images


class Tap(TorchFunctionMode):
    """Shows a model's layers as they run.

    Args:
        model: whose parameters are named.
        dense: ``(key of the weight, input, output) -> output``, called after every linear layer and convolution.
        norm: likewise after every ``layer_norm``.
        scaled: ``(key, other factor)``, called before every product with a parameter.

    A weight that the model computes from parameters (weight standardisation) is none of them, and not shown.
    """

    def __init__(self, model: nn.Module, dense, norm=None, scaled=None):
        super().__init__()
        self.keys = {id(parameter): key for key, parameter in model.named_parameters()}
        self.dense, self.norm, self.scaled = dense, norm, scaled

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in DENSE:
            key = self.keys.get(id(args[1] if len(args) > 1 else kwargs["weight"]))
            if key is not None:
                return self.dense(key, args[0], func(*args, **kwargs))
        elif func is F.layer_norm and self.norm is not None:
            key = self.keys.get(id(args[2] if len(args) > 2 else kwargs.get("weight")))
            if key is not None:
                return self.norm(key, args[0], func(*args, **kwargs))
        elif self.scaled is not None and getattr(func, "__name__", "") in PRODUCTS:
            factors = (*args, *kwargs.values())[:2]
            for one, other in (factors, factors[::-1]):
                if id(one) in self.keys:
                    self.scaled(self.keys[id(one)], other)
        return func(*args, **kwargs)


def vectors(x: torch.Tensor, weight_ndim: int) -> torch.Tensor:
    """What a dense layer takes or gives, as (n, channels): the channels of a convolution are dimension 1."""
    x = x.movedim(1, -1) if weight_ndim > 2 else x
    return x.reshape(-1, x.shape[-1])
