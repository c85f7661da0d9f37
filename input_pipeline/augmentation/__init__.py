"""timm's transform in batches: the same random draws for each image, then the same pixels for many images at a time.

timm's own objects draw the random numbers, so a seed means the same here as there. The operations then run on uint8
pixels in torch, on a CPU or an accelerator::

    augmentation = Augmentation(build_transform(args, train=True))
    packed = augmentation.pack([augmentation.draw(height, width) for height, width in sizes])
    images = augmentation.finish(augmentation.apply(pixels, packed), packed)
"""

from input_pipeline.augmentation.batches import Augmentation, Packed
from input_pipeline.augmentation.draws import Draws, Unsupported
from input_pipeline.augmentation.resizing import Pixels

__all__ = ["Augmentation", "Draws", "Packed", "Pixels", "Unsupported"]
