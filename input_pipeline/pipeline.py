"""From images of a data set to a model's input: what loader workers do with them, and what the device does."""

from typing import NamedTuple

import torch
from PIL import Image

from input_pipeline.augmentation import Augmentation, Packed, Pixels, Unsupported
from input_pipeline.transforms import build_transform
from utils import print_main
from weight_selection.errors import InputError


class Batch(NamedTuple):
    """What a loader gives: ``len(labels)`` images, not yet on the device that computes.

    Attributes:
        images: as the pipeline that collated them left them.
        packed: what its ``Augmentation`` drew for them, if it has one.
        labels: (images,) int64.
        problems: what is wrong with those that could not be read.
    """

    images: torch.Tensor | Pixels
    packed: Packed | None
    labels: torch.Tensor
    problems: list[str]


class OneByOne:
    """timm's transform in a worker, for what has no batched form. Batches are of float32, normalised."""

    def __init__(self, transform):
        self.transform = transform

    def sample(self, image: torch.Tensor) -> torch.Tensor:
        """What becomes of an image, (height, width, 3) uint8, with randomness from the global generators."""
        return self.transform(Image.fromarray(image.numpy()))

    def collate(self, samples) -> tuple:
        """``images`` and ``packed`` of a ``Batch``."""
        return torch.stack(samples), None

    def inputs(self, batch: Batch, device: torch.device) -> torch.Tensor:
        """(images, 3, size, size) float32 on the device, normalised."""
        return batch.images.to(device, non_blocking=True)


class InWorkers:
    """The transform in batches of uint8 in a worker; normalised and erased on the device.

    A quarter of the bytes goes from worker to device.
    """

    def __init__(self, augmentation: Augmentation):
        self.augmentation = augmentation

    def sample(self, image):
        return image, self.augmentation.draw(*image.shape[:2])

    def collate(self, samples):
        images, draws = zip(*samples, strict=True)
        packed = self.augmentation.pack(draws)
        return self.augmentation.apply(images, packed, batched=False), packed

    def inputs(self, batch, device):
        return self.augmentation.finish(batch.images.to(device, non_blocking=True), batch.packed)


class OnDevice(InWorkers):
    """The transform in batches on the device; a worker only reads images and draws what they undergo.

    Attributes:
        resident: flat uint8 of all images on the device, or None when each batch brings its own.
    """

    def __init__(self, augmentation):
        super().__init__(augmentation)
        self.resident = None

    def collate(self, samples):
        images, draws = zip(*samples, strict=True)
        pixels = _side_by_side(images) if self.resident is None else _within_store(images)
        return pixels, self.augmentation.pack(draws)

    def inputs(self, batch, device):
        data = batch.images.data.to(device, non_blocking=True) if self.resident is None else self.resident
        images = self.augmentation.apply(batch.images._replace(data=data), batch.packed, batched=True)
        return self.augmentation.finish(images, batch.packed).to(device)  # a moving average may be on the CPU


def _side_by_side(images):
    lengths = torch.tensor([image.numel() for image in images])
    data = torch.cat([image.reshape(-1) for image in images])
    return Pixels(data, lengths.cumsum(0) - lengths, torch.tensor([image.shape[:2] for image in images]))


def _within_store(images):
    offsets = torch.tensor([image.storage_offset() for image in images])
    return Pixels(torch.empty(0, dtype=torch.uint8), offsets, torch.tensor([image.shape[:2] for image in images]))


def build_pipeline(args, train: bool):
    """The pipeline that the options ask for, of training or of the test.

    Raises:
        InputError: ``--augment_device`` and a transform that has no batched form.
    """
    transform = build_transform(args, train)
    try:
        augmentation = Augmentation(transform)
    except Unsupported as reason:
        if args.augment_device:
            raise InputError(f"--augment_device true: no batched form of {reason}; leave the option out") from reason
        print_main(f"images are transformed one by one in loader workers: no batched form of {reason}")
        return OneByOne(transform)
    return OnDevice(augmentation) if args.augment_device else InWorkers(augmentation)
