"""The random draws of timm's transform: which box, operations and erased boxes one image gets."""

import copy
import random
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data import auto_augment
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import MaybeToTensor, RandomResizedCropAndInterpolation
from torchvision import transforms
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import _compute_resized_output_size as resized_size

from input_pipeline.augmentation import operations


class Unsupported(ValueError):
    """The transform has a part that has no batched form; the message names it."""


class Draws(NamedTuple):
    """What one image undergoes; lengths are in pixels.

    Attributes:
        geometry: the integers of a ``resizing.Geometry``: the box that is cut out, the size it is resized to, the
            window that is kept of that, whether the kernel is bicubic, and whether the image is mirrored.
        operations: (name, level, whether bicubic) of each operation, in order.
        erased: (seed of the noise, top, left, height, width) of each erased box, in order.
    """

    geometry: tuple[int, ...]
    operations: list[tuple[str, float, bool]]
    erased: list[tuple[int, int, int, int, int]]


class Drawer:
    """Draws what timm's transform would do to an image, without doing it.

    Args:
        transform: a Compose from ``build_transform``, for training or for the test. It is not changed.

    Attributes:
        size: side of the square images that the transform returns, in pixels.
        fill: colour of the points outside an image that is rotated, sheared or moved.
        mean, std: (3, 1, 1), for normalisation.
        noise: of erased boxes: "pixel" (of each pixel), "rand" (one colour for a box) or "const" (zeros).

    Raises:
        Unsupported: the transform has a step, an operation or an interpolation that has no batched form.
    """

    def __init__(self, transform):
        steps = copy.deepcopy(transform.transforms)
        self.fill = (0, 0, 0)
        self._flip = self._policy = self._jitter = self._erasing = None
        match steps:
            case [RandomResizedCropAndInterpolation() as crop, *steps]:
                self._frame, height, width = self._random_frame, *crop.size
                kernels = crop.interpolation if isinstance(crop.interpolation, tuple) else (crop.interpolation,)
            case [transforms.Resize() as crop, transforms.CenterCrop() as window, *steps]:
                self._frame, height, width = self._central_frame, *window.size
                kernels = (crop.interpolation,)
                if min(np.atleast_1d(crop.size)) < height or crop.max_size is not None:
                    raise Unsupported(f"{crop} may give less than {window} takes")
            case _:
                raise Unsupported(f"{steps[0]} at the start of a transform")
        if height != width:
            raise Unsupported(f"images of {height} x {width} pixels, which are not square")
        for kernel in kernels:
            if kernel not in (InterpolationMode.BILINEAR, InterpolationMode.BICUBIC):
                raise Unsupported(f"{kernel.value} interpolation")
        self.size, self._crop = height, crop
        for step in steps:
            self._take(step)

    def _take(self, step):
        match step:
            case transforms.RandomHorizontalFlip():
                self._flip = step
            case auto_augment.RandAugment():
                self._policy = step
                self._record(step.ops)
                step.ops = np.array(step.ops, dtype=object)  # numpy would make this array again for each image
            case auto_augment.AutoAugment():
                self._policy = step
                self._record([operation for group in step.policy for operation in group])
            case transforms.ColorJitter(hue=None):
                self._jitter = step
            case transforms.ColorJitter():
                raise Unsupported("ColorJitter of hue")
            case MaybeToTensor():
                pass
            case transforms.Normalize():
                self.mean, self.std = (torch.as_tensor(values).view(3, 1, 1) for values in (step.mean, step.std))
            case RandomErasing():
                self.noise = "pixel" if step.per_pixel else "rand" if step.rand_color else "const"
                step.per_pixel = step.rand_color = False  # only its boxes are drawn, not their noise
                self._erasing = step
            case _:
                raise Unsupported(type(step).__name__)

    def _record(self, augment_ops):
        """Let timm's operations append their names to a list: ``draw`` passes the list instead of an image."""
        for operation in augment_ops:
            name = auto_augment.NAME_TO_OP[operation.name].__name__
            if name not in operations.OPERATIONS:
                raise Unsupported(f"operation {operation.name}")
            kernels = operation.kwargs["resample"]
            for kernel in kernels if isinstance(kernels, tuple) else (kernels,):
                if kernel not in (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC):
                    raise Unsupported(f"{kernel!r} in operation {operation.name}")
            self.fill = operation.kwargs["fillcolor"]
            operation.aug_fn = _recorder(name)

    def draw(self, height: int, width: int) -> Draws:
        """Draw for one image of this size in pixels.

        The transform's own draws come from the global generators, in the transform's order; the seed of the noise in
        an erased box comes from torch's.
        """
        frame = self._frame(height, width)
        flip = self._flip is not None and torch.rand(1).item() < self._flip.p
        drawn, boxes = [], _Boxes()
        if self._policy is not None:
            self._policy(drawn)
        if self._jitter is not None:
            drawn += self._jittered()
        if self._erasing is not None:
            self._erasing._erase(boxes, 3, self.size, self.size, torch.float32)
        return Draws((*frame, flip), drawn, boxes.erased)

    def _random_frame(self, height, width):
        """Training: a random box, resized to the whole result. Returns a ``resizing.Geometry`` up to its ``cubic``."""
        box = self._crop.get_params(_BLANK.expand(height, width), self._crop.scale, self._crop.ratio)
        kernel = self._crop.interpolation
        if isinstance(kernel, tuple):
            kernel = random.choice(kernel)
        return *box, self.size, self.size, 0, 0, kernel is InterpolationMode.BICUBIC

    def _central_frame(self, height, width):
        """The test: the whole image, resized, and the centre of that. Returns the same."""
        size = self._crop.size
        resized = resized_size((height, width), [size] if isinstance(size, int) else size)
        window = (round((side - self.size) / 2) for side in resized)
        return 0, 0, height, width, *resized, *window, self._crop.interpolation is InterpolationMode.BICUBIC

    def _jittered(self):
        """The operations of a colour jitter, in the order that it draws."""
        jitter = self._jitter
        order, *factors, _ = jitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, None)
        steps = dict(enumerate(zip(("brightness", "contrast", "color"), factors, strict=True)))
        chosen = [steps[index] for index in order.tolist() if index in steps]
        return [(name, factor, False) for name, factor in chosen if factor is not None]


_BLANK = torch.empty(1, 1)  # expanded, it stands for an image of any size without taking memory


class _Boxes:
    """Stands for the image in timm's random erasing: it notes the boxes that timm assigns to."""

    def __init__(self):
        self.erased = []

    def __setitem__(self, index, value):
        _, rows, columns = index
        seed = torch.randint(1 << 62, ()).item()
        self.erased.append((seed, rows.start, columns.start, rows.stop - rows.start, columns.stop - columns.start))


def _recorder(name):
    """A function that timm calls like its operation ``name``, with a list of what was drawn in place of the image."""

    def record(drawn, level=0.0, *, resample, fillcolor):
        if name in operations.RESAMPLED and isinstance(resample, tuple):
            resample = random.choice(resample)
        drawn.append((name, level, resample == Image.Resampling.BICUBIC))
        return drawn

    return record
