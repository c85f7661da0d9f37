"""timm's transform in batches: the same random draws, image by image, then the same pixels, many at a time.

What an image undergoes is drawn by timm's own objects, so a seed means the same here and there. It is then done to
uint8 pixels in torch, on a CPU or an accelerator::

    augmentation = Augmentation(build_transform(args, train=True))
    packed = augmentation.pack([augmentation.draw(height, width) for height, width in sizes])
    images = augmentation.finish(augmentation.apply(pixels, packed), packed)
"""

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

from input_pipeline.augmentation import operations, resizing
from input_pipeline.augmentation.resizing import Pixels

__all__ = ["Augmentation", "Draws", "Packed", "Pixels", "Unsupported"]


class Unsupported(ValueError):
    """The transform has something that is not done in batches; the message names it."""


class Draws(NamedTuple):
    """What one image undergoes; lengths in pixels.

    Attributes:
        geometry: ``resizing.Geometry`` as integers: the box that is cut out, the size it is resized to, the window of
            that which is kept, whether by the bicubic kernel, whether mirrored.
        operations: (name, level, whether bicubic) of each, in order.
        erased: (seed of its noise, top, left, height, width) of each erased box, in order.
    """

    geometry: tuple[int, ...]
    operations: list[tuple[str, float, bool]]
    erased: list[tuple[int, int, int, int, int]]


class Packed(NamedTuple):
    """The draws of a batch of B images that undergo N operations in all; small, picklable and on the host.

    Attributes:
        geometry: (B, 10) int64, a row of ``resizing.Geometry`` for each image.
        groups: (name, start, stop) of operations that are done at once; those of an image keep their order.
        rows: (N,) int64, images of the batch; ``rows[start:stop]`` are a group's.
        levels: (N, 2) float64, the level of each operation and whether it interpolates by the bicubic kernel.
        erased: (image, seed of its noise, top, left, height, width) of each erased box, in order.
    """

    geometry: torch.Tensor
    groups: list[tuple[str, int, int]]
    rows: torch.Tensor
    levels: torch.Tensor
    erased: list[tuple[int, int, int, int, int, int]]


class Augmentation:
    """The batched form of a transform of timm's.

    Args:
        transform: Compose from ``datasets.build_transform``, of training or of the test; it is left as it is.

    Attributes:
        size: side of the square images that come out, in pixels.

    Raises:
        Unsupported: the transform has a step, an operation or an interpolation without a batched form.
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
                step.ops = np.array(step.ops, dtype=object)  # as numpy would make it anew for each image
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
                self._mean, self._std = (torch.as_tensor(values).view(3, 1, 1) for values in (step.mean, step.std))
            case RandomErasing():
                self._noise = "pixel" if step.per_pixel else "rand" if step.rand_color else "const"
                step.per_pixel = step.rand_color = False  # its boxes are wanted without the noise
                self._erasing = step
            case _:
                raise Unsupported(type(step).__name__)

    def _record(self, augment_ops):
        """Makes operations of timm's append themselves to a list, which they take for the image."""
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

    def draw(self, height, width):
        """Draws for one image, from the global generators as the transform does; a seed for the noise of erasing.

        Args:
            height, width: of the image, in pixels.
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
        box = self._crop.get_params(_BLANK.expand(height, width), self._crop.scale, self._crop.ratio)
        kernel = self._crop.interpolation
        if isinstance(kernel, tuple):
            kernel = random.choice(kernel)
        return *box, self.size, self.size, 0, 0, kernel is InterpolationMode.BICUBIC

    def _central_frame(self, height, width):
        size = self._crop.size
        resized = resized_size((height, width), [size] if isinstance(size, int) else size)
        window = (round((side - self.size) / 2) for side in resized)
        return 0, 0, height, width, *resized, *window, self._crop.interpolation is InterpolationMode.BICUBIC

    def _jittered(self):
        jitter = self._jitter
        order, *factors, _ = jitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, None)
        steps = dict(enumerate(zip(("brightness", "contrast", "color"), factors, strict=True)))
        chosen = [steps[index] for index in order.tolist() if index in steps]
        return [(name, factor, False) for name, factor in chosen if factor is not None]

    def pack(self, draws):
        """Sort what a batch undergoes by operation.

        Args:
            draws: ``Draws`` of its images, in order.

        Returns:
            ``Packed``.
        """
        groups, rows, levels = [], [], []
        for layer in range(max(len(one.operations) for one in draws)):
            members = {}
            for row, one in enumerate(draws):
                if layer < len(one.operations):
                    name, *level = one.operations[layer]
                    members.setdefault(name, []).append((row, level))
            for name, group in members.items():
                groups.append((name, len(rows), len(rows) + len(group)))
                rows += [row for row, _ in group]
                levels += [level for _, level in group]
        return Packed(
            geometry=torch.tensor([one.geometry for one in draws], dtype=torch.int64),
            groups=groups,
            rows=torch.tensor(rows, dtype=torch.int64),
            levels=torch.tensor(levels, dtype=torch.float64).view(-1, 2),
            erased=[(row, *box) for row, one in enumerate(draws) for box in one.erased],
        )

    def apply(self, pixels, packed, batched):
        """Cut out, resize, mirror and change the images of a batch, as drawn.

        Args:
            pixels: ``Pixels`` of the images, in the order of their draws; on a CPU also a list of them.
            packed: of the same images.
            batched: all images of a group at once, as an accelerator likes it, or one at a time, which stays in the
                cache of a CPU, the only place for it. They differ by a level in few pixels.

        Returns:
            (B, 3, size, size) uint8, where the pixels are. An image is the same in any batch; batched, up to a level in
            few pixels, as matrices of another size may be multiplied in another order.
        """
        functions = operations.OPERATIONS if batched else operations.ON_CPU
        if batched:
            images = resizing.by_products(pixels, packed.geometry, self.size)
        else:
            listed = pixels.images() if isinstance(pixels, Pixels) else pixels
            images = resizing.one_by_one(listed, packed.geometry, self.size)
        device = images.device
        fill = torch.tensor(self.fill, dtype=torch.float32).view(3, 1, 1)
        # A transfer that blocks would wait for all that the device still has to do.
        rows, levels, fill = (values.to(device, non_blocking=True) for values in (packed.rows, packed.levels, fill))
        for name, start, stop in packed.groups:
            if batched:
                some = rows[start:stop]
                changed = functions[name](images.index_select(0, some), *levels[start:stop].unbind(1), fill)
                images.index_copy_(0, some, changed)
            else:
                for row, level in zip(rows[start:stop], levels[start:stop], strict=True):
                    image = images[row, None]
                    image.copy_(functions[name](image, *level.split(1), fill))
        return images

    def finish(self, images, packed):
        """Normalise and erase.

        Args:
            images: (B, 3, size, size) uint8 from ``apply``.
            packed: of the same images.

        Returns:
            (B, 3, size, size) float32. The noise in erased boxes is the same in any batch, and another on another
            kind of device.
        """
        device = images.device
        mean, std = (values.to(device, non_blocking=True) for values in (self._mean, self._std))
        result = torch.empty_like(images, dtype=torch.float32)
        parts = len(images) if device.type == "cpu" else 1  # one image stays in the cache of a CPU
        for pixels, values in zip(images.chunk(parts), result.chunk(parts), strict=True):
            torch.div(pixels, 255, out=values).sub_(mean).div_(std)
        generator = torch.Generator(device)
        for row, seed, top, left, height, width in packed.erased:
            box = result[row, :, top : top + height, left : left + width]
            if self._noise == "const":
                box.zero_()
            else:
                shape = (3, height, width) if self._noise == "pixel" else (3, 1, 1)
                box.copy_(torch.randn(shape, generator=generator.manual_seed(seed), device=device))
        return result


_BLANK = torch.empty(1, 1)  # expanded, it passes for an image of any size at no cost


class _Boxes:
    """What random erasing takes for an image: keeps the boxes that it assigns to."""

    def __init__(self):
        self.erased = []

    def __setitem__(self, index, value):
        _, rows, columns = index
        seed = torch.randint(1 << 62, ()).item()
        self.erased.append((seed, rows.start, columns.start, rows.stop - rows.start, columns.stop - columns.start))


def _recorder(name):
    def record(drawn, level=0.0, *, resample, fillcolor):
        if name in operations.RESAMPLED and isinstance(resample, tuple):
            resample = random.choice(resample)
        drawn.append((name, level, resample == Image.Resampling.BICUBIC))
        return drawn

    return record
