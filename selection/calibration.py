"""Calibration: a few images, without labels, and what a model's dense layers take and give while it sees them."""

from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.data import create_transform
from torch.overrides import TorchFunctionMode
from torchvision.datasets.folder import IMG_EXTENSIONS

from files import check_directory
from program import InputError
from selection import NOISE
from sources import BadImage, ImageFiles

BATCH_SIZE = 16
DENSE = {F.linear, F.conv2d, torch.conv2d}
PRODUCTS = {"mul", "mul_", "__mul__", "__rmul__"}


class Calibration:
    """Images in batches; they are made or read anew each time, so that they need no memory.

    Args:
        source: ``noise``, or a directory, searched with all below it.
        count: number of images; of a directory that has more, a random draw.
        size: (channels, height, width) of the model's input.
        config: the teacher's pretrained_cfg: its mean, std and interpolation.
        seed: of the draw and of the noise.

    Raises:
        InputError: no such directory, no images in it, or not as many as ``count``.
    """

    def __init__(self, source, count: int, size: tuple, config: dict, seed: int):
        self.count, self.size, self.seed, self.images = count, tuple(size), seed, None
        if str(source) == NOISE:
            return
        root = Path(source)
        check_directory(root, "--calibration", f"name one of images, or {NOISE}")
        paths = sorted(path for path in root.rglob("*") if path.suffix.lower() in IMG_EXTENSIONS)
        if len(paths) < count:
            raise InputError(
                f"--calibration {root}: {len(paths)} images there, --calibration_images asks for {count}; give fewer"
            )
        draw = np.random.Generator(np.random.PCG64(seed)).permutation(len(paths))[:count]
        words = ("mean", "std", "interpolation", "crop_pct")
        transform = create_transform(self.size, **{word: config[word] for word in words})
        self.images = ImageFiles([(paths[index], None) for index in sorted(draw)], transform)

    def __len__(self):
        return -(-self.count // BATCH_SIZE)

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
        return noise(self.size, np.random.SeedSequence((self.seed, index)))


def noise(size: tuple, entropy) -> torch.Tensor:
    """An image of noise whose amplitude falls as 1/frequency, as that of photographs does; mean 0, deviation 1.

    Args:
        size: (channels, height, width); channels are independent.
        entropy: seed of numpy's generator.
    """
    channels, height, width = size
    white = np.random.Generator(np.random.PCG64(entropy)).standard_normal(size)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = np.inf
    image = np.fft.irfft2(np.fft.rfft2(white) / frequency, s=(height, width))
    return torch.from_numpy(image / image.std(axis=(1, 2), keepdims=True)).float()


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
            for one, other in (args, args[::-1]):
                if id(one) in self.keys:
                    self.scaled(self.keys[id(one)], other)
        return func(*args, **kwargs)


def vectors(x: torch.Tensor, weight_ndim: int) -> torch.Tensor:
    """What a dense layer takes or gives, as (n, channels): the channels of a convolution are dimension 1."""
    x = x.movedim(1, -1) if weight_ndim > 2 else x
    return x.reshape(-1, x.shape[-1])
