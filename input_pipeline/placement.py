"""Where images are transformed: one by one or in batches, in the loader's workers or on the device.

A pipeline has three steps. A worker calls ``sample`` for each image and ``collate`` for each batch; the process that
trains calls ``to_device`` for each batch.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import torch
from PIL import Image
from timm.data import auto_augment, create_transform

from input_pipeline.augmentation import Augmentation, Draws, Packed, Pixels, Unsupported
from utils import print_main
from weight_selection.errors import InputError
from weight_selection.sources.teachers import normalization


class Batch(NamedTuple):
    """What a worker hands over: ``len(labels)`` images, on the host and not necessarily transformed yet."""

    images: torch.Tensor | Pixels  # as the pipeline's ``collate`` returned them
    packed: Packed | None  # the random draws of an ``Augmentation`` for these images; None if the pipeline has none
    labels: torch.Tensor  # (images,) int64
    problems: list[str]  # one message for each image that could not be read


class TransformOneByOne:
    """A worker applies timm's transform to each image: for transforms that have no batched form."""

    def __init__(self, transform: Callable[[Image.Image], torch.Tensor]):
        self.transform = transform

    def sample(self, image: torch.Tensor) -> torch.Tensor:
        """Transform an image, uint8 (height, width, 3), with randomness from the global generators."""
        return self.transform(Image.fromarray(image.numpy()))

    def collate(self, samples: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, None]:
        """The ``images`` and ``packed`` of a ``Batch`` of these samples."""
        return torch.stack(samples), None

    def to_device(self, batch: Batch, device: torch.device) -> torch.Tensor:
        """A model's input: float32 (images, 3, size, size) on the device, normalised. It draws no random numbers."""
        return batch.images.to(device, non_blocking=True)


class TransformInWorkers:
    """A worker transforms a batch in uint8; the device normalises it and erases boxes.

    Only a quarter of the bytes of float32 go from the worker to the device. The methods are those of
    ``TransformOneByOne``; a sample is an image and its random draws.
    """

    def __init__(self, augmentation: Augmentation):
        self.augmentation = augmentation

    def sample(self, image: torch.Tensor) -> tuple[torch.Tensor, Draws]:
        return image, self.augmentation.draw(*image.shape[:2])

    def collate(self, samples: tuple[tuple[torch.Tensor, Draws], ...]) -> tuple[torch.Tensor, Packed]:
        images, draws = zip(*samples, strict=True)
        packed = self.augmentation.pack(draws)
        return self.augmentation.apply(images, packed, batched=False), packed

    def to_device(self, batch: Batch, device: torch.device) -> torch.Tensor:
        return self.augmentation.finish(batch.images.to(device, non_blocking=True), batch.packed)


class TransformOnDevice(TransformInWorkers):
    """The device transforms a batch; a worker only reads the images and draws random numbers for them."""

    resident = None  # flat uint8 on the device, all images of a ``CachedDataset``; None: a batch brings its own pixels

    def collate(self, samples: tuple[tuple[torch.Tensor, Draws], ...]) -> tuple[Pixels, Packed]:
        images, draws = zip(*samples, strict=True)
        sizes = torch.tensor([image.shape[:2] for image in images])
        if self.resident is None:
            data, lengths = torch.cat([image.reshape(-1) for image in images]), 3 * sizes.prod(1)
            offsets = lengths.cumsum(0) - lengths
        else:  # the images are views of their ``CachedDataset``'s buffer
            data = torch.empty(0, dtype=torch.uint8)
            offsets = torch.tensor([image.storage_offset() for image in images])
        return Pixels(data, offsets, sizes), self.augmentation.pack(draws)

    def to_device(self, batch: Batch, device: torch.device) -> torch.Tensor:
        data = batch.images.data.to(device, non_blocking=True) if self.resident is None else self.resident
        images = self.augmentation.apply(batch.images._replace(data=data), batch.packed, batched=True)
        return self.augmentation.finish(images, batch.packed).to(device)  # the resident images may be on another device


Pipeline = TransformOneByOne | TransformInWorkers


def build_pipeline(args: SimpleNamespace, train: bool) -> Pipeline:
    """The pipeline that the options ask for, for training or for the test.

    Raises:
        InputError: ``--augment_device`` is given and the transform has no batched form; or see ``build_transform``.
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


def build_transform(args: SimpleNamespace, train: bool) -> Callable[[Image.Image], torch.Tensor]:
    """timm's transform from a PIL image to a normalised (3, input_size, input_size) tensor.

    Training: random resized crop, flip, RandAugment, random erasing (Table 13 of the paper). Test: resize the shorter
    side to 256/224 of the input size and crop the centre; from 384 pixels on, squash the whole image, as ConvNeXt does.

    Raises:
        InputError: timm knows no policy of the name in ``--aa``.
    """
    mean, std = normalization(args.imagenet_default_mean_and_std)
    common = {"input_size": args.input_size, "mean": mean, "std": std}
    if train:
        crop = {"scale": tuple(args.scale), "hflip": args.hflip, "interpolation": args.train_interpolation}
        colours = {"color_jitter": args.color_jitter, "auto_augment": None if args.aa == "none" else args.aa}
        erasing = {"re_prob": args.reprob, "re_mode": args.remode, "re_count": args.recount}
        try:
            transform = create_transform(**common, is_training=True, **crop, **colours, **erasing)
        except (AssertionError, ValueError, KeyError) as error:  # timm refuses a policy with any of these
            raise InputError(f"--aa {args.aa}: no policy of timm's; such as rand-m9-mstd0.5-inc1, or none") from error
        return _with_posterize_to_black(transform)
    return create_transform(**common, is_training=False, **test_crop(args))


def test_crop(args: SimpleNamespace) -> dict:
    """How a test image becomes a square, as arguments of timm's ``create_transform``."""
    squash = args.crop_pct is None and args.input_size >= 384
    pct, mode = (1.0, "squash") if squash else (args.crop_pct or 224 / 256, "center")
    return {"crop_pct": pct, "crop_mode": mode, "interpolation": "bicubic"}


def _with_posterize_to_black(transform):
    """Let RandAugment posterize to 0 bits: the paper's policy asks for that, and newer versions of Pillow refuse it."""
    for step in transform.transforms:
        operations = getattr(step, "ops", None) or [op for group in getattr(step, "policy", ()) for op in group]
        for operation in operations:
            if operation.aug_fn is auto_augment.posterize:
                operation.aug_fn = _posterize
    return transform


def _posterize(image, bits, **_):
    """timm's operation; 0 bits give a black image, as older versions of Pillow did."""
    return image.point(lambda value: 0) if bits == 0 else auto_augment.posterize(image, bits)
