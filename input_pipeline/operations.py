"""The operations of RandAugment, AutoAugment and colour jitter on batches of uint8 images; they round as Pillow does.

Every operation is a function ``operation(images, level, cubic, fill)``. It returns new images and never waits for the
device. Its arguments:

    images  (G, 3, H, W) uint8
    level   (G,) float64, how strongly to change each image
    cubic   (G,) float64, 1 to interpolate by the bicubic kernel, 0 by the bilinear one
    fill    (3, 1, 1) float32, the colour of points that lie outside the image
"""

import numpy as np
import torch
from PIL import Image


def _by_table(table):
    """The operation that looks every value up in ``table(values, level, images)``: (G, 1 or 3, 256), for each channel.

    ``values`` are 0 to 255, on the device of the images; ``level`` is (G, 1, 1); the new values are from 0 to 255 too.
    """

    def operation(images, level, cubic, fill):
        values = torch.arange(256, device=images.device)
        tables = table(values, level.view(-1, 1, 1), images).to(torch.uint8).expand(len(images), 3, 256)
        return tables.reshape(-1).index_select(0, _entries(images)).view(images.shape)

    return operation


def _entries(images):
    """Flat int32, for each value in the images: where its new value stands in all channels' tables, concatenated."""
    channels = torch.arange(len(images) * 3, device=images.device, dtype=torch.int32) * 256
    return images.reshape(len(images) * 3, -1).int().add_(channels[:, None]).view(-1)


def _posterize(values, level, images):
    dropped = 2 ** (8 - level.long()).clamp(min=0)
    return values // dropped * dropped


def _solarize_add(values, level, images):
    return torch.where(values < 128, (values + level.long()).clamp(max=255), values)


def _auto_contrast(values, level, images):
    planes = images.flatten(2)
    low, high = (extreme[:, :, None].double() for extreme in (planes.amin(2), planes.amax(2)))
    scale = torch.full_like(low, 255) / (high - low)  # a plain 255 would be multiplied by a rounded reciprocal
    return torch.where(high > low, (values * scale + -low * scale).clamp(0, 255), values)


def _equalize_by(histograms):
    def table(values, level, images):
        counts = histograms(images)
        brightest = torch.where(counts > 0, values, 0).amax(2, keepdim=True)
        step = (counts.sum(2, keepdim=True) - counts.gather(2, brightest)) // 255
        darker = counts.cumsum(2) - counts
        return torch.where(step > 0, ((step // 2 + darker) // step.clamp(min=1)).clamp(max=255), values)

    return table


def _histograms(images):
    """(G, 3, 256) int64: how many pixels have each value."""
    entries = _entries(images).long()
    counts = torch.zeros(len(images) * 3 * 256, dtype=torch.int64, device=images.device)
    return counts.scatter_add_(0, entries, torch.ones_like(entries)).view(-1, 3, 256)


def _histograms_on_cpu(images):
    """The same, faster on a CPU; on another device bincount would wait for the device."""
    return torch.bincount(_entries(images), minlength=len(images) * 3 * 256).view(-1, 3, 256)


def _by_blending(plainer):
    """The operation that blends: level 0 gives ``plainer(float32 images)``, 1 the images; larger levels go beyond."""

    def operation(images, level, cubic, fill):
        images = images.float()
        origin = plainer(images)
        return _truncated(images.sub_(origin).mul_(level.float().view(-1, 1, 1, 1)).add_(origin))

    return operation


def _truncated(values):
    """Convert float32 values to uint8 and overwrite them; by way of int16, because the direct way is slow on a CPU."""
    return values.clamp_(0, 255).to(torch.int16).to(torch.uint8)


def _grey(images):
    """(G, 1, H, W) luminance; the integers are below 2^24, so float32 is exact."""
    red, green, blue = images.split(1, dim=1)
    return (red * 19595).add_(green * 38470).add_(blue * 7471).add_(0x8000).mul_(2**-16).floor_()


def _mean_grey(images):
    return _grey(images).mean((1, 2, 3), keepdim=True, dtype=torch.float64).add_(0.5).floor_().float()


def _smooth(images):
    """The mean of 3x3 pixels, with the centre counted 5 times; the outermost pixels stay as they are."""
    threes = images[:, :, :-2] + images[:, :, 1:-1] + images[:, :, 2:]
    nines = threes[..., :-2] + threes[..., 1:-1] + threes[..., 2:]
    result = images.clone()
    centre = result[:, :, 1:-1, 1:-1]
    centre.mul_(4).add_(nines).add_(6.5).div_(13).floor_()
    return result


_color = _by_blending(_grey)


# ---------------------------------------------------------------------------------------------------------
# Affine transforms: each pixel of the result comes from a point in the image. Its value is interpolated from the 4
# pixels next to the point in each direction; beyond the border the outermost pixels repeat. If the point itself lies
# outside the image, the pixel has the fill colour.

# Pillow truncates interpolated values. In float32 the weights may sum to slightly less than 1; added before truncation,
# this keeps flat areas flat.
ROUNDING = 2**-13


def _taps(point, cubic):
    """The four weights, float32, of the pixels at -1, 0, 1 and 2 for a point between 0 and 1.

    Args:
        point: float64.
        cubic: 1 for the bicubic kernel (Pillow's has a = -1 in affine transforms), 0 for the bilinear one;
            broadcastable to the points.
    """
    rest = 1 - point
    before, after = cubic * point * rest * rest, cubic * point * point * rest
    return [weight.float() for weight in (-before, rest + before, point + after, -after)]


def _by_sliding(offsets):
    """The operation that moves row y of an image to the left by ``offsets(images, level)`` pixels.

    ``level`` is (G, 1). The offsets are (G, H or 1), and need not be whole numbers.
    """

    def operation(images, level, cubic, fill):
        height, width = images.shape[2:]
        shift = offsets(images, level[:, None])
        whole = shift.floor()
        columns = torch.arange(-1, width + 2, device=images.device) + whole[:, :, None].long()
        values = images.gather(3, columns.clamp_(0, width - 1)[:, None].expand(-1, 3, height, -1)).float()
        first, *others = (tap[:, None, :, None] for tap in _taps(shift - whole, cubic[:, None]))
        result = values[..., :width] * first
        for place, tap in enumerate(others, start=1):
            result.addcmul_(values[..., place : place + width], tap)

        # Points from 0 to the width are inside the image.
        first, end = ((edge - shift - 0.5).ceil().int()[:, None, :, None] for edge in (0, width))
        column = torch.arange(width, device=images.device, dtype=torch.int32)
        return _filled(result, (column - first + 1).clamp_(0, 1).mul_((end - column).clamp_(0, 1)), fill)

    return operation


def _filled(values, inside, fill):
    """Truncate float32 values, and put the fill colour where ``inside`` (int32) is 0, not 1; overwrites both."""
    mask = inside.neg_().to(torch.uint8)  # all bits set, or none: on a CPU, masking is faster than torch.where
    return _truncated(values.add_(ROUNDING)).bitwise_and_(mask).bitwise_or_(~mask & fill.to(torch.uint8))


_shear = _by_sliding(lambda images, level: level * (torch.arange(images.shape[2], device=images.device) + 0.5))
_translate = _by_sliding(lambda images, level: level)
_translate_relative = _by_sliding(lambda images, level: level * images.shape[3])


def _along_columns(operation):
    """The same operation with rows and columns exchanged."""

    def exchanged(images, level, cubic, fill):
        return operation(images.transpose(2, 3).contiguous(), level, cubic, fill).transpose(2, 3)

    return exchanged


def _rotate(images, level, cubic, fill):
    height, width = images.shape[2:]
    angle = torch.deg2rad(level).view(-1, 1, 1)
    cosine, sine = angle.cos(), angle.sin()
    down = (torch.arange(height, device=images.device, dtype=torch.float64) + 0.5 - height / 2)[:, None]
    right = torch.arange(width, device=images.device, dtype=torch.float64) + 0.5 - width / 2
    x = cosine * right - sine * down + width / 2
    y = sine * right + cosine * down + height / 2
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    x, y = x - 0.5, y - 0.5
    left, top = x.floor(), y.floor()
    cubic = cubic.view(-1, 1, 1)
    across, down = _taps(x - left, cubic), _taps(y - top, cubic)
    columns = [(left.long() + place).clamp_(0, width - 1) for place in range(-1, 3)]

    values = images.flatten(2).float()
    result = torch.zeros_like(images, dtype=torch.float32)
    for place, tap in enumerate(down):
        row = (top.long() + place - 1).clamp_(0, height - 1) * width
        for column, weight in zip(columns, across, strict=True):
            index = (row + column).flatten(1)[:, None].expand(-1, 3, -1)
            result.addcmul_(values.gather(2, index).view(images.shape), (tap * weight)[:, None])
    return _filled(result, inside[:, None].int(), fill)


def _rotate_with_pillow(images, level, cubic, fill):
    """Rotate one image with Pillow: its one loop over 16 neighbours is faster than 16 passes of torch over memory."""
    image = Image.merge("RGB", [Image.fromarray(plane) for plane in images[0].numpy()])
    kernel = Image.Resampling.BICUBIC if cubic else Image.Resampling.BILINEAR
    image = image.rotate(level.item(), kernel, fillcolor=tuple(fill.int().flatten().tolist()))
    return torch.stack([torch.from_numpy(np.array(plane)) for plane in image.split()])[None]


OPERATIONS = {
    "auto_contrast": _by_table(_auto_contrast),
    "equalize": _by_table(_equalize_by(_histograms)),
    "invert": _by_table(lambda values, level, images: 255 - values),
    "posterize": _by_table(_posterize),
    "solarize": _by_table(lambda values, level, images: torch.where(values < level, values, 255 - values)),
    "solarize_add": _by_table(_solarize_add),
    "brightness": _by_table(lambda values, level, images: (values * level.float()).clamp(0, 255)),
    "color": _color,
    "contrast": _by_blending(_mean_grey),
    "desaturate": lambda images, level, cubic, fill: _color(images, (1 - level).clamp(0, 1), cubic, fill),
    "sharpness": _by_blending(_smooth),
    "rotate": _rotate,
    "shear_x": _shear,
    "shear_y": _along_columns(_shear),
    "translate_x_rel": _translate_relative,
    "translate_y_rel": _along_columns(_translate_relative),
    "translate_x_abs": _translate,
    "translate_y_abs": _along_columns(_translate),
}
ON_CPU = OPERATIONS | {  # with functions that are faster on a CPU; this rotation takes one image at a time
    "equalize": _by_table(_equalize_by(_histograms_on_cpu)),
    "rotate": _rotate_with_pillow,
}
RESAMPLED = {name for name in OPERATIONS if name.startswith(("rotate", "shear", "translate"))}
