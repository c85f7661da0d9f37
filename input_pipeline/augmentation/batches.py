"""The batched form of timm's transform: sort a batch's draws by operation, then run each operation on many images."""

from typing import NamedTuple

import torch

from input_pipeline.augmentation import operations, resizing
from input_pipeline.augmentation.draws import Drawer, Draws
from input_pipeline.augmentation.resizing import Pixels


class Packed(NamedTuple):
    """The draws of a batch of B images with N operations in all; small, picklable and on the host.

    Attributes:
        geometry: (B, 10) int64, a row of ``resizing.Geometry`` for each image.
        groups: (name, start, stop) of each group of operations that run together. An image's operations keep their
            order: its first one is in an earlier group than its second one.
        rows: (N,) int64, which image of the batch each operation changes; ``rows[start:stop]`` belong to a group.
        levels: (N, 2) float64, the level of each operation, and 1 if it interpolates by the bicubic kernel, else 0.
        erased: (image, seed of the noise, top, left, height, width) of each erased box, in order.
    """

    geometry: torch.Tensor
    groups: list[tuple[str, int, int]]
    rows: torch.Tensor
    levels: torch.Tensor
    erased: list[tuple[int, int, int, int, int, int]]


class Augmentation:
    """The batched form of one of timm's transforms.

    Args:
        transform: a Compose from ``build_transform``, for training or for the test. It is not changed.

    Attributes:
        size: side of the square images that come out, in pixels.
        mean, std: (3, 1, 1), for normalisation.

    Raises:
        Unsupported: the transform has a step, an operation or an interpolation that has no batched form.
    """

    def __init__(self, transform):
        self._drawer = Drawer(transform)
        self.size, self.mean, self.std = self._drawer.size, self._drawer.mean, self._drawer.std

    def draw(self, height: int, width: int) -> Draws:
        """Draw for one image of this size in pixels, from the global generators as the transform does."""
        return self._drawer.draw(height, width)

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
            geometry=torch.tensor([one.geometry for one in draws], dtype=torch.int64),
            groups=groups,
            rows=torch.tensor(rows, dtype=torch.int64),
            levels=torch.tensor(levels, dtype=torch.float64).view(-1, 2),
            erased=[(row, *box) for row, one in enumerate(draws) for box in one.erased],
        )

    def apply(self, pixels: Pixels | list[torch.Tensor], packed: Packed, batched: bool) -> torch.Tensor:
        """Cut out, resize, mirror and change the images of a batch, as drawn.

        Args:
            pixels: the images in the order of their draws; on a CPU they may also be a list.
            packed: the draws of the same images.
            batched: True runs an operation on all images of a group at once, which is fast on an accelerator. False
                runs it on one image at a time, which stays in the cache of a CPU; it works only there. The two differ
                by one level in few pixels.

        Returns:
            (B, 3, size, size) uint8, where the pixels are. Not batched, an image comes out the same in any batch.
            Batched, it does so up to one level in few pixels: a product of larger matrices may add in another order.
        """
        functions = operations.OPERATIONS if batched else operations.ON_CPU
        if batched:
            images = resizing.by_products(pixels, packed.geometry, self.size)
        else:
            listed = pixels.images() if isinstance(pixels, Pixels) else pixels
            images = resizing.one_by_one(listed, packed.geometry, self.size)
        device = images.device
        fill = torch.tensor(self._drawer.fill, dtype=torch.float32).view(3, 1, 1)
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
        """Normalise images and erase boxes, with noise from generators of its own.

        Args:
            images: (B, 3, size, size) uint8 from ``apply``.
            packed: the draws of the same images.

        Returns:
            (B, 3, size, size) float32. The noise in an erased box is the same in any batch; another kind of device
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
            if self._drawer.noise == "const":
                box.zero_()
            else:
                shape = (3, height, width) if self._drawer.noise == "pixel" else (3, 1, 1)
                box.copy_(torch.randn(shape, generator=generator.manual_seed(seed), device=device))
        return result
