"""Where images are transformed: one by one or in batches, in the loader's workers or on the device.

A pipeline has three steps. A worker calls ``sample`` for each image and ``collate`` for each batch; the process that
trains calls ``to_device`` for each batch.
"""

from typing import NamedTuple

import torch
from PIL import Image

from input_pipeline.augmentation import Augmentation, Packed, Pixels, Unsupported
from input_pipeline.transforms import build_transform
from utils import print_main
from weight_selection.errors import InputError


class Batch(NamedTuple):
    """What a worker hands over: ``len(labels)`` images, on the host and not necessarily transformed yet.

    Attributes:
        images: as the pipeline's ``collate`` returned them.
        packed: the random draws of an ``Augmentation`` for these images; None if the pipeline has none.
        labels: (images,) int64.
        problems: one message for each image that could not be read.
    """

    images: torch.Tensor | Pixels
    packed: Packed | None
    labels: torch.Tensor
    problems: list[str]


class TransformOneByOne:
    """A worker applies timm's transform to each image: for transforms that have no batched form."""

    def __init__(self, transform):
        self.transform = transform

    def sample(self, image: torch.Tensor) -> torch.Tensor:
        """Transform an image, uint8 (height, width, 3), with randomness from the global generators."""
        return self.transform(Image.fromarray(image.numpy()))

    def collate(self, samples) -> tuple:
        """The ``images`` and ``packed`` of a ``Batch`` of these samples."""
        return torch.stack(samples), None

    def to_device(self, batch: Batch, device: torch.device) -> torch.Tensor:
        """A model's input: float32 (images, 3, size, size) on the device, normalised. It draws no random numbers."""
        return batch.images.to(device, non_blocking=True)


class TransformInWorkers:
    """A worker transforms a batch in uint8; the device normalises it and erases boxes.

    Only a quarter of the bytes of float32 go from the worker to the device.
    """

    def __init__(self, augmentation: Augmentation):
        self.augmentation = augmentation

    def sample(self, image):
        return image, self.augmentation.draw(*image.shape[:2])

    def collate(self, samples):
        images, draws = zip(*samples, strict=True)
        packed = self.augmentation.pack(draws)
        return self.augmentation.apply(images, packed, batched=False), packed

    def to_device(self, batch, device):
        return self.augmentation.finish(batch.images.to(device, non_blocking=True), batch.packed)


class TransformOnDevice(TransformInWorkers):
    """The device transforms a batch; a worker only reads the images and draws random numbers for them.

    Attributes:
        resident: flat uint8 on the device, all images of a ``CachedDataset``; None if each batch brings its own pixels.
    """

    def __init__(self, augmentation):
        super().__init__(augmentation)
        self.resident = None

    def collate(self, samples):
        images, draws = zip(*samples, strict=True)
        pixels = _side_by_side(images) if self.resident is None else _places_in_cache(images)
        return pixels, self.augmentation.pack(draws)

    def to_device(self, batch, device):
        data = batch.images.data.to(device, non_blocking=True) if self.resident is None else self.resident
        images = self.augmentation.apply(batch.images._replace(data=data), batch.packed, batched=True)
        return self.augmentation.finish(images, batch.packed).to(device)  # the resident images may be on another device


def _side_by_side(images):
    lengths = torch.tensor([image.numel() for image in images])
    data = torch.cat([image.reshape(-1) for image in images])
    return Pixels(data, lengths.cumsum(0) - lengths, torch.tensor([image.shape[:2] for image in images]))


def _places_in_cache(images):
    """Where the images lie in the buffer of their ``CachedDataset``, without their pixels."""
    offsets = torch.tensor([image.storage_offset() for image in images])
    return Pixels(torch.empty(0, dtype=torch.uint8), offsets, torch.tensor([image.shape[:2] for image in images]))


def build_pipeline(args, train: bool):
    """The pipeline that the options ask for, for training or for the test.

    Raises:
        InputError: ``--augment_device`` is given and the transform has no batched form.
    """
    transform = build_transform(args, train)
    try:
        augmentation = Augmentation(transform)
    except Unsupported as reason:
        if args.augment_device:
            raise InputError(f"--augment_device true: no batched form of {reason}; leave the option out") from reason
        print_main(f"images are transformed one by one in loader workers: no batched form of {reason}")
        return TransformOneByOne(transform)
    return TransformOnDevice(augmentation) if args.augment_device else TransformInWorkers(augmentation)
