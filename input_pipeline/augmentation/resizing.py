"""Cutting boxes out of images and resizing them as Pillow does: antialiased, in two passes, rounding after each.

Pillow starts along the rows; since version 13, not in images that lose more than twice as many rows as columns. Here
such images are turned, resized like the others, and turned back.
"""

from typing import NamedTuple

import PIL
import torch
import torch.nn.functional as F

AT_ONCE = 1 << 24  # pixels that are gathered together, unless one image has more: 128 MB of indices, 200 MB of floats

TURNS = int(PIL.__version__.partition(".")[0]) >= 13


class Pixels(NamedTuple):
    """A batch's view into images that lie one after the other in one buffer.

    Attributes:
        data: uint8, flat; each image is (height, width, 3). The batch's own images, or all of a data set.
        offsets: (B,) int64 on the host, where in ``data`` each image of the batch starts.
        sizes: (B, 2) int64 on the host, (height, width) of each.
    """

    data: torch.Tensor
    offsets: torch.Tensor
    sizes: torch.Tensor

    def images(self):
        """Views of the images of the batch, each (height, width, 3)."""
        for offset, (height, width) in zip(self.offsets.tolist(), self.sizes.tolist(), strict=True):
            yield self.data[offset : offset + 3 * height * width].view(height, width, 3)


class Geometry(NamedTuple):
    """The way of images from their pixels to squares, in pixels; a number or a column for each.

    Attributes:
        top, left, height, width: box that is cut out.
        tall, wide: size that the box is resized to.
        above, before: first row and column of that which are kept.
        cubic: whether by the bicubic kernel, else by the bilinear one.
        flip: whether mirrored in the end.
    """

    top: int
    left: int
    height: int
    width: int
    tall: int
    wide: int
    above: int
    before: int
    cubic: int
    flip: int


def _turned(image):
    """Whether to turn an image, or which images of a batch: of ``Geometry``."""
    lost = image.height - image.tall
    return TURNS & (lost > 0) & (lost > 2 * (image.width - image.wide))


def one_by_one(images, geometry, size):
    """Resize with torch's kernel for uint8, whose speed on a CPU comes from its vector instructions.

    Args:
        images: each (height, width, 3) uint8, on a CPU.
        geometry: (B, 10) int64, a row of ``Geometry`` for each image.
        size: side of the result.

    Returns:
        (B, 3, size, size) uint8.
    """
    result = torch.empty(len(geometry), 3, size, size, dtype=torch.uint8)
    for row, source, image in zip(geometry.tolist(), images, result, strict=True):
        one = Geometry(*row)
        box = source.permute(2, 0, 1)[None, :, one.top : one.top + one.height, one.left : one.left + one.width]
        mode = "bicubic" if one.cubic else "bilinear"
        if _turned(one):
            resized = _interpolate(box.transpose(2, 3), (one.wide, one.tall), mode).transpose(2, 3)
        else:
            resized = _interpolate(box, (one.tall, one.wide), mode)
        kept = resized[0, :, one.above : one.above + size, one.before : one.before + size]
        image.copy_(kept.flip(-1) if one.flip else kept)
    return result


def _interpolate(box, size, mode):
    return F.interpolate(box, size=size, mode=mode, antialias=True, align_corners=False)


def by_products(pixels, geometry, size):
    """Resize by products with matrices of weights, many images in each.

    Products of float32 are to be exact to more than 16 bits: torch's default, not TF32 or autocast.

    Args:
        pixels: ``Pixels`` on any device; nothing is fetched from it.
        geometry: (B, 10) int64 on the host, a row of ``Geometry`` for each image.
        size: side of the result.

    Returns:
        (B, 3, size, size) uint8, on the device of the pixels.
    """
    lengths = _parts(Geometry(*geometry.unbind(1)))
    parts = zip(*(values.split(lengths) for values in (geometry, pixels.offsets, pixels.sizes)), strict=True)
    return torch.cat([_part(pixels.data, *part, size) for part in parts])


def _parts(image):
    """How many images, in their order, to gather at once: boxes are padded to the largest of a part."""
    lengths, tall, wide = [0], 0, 0
    for height, width in zip(image.height.tolist(), image.width.tolist(), strict=True):
        side = max(height, width)  # some are turned
        tall, wide = max(tall, side), max(wide, side)
        if lengths[-1] and (lengths[-1] + 1) * tall * wide > AT_ONCE:
            lengths.append(0)
            tall, wide = side, side
        lengths[-1] += 1
    return lengths


def _part(data, geometry, offsets, sizes, size):
    image = Geometry(*geometry.unbind(1))
    starts = offsets // 3 + image.top * sizes[:, 1] + image.left  # all in pixels of three bytes
    turned = _turned(image)

    # The pass along rows and the one along columns: steps in the buffer, what is resized to what, and what is kept.
    one = torch.ones_like(starts)
    along_rows = torch.stack([one, image.width, image.wide, image.before, image.flip, image.cubic])
    along_columns = torch.stack([sizes[:, 1], image.height, image.tall, image.above, 0 * one, image.cubic])
    first = torch.where(turned, along_columns, along_rows)
    second = torch.where(turned, along_rows, along_columns)
    columns, rows = int(first[1].max()), int(second[1].max())
    table = torch.cat([first, second, starts[None], turned[None]])[:, :, None]  # each (B, 1)
    table = table.to(data.device, non_blocking=True)
    first, second, (starts, turned) = table[:6], table[6:12], table[12:]

    # Beyond a smaller box its last row and column are repeated, with weights of 0.
    x = first[0] * torch.arange(columns, device=data.device).minimum(first[1] - 1)
    y = second[0] * torch.arange(rows, device=data.device).minimum(second[1] - 1)
    index = (starts + y)[:, :, None] + x[:, None, :]
    boxes = data.view(-1, 3).index_select(0, index.view(-1)).view(*index.shape, 3)
    boxes = boxes.transpose(2, 3).float()  # (B, rows, 3, columns)
    across, down = _weights(size, *first[1:], columns), _weights(size, *second[1:], rows)
    wide = _to_levels(boxes.flatten(1, 2) @ across.transpose(1, 2))  # (B, rows * 3, size)
    square = _to_levels(down @ wide.view(-1, rows, 3 * size))  # (B, size, 3 * size)
    square = square.to(torch.uint8).view(-1, size, 3, size).transpose(1, 2)
    return torch.where(turned[..., None, None] == 1, square.transpose(2, 3), square).contiguous()


def _to_levels(values):
    return values.add_(0.5).floor_().clamp_(0, 255)


def _weights(size, length, resized, skipped, flip, cubic, padded):
    """Weights of a box's pixels in pixels of the resized box, along one side.

    Args:
        size: how many pixels of the resized box.
        length, resized: (B, 1) int64, the side of the box before and after.
        skipped: (B, 1) how many pixels of the resized box lie before those.
        flip: (B, 1) whether they are in the opposite order.
        cubic: (B, 1) whether by the bicubic kernel.
        padded: the most pixels of any box.

    Returns:
        (B, size, padded) float32.
    """
    kept = torch.arange(size, device=length.device)
    places = skipped + torch.where(flip == 1, size - 1 - kept, kept)
    scale = length.double() / resized
    stretch = scale.clamp(min=1)  # the kernel grows when the box shrinks
    support = torch.where(cubic == 1, 2.0, 1.0) * stretch
    centre = (places + 0.5) * scale
    first = (centre - support + 0.5).clamp(min=0).floor()
    last = torch.minimum((centre + support + 0.5).floor(), length)
    # Large numbers are subtracted in double precision; the many small ones that are left need less.
    step = torch.arange(padded, device=places.device, dtype=torch.float32) - first[..., None].float()
    distance = ((first - centre + 0.5).float()[..., None] + step) / stretch[..., None].float()
    within = (step >= 0) & (step < (last - first)[..., None].float())
    weights = torch.where(cubic[..., None] == 1, _bicubic(distance.abs()), 1 - distance.abs())
    weights = weights.masked_fill_(~within, 0)
    return weights / weights.sum(2, keepdim=True)


def _bicubic(distance):
    """Pillow's kernel for resizing (a = -0.5), of distances from 0 to 2."""
    near = (1.5 * distance - 2.5) * distance * distance + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    return torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))
