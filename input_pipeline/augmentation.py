"""timm's transform in batches: the same random draws for each image, then the same pixels for many images at a time.

timm's own objects draw the random numbers, so a seed means the same here as there. The operations then run on uint8
pixels in torch, on a CPU or an accelerator::

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

from input_pipeline import operations, resizing
from input_pipeline.resizing import Pixels


class Unsupported(ValueError):
    """The transform has a part that has no batched form; the message names it."""


class Draws(NamedTuple):
    """What one image undergoes; lengths are in pixels."""

    crop: tuple[int, ...]  # of a ``resizing.Crop``
    operations: list[tuple[str, float, bool]]  # (name, level, whether bicubic) of each operation, in order
    erased: list[tuple[int, int, int, int, int]]  # (seed of the noise, top, left, height, width) of each box, in order


class Packed(NamedTuple):
    """The draws of a batch of B images with N operations in all; small, picklable and on the host.

    ``rows[start:stop]`` belong to a group of equal operations, which run together. An image's operations keep their
    order: its first one is in an earlier group than its second one.
    """

    crops: torch.Tensor  # (B, 10) int64, a row of ``resizing.Crop`` for each image
    groups: list[tuple[str, int, int]]  # (name, start, stop) of each group
    rows: torch.Tensor  # (N,) int64, which image of the batch each operation changes
    levels: torch.Tensor  # (N, 2) float64, the level of each operation, and 1 if its kernel is bicubic, else 0
    erased: list[tuple[int, int, int, int, int, int]]  # (image, seed of the noise, top, left, height, width) of each


class Augmentation:
    """The batched form of one of timm's transforms, a Compose from ``build_transform``, which is not changed.

    Square images of side ``size`` in pixels come out, normalised by ``mean`` and ``std``, both (3, 1, 1).

    Raises:
        Unsupported: the transform has a step, an operation or an interpolation that has no batched form.
    """

    def __init__(self, transform: transforms.Compose):
        steps = copy.deepcopy(transform.transforms)
        self._fill = (0, 0, 0)  # colour of the points outside an image that is rotated, sheared or moved
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
                # The noise of a box: drawn for each pixel, one colour, or zeros.
                self._noise = "pixel" if step.per_pixel else "rand" if step.rand_color else "const"
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
            self._fill = operation.kwargs["fillcolor"]
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
        """Training: a random box, resized to the whole result. Returns a ``resizing.Crop`` up to its ``cubic``."""
        top, left, *box = self._crop.get_params(_BLANK.expand(height, width), self._crop.scale, self._crop.ratio)
        tall, wide = (max(1, side) for side in box)  # of small images timm may draw boxes of no pixel
        kernel = self._crop.interpolation
        if isinstance(kernel, tuple):
            kernel = random.choice(kernel)
        place = min(top, height - 1), min(left, width - 1)
        return *place, tall, wide, self.size, self.size, 0, 0, kernel is InterpolationMode.BICUBIC

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

    def pack(self, draws: list[Draws]) -> Packed:
        """Sort the draws of a batch, one for each image, by operation.

        One round takes the first operation of every image, the next round the second, and so on; within a round, equal
        operations form a group.
        """
        groups, rows, levels = [], [], []
        for number in range(max(len(one.operations) for one in draws)):
            members = {}
            for row, one in enumerate(draws):
                if number < len(one.operations):
                    name, *level = one.operations[number]
                    members.setdefault(name, []).append((row, level))
            for name, group in members.items():
                groups.append((name, len(rows), len(rows) + len(group)))
                rows += [row for row, _ in group]
                levels += [level for _, level in group]
        return Packed(
            crops=torch.tensor([one.crop for one in draws], dtype=torch.int64),
            groups=groups,
            rows=torch.tensor(rows, dtype=torch.int64),
            levels=torch.tensor(levels, dtype=torch.float64).view(-1, 2),
            erased=[(row, *box) for row, one in enumerate(draws) for box in one.erased],
        )

    def apply(self, pixels: Pixels | list[torch.Tensor], packed: Packed, batched: bool) -> torch.Tensor:
        """Cut out, resize, mirror and change the images of a batch, as drawn; on a CPU, ``pixels`` may be a list.

        If ``batched``, an operation runs on all images of a group at once, which is fast on an accelerator. If not, it
        runs on one image at a time, which stays in the cache of a CPU; it works only there. The two differ by one level
        in few pixels.

        Returns (B, 3, size, size) uint8, where the pixels are. Not batched, an image comes out the same in any batch.
        Batched, it does so up to one level in few pixels: a product of larger matrices may add in another order.
        """
        functions = operations.OPERATIONS if batched else operations.ON_CPU
        if batched:
            images = resizing.by_products(pixels, packed.crops, self.size)
        else:
            listed = pixels.images() if isinstance(pixels, Pixels) else pixels
            images = resizing.one_by_one(listed, packed.crops, self.size)
        device = images.device
        fill = torch.tensor(self._fill, dtype=torch.float32).view(3, 1, 1)
        # A blocking transfer would wait until the device has done all that it was told to do so far.
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

    def finish(self, images: torch.Tensor, packed: Packed) -> torch.Tensor:
        """Normalise the uint8 images from ``apply`` and erase boxes, with noise from generators of its own.

        Returns (B, 3, size, size) float32. The noise in an erased box is the same in any batch; another kind of device
        makes other noise.
        """
        device = images.device
        mean, std = (values.to(device, non_blocking=True) for values in (self.mean, self.std))
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
