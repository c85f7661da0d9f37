"""Cutting boxes out of images and resizing them as Pillow does: antialiased, in two passes, rounding after each.

Pillow's first pass goes along the rows. Since version 13 it goes along the columns if an image loses more than twice
as many rows as columns. Here such images are transposed, resized like the others, and transposed back.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import PIL
import torch
import torch.nn.functional as F

AT_ONCE = 1 << 24  # pixels to gather together, unless one image has more: 128 MB of indices, 200 MB of floats

TRANSPOSES = int(PIL.__version__.partition(".")[0]) >= 13


class Pixels(NamedTuple):
    """A batch of images that lie one after the other in a buffer."""

    data: torch.Tensor  # flat uint8, images of (height, width, 3): those of the batch, or all of a data set
    offsets: torch.Tensor  # (B,) int64 on the host, where in ``data`` each image of the batch starts
    sizes: torch.Tensor  # (B, 2) int64 on the host, the (height, width) of each image

    def images(self) -> Iterator[torch.Tensor]:
        """Views of the images of the batch, each (height, width, 3)."""
        for offset, (height, width) in zip(self.offsets.tolist(), self.sizes.tolist(), strict=True):
            yield self.data[offset : offset + 3 * height * width].view(height, width, 3)


class Crop(NamedTuple):
    """How an image becomes a square; in pixels. Every field is a number, or a column of numbers for a batch."""

    top: int  # the box to cut out: top, left, height, width
    left: int
    height: int
    width: int
    tall: int  # the height and width to resize the box to
    wide: int
    above: int  # how many rows and columns of the resized box to drop before the square begins
    before: int
    cubic: int  # 1 for the bicubic kernel, 0 for the bilinear one
    flip: int  # 1 to mirror the square, left to right


def _transposed(image):
    """Whether to transpose an image of this ``Crop``; for a batch, which of its images."""
    lost = image.height - image.tall
    return TRANSPOSES & (lost > 0) & (lost > 2 * (image.width - image.wide))


def one_by_one(images: Iterable[torch.Tensor], crops: torch.Tensor, size: int) -> torch.Tensor:
    """Resize with torch's kernel for uint8, which is fast on a CPU because it uses vector instructions.

    ``images`` are uint8 (height, width, 3) on a CPU, and ``crops`` (B, 10) int64 has a row of ``Crop`` for each.
    Returns (B, 3, size, size) uint8.
    """
    result = torch.empty(len(crops), 3, size, size, dtype=torch.uint8)
    for row, image, square in zip(crops.tolist(), images, result, strict=True):
        one = Crop(*row)
        box = image.permute(2, 0, 1)[None, :, one.top : one.top + one.height, one.left : one.left + one.width]
        mode = "bicubic" if one.cubic else "bilinear"
        turned = _transposed(one)
        box, side = (box.transpose(2, 3), (one.wide, one.tall)) if turned else (box, (one.tall, one.wide))
        resized = F.interpolate(box, size=side, mode=mode, antialias=True, align_corners=False)
        resized = resized.transpose(2, 3) if turned else resized
        kept = resized[0, :, one.above : one.above + size, one.before : one.before + size]
        square.copy_(kept.flip(-1) if one.flip else kept)
    return result


def by_products(pixels: Pixels, crops: torch.Tensor, size: int) -> torch.Tensor:
    """Resize ``Pixels`` on any device by multiplying with matrices of weights, many images at a time.

    The host never waits for the device. Products of float32 must be exact to more than 16 bits: torch's default is,
    TF32 and autocast are not. Arguments and result as in ``one_by_one``; the crops are on the host.
    """
    lengths = _parts(Crop(*crops.unbind(1)))
    parts = zip(*(values.split(lengths) for values in (crops, pixels.offsets, pixels.sizes)), strict=True)
    return torch.cat([_part(pixels.data, *part, size) for part in parts])


def _parts(image):
    """Cut a batch into parts to gather at once, in order: the number of images in each part.

    In a part, all boxes are padded to the size of the largest one.
    """
    lengths, tall, wide = [0], 0, 0
    for height, width in zip(image.height.tolist(), image.width.tolist(), strict=True):
        side = max(height, width)  # some are transposed
        tall, wide = max(tall, side), max(wide, side)
        if lengths[-1] and (lengths[-1] + 1) * tall * wide > AT_ONCE:
            lengths.append(0)
            tall, wide = side, side
        lengths[-1] += 1
    return lengths


def _part(data, crops, offsets, sizes, size):
    """Resize one part of a batch; arguments as in ``Pixels``, with the crops and size of ``by_products``."""
    image = Crop(*crops.unbind(1))
    starts = offsets // 3 + image.top * sizes[:, 1] + image.left  # counted in pixels, of three bytes each
    transposed = _transposed(image)

    # For the pass along rows and the pass along columns: the step in the buffer from one pixel to the next, the length
    # before and after, how many pixels to drop before those that are kept, whether to mirror, and the kernel.
    one = torch.ones_like(starts)
    along_rows = torch.stack([one, image.width, image.wide, image.before, image.flip, image.cubic])
    along_columns = torch.stack([sizes[:, 1], image.height, image.tall, image.above, 0 * one, image.cubic])
    first = torch.where(transposed, along_columns, along_rows)
    second = torch.where(transposed, along_rows, along_columns)
    columns, rows = int(first[1].max()), int(second[1].max())
    table = torch.cat([first, second, starts[None], transposed[None]])[:, :, None]  # each (B, 1)
    table = table.to(data.device, non_blocking=True)
    first, second, (starts, transposed) = table[:6], table[6:12], table[12:]

    # A smaller box is padded with its last row and column, whose weights are 0 there.
    x = first[0] * torch.arange(columns, device=data.device).minimum(first[1] - 1)
    y = second[0] * torch.arange(rows, device=data.device).minimum(second[1] - 1)
    index = (starts + y)[:, :, None] + x[:, None, :]
    boxes = data.view(-1, 3).index_select(0, index.view(-1)).view(*index.shape, 3)
    boxes = boxes.transpose(2, 3).float()  # (B, rows, 3, columns)
    across, down = _weights(size, *first[1:], columns), _weights(size, *second[1:], rows)
    wide = _to_levels(boxes.flatten(1, 2) @ across.transpose(1, 2))  # (B, rows * 3, size)
    square = _to_levels(down @ wide.view(-1, rows, 3 * size))  # (B, size, 3 * size)
    square = square.to(torch.uint8).view(-1, size, 3, size).transpose(1, 2)
    return torch.where(transposed[..., None, None] == 1, square.transpose(2, 3), square).contiguous()


def _to_levels(values):
    return values.add_(0.5).floor_().clamp_(0, 255)


def _weights(size, length, resized, skipped, flip, cubic, padded):
    """How much each pixel of a box contributes to each of the ``size`` pixels of the square, along one side.

    All of the box is (B, 1): its ``length``, the length ``resized``, how many pixels of that are ``skipped`` before the
    square, whether to ``flip`` the square, and whether the kernel is ``cubic``. ``padded`` is the largest length.
    Returns (B, size, padded) float32; each row sums to 1.
    """
    kept = torch.arange(size, device=length.device)
    places = skipped + torch.where(flip == 1, size - 1 - kept, kept)
    scale = length.double() / resized
    stretch = scale.clamp(min=1)  # the kernel grows when the box shrinks
    support = torch.where(cubic == 1, 2.0, 1.0) * stretch
    centre = (places + 0.5) * scale
    first = (centre - support + 0.5).clamp(min=0).floor()
    last = torch.minimum((centre + support + 0.5).floor(), length)
    # Double precision for the few differences of large numbers; float32 is enough for the many small ones below.
    step = torch.arange(padded, device=places.device, dtype=torch.float32) - first[..., None].float()
    distance = ((first - centre + 0.5).float()[..., None] + step) / stretch[..., None].float()
    within = (step >= 0) & (step < (last - first)[..., None].float())
    weights = torch.where(cubic[..., None] == 1, _bicubic(distance.abs()), 1 - distance.abs())
    weights = weights.masked_fill_(~within, 0)
    return weights / weights.sum(2, keepdim=True)


def _bicubic(distance):
    """Pillow's bicubic kernel for resizing (a = -0.5), for distances from 0 to 2."""
    near = (1.5 * distance - 2.5) * distance * distance + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    return torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))
