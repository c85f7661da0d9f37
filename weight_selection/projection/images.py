"""Calibration: the few images, without labels, that both models see."""

import copy
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from weight_selection.errors import InputError
from weight_selection.files import sha256
from weight_selection.image_files import IMAGE_SUFFIXES, BadImage, read_image
from weight_selection.options import CALIBRATION_IMAGES, HELD_OUT_IMAGES, NOISE

BATCH_SIZE = 16
LABELS = ("labels", "label")  # in batches that are dicts


class Calibration:
    """Images in batches. They are made or read anew in every pass, so this object does not hold them in memory.

    Args:
        image_dir: ``noise``, or a directory, which is searched with all directories below it.
        count: number of images. If a directory has more, they are drawn at random. None: ``CALIBRATION_IMAGES``, or all
            images of a directory that has fewer.
        side: of the square images, in pixels. None: the size that the student takes.
        size: (channels, height, width) of the images that the student takes.
        config: how the teacher's images were prepared: ``mean`` and ``std``; for a directory also ``interpolation`` and
            ``crop_pct``.
        seed: of the draw and of the noise.

    Raises:
        InputError: the directory has no images, or fewer than ``count``.
    """

    def __init__(
        self, image_dir: str | os.PathLike, count: int | None, side: int | None, size: tuple, config: Mapping, seed: int
    ):
        self.size = (size[0], side, side) if side else tuple(size)
        self.config, self.seed, self._paths = config, seed, None
        self.count = count or CALIBRATION_IMAGES
        if str(image_dir) == NOISE:
            return
        if self.size[0] != 3:
            raise InputError(
                f"--calibration {Path(image_dir)}: images are RGB, the model takes {self.size[0]} channels; use {NOISE}"
            )
        paths = _find_images(Path(image_dir))
        if len(paths) < (count or 1):
            raise InputError(
                f"--calibration {Path(image_dir)}: {len(paths)} images there, --calibration_images asks for {count}; "
                "give fewer"
            )
        self.count = min(self.count, len(paths))
        self._paths = [paths[index] for index in draw(len(paths), self.count, seed)]
        self._others = [paths[index] for index in draw(len(paths), HELD_OUT_IMAGES, seed, self.count)]
        self._transform = _transform(self.size, config)

    def __len__(self) -> int:
        return -(-self.count // BATCH_SIZE)

    def held_out(self) -> "Calibration":
        """Up to ``HELD_OUT_IMAGES`` other images of the directory, drawn beside these and prepared like them.

        Raises:
            InputError: the directory has no others, or this is noise.
        """
        if self._paths is None:
            raise InputError(f"--calibration {NOISE}: only a directory has images to hold out")
        if not self._others:
            raise InputError(
                f"all {self.count} images of --calibration were calibrated on; put more there, or give a smaller "
                "--calibration_images"
            )
        others = copy.copy(self)
        others.count, others._paths, others._others = len(self._others), self._others, []
        return others

    @property
    def sha256(self) -> str | None:
        """The SHA-256, in hexadecimal, of lines with the SHA-256 of each image in order; None of noise."""
        if self._paths is None:
            return None
        lines = (f"{sha256(path)}\n" for path in self._paths)
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def __iter__(self):
        """Batches, float32 (n, channels, height, width), normalised."""
        for first in range(0, self.count, BATCH_SIZE):
            indices = range(first, min(first + BATCH_SIZE, self.count))
            yield torch.stack([self._noise(index) if self._paths is None else self._read(index) for index in indices])

    def _read(self, index):
        try:
            return self._transform(read_image(self._paths[index]))
        except BadImage as error:
            raise InputError(f"--calibration: {error}; remove it, or give another directory") from error

    def _noise(self, index):
        mean, std = (torch.tensor(self.config[word])[: self.size[0], None, None] for word in ("mean", "std"))
        return (noise(self.size, np.random.SeedSequence((self.seed, index))) - mean) / std


def draw(total: int, count: int, seed: int, after: int = 0) -> list:
    """Draw ``count`` of ``total`` indices, ascending, other than those that ``draw(total, after, seed)`` gives."""
    return sorted(np.random.Generator(np.random.PCG64(seed)).permutation(total)[after : after + count].tolist())


def noise(size: tuple, entropy: int | np.random.SeedSequence) -> torch.Tensor:
    """An image of noise with some properties of photographs.

    Amplitudes fall as 1/frequency, the channels are much alike, and each image has a brightness and a contrast of its
    own.

    Args:
        size: (channels, height, width).
        entropy: seed of numpy's generator.

    Returns:
        float32 in 0..1, about 0.5 +- 0.25.
    """
    channels, height, width = size
    random = np.random.Generator(np.random.PCG64(entropy))
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = np.inf
    planes = np.fft.irfft2(np.fft.rfft2(random.standard_normal((1 + channels, height, width))) / frequency, s=size[1:])
    planes /= planes.std(axis=(1, 2), keepdims=True)
    image = 0.85 * planes[:1] + 0.5 * planes[1:]  # light, and colour
    image = random.uniform(0.4, 1.2) * image + random.normal(0, 0.4) + random.normal(0, 0.3, (channels, 1, 1))
    return torch.from_numpy((0.5 + 0.25 * image).clip(0, 1)).float()


def image_shape(inputs: tuple | dict) -> tuple | None:
    """Shape of the images among a model's inputs; None unless they are the only tensor."""
    tensors = list(_tensors_in(inputs).values())
    is_image = len(tensors) == 1 and tensors[0].ndim == 4 and tensors[0].is_floating_point()
    return tuple(tensors[0].shape) if is_image else None


def place_of(inputs: tuple | dict, batch: torch.Tensor) -> int | str | None:
    """Place or name of the first of a model's inputs that is a tensor of the same kind as a batch; None without one."""
    kind = batch.ndim, batch.is_floating_point()
    tensors = _tensors_in(inputs).items()
    return next((name for name, value in tensors if (value.ndim, value.is_floating_point()) == kind), None)


def _tensors_in(inputs):
    """{place or name: tensor} of a model's inputs."""
    named = inputs.items() if isinstance(inputs, dict) else enumerate(inputs)
    return {name: value for name, value in named if isinstance(value, torch.Tensor)}


def images_in(batch: torch.Tensor | Mapping) -> int:
    """The number of images, or of other inputs, in a batch."""
    return len(next(iter(batch.values())) if isinstance(batch, Mapping) else batch)


def first_images(batch: torch.Tensor | Mapping, count: int) -> torch.Tensor | dict:
    """The first images, or other inputs, of a batch."""
    return {name: value[:count] for name, value in batch.items()} if isinstance(batch, Mapping) else batch[:count]


def joined(batches: Iterable, count: int) -> Iterator:
    """Join neighbouring batches that differ only in their numbers of images, up to ``count`` images."""
    waiting = []
    for batch in batches:
        if waiting and (not _alike(waiting[0], batch) or sum(map(images_in, [*waiting, batch])) > count):
            yield _together(waiting)
            waiting = []
        waiting.append(batch)
    if waiting:
        yield _together(waiting)


def inputs_with(inputs: tuple | dict, batch: torch.Tensor | Mapping) -> tuple | dict:
    """The inputs of a batch's forward pass: a tuple of arguments, or a dict of keyword arguments.

    Args:
        inputs: example inputs of the model. Those that are not tensors are passed on unchanged.
        batch: images or ids, or a dict of tensors.
    """
    place = None if isinstance(batch, Mapping) else place_of(inputs, batch)
    if isinstance(batch, Mapping) or isinstance(inputs, dict):
        options = inputs if isinstance(inputs, dict) else {}
        given = batch if isinstance(batch, Mapping) else {place: batch}
        return {name: value for name, value in options.items() if not isinstance(value, torch.Tensor)} | given
    return tuple(batch if number == place else value for number, value in enumerate(inputs))


def inputs_in(batch: object, argument: str) -> torch.Tensor | dict:
    """A model's inputs in a batch as a loader gives it.

    Args:
        batch: a tensor; a dict of tensors, whose other entries, such as texts, are left out; or a tuple or list that
            begins with one of these, and goes on with labels.
        argument: what the batch was given in, for errors.

    Raises:
        InputError: it is something else.
    """
    if isinstance(batch, (tuple, list)) and batch and all(isinstance(value, torch.Tensor) for value in batch[1:2]):
        return inputs_in(batch[0], argument)
    if isinstance(batch, torch.Tensor):
        return batch
    tensors = {}
    if isinstance(batch, Mapping):
        tensors = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise InputError(
            f"{argument}: batches must be tensors, pairs of inputs and labels, or dicts of tensors, not "
            f"{type(batch).__name__}"
        )
    return tensors


def inputs_and_labels(batch: object, argument: str) -> tuple:
    """(a model's inputs, labels) in a batch as a loader gives it; without labels there, these are None.

    Args, Raises: as ``inputs_in``. In a dict, labels are called ``labels`` or ``label``.
    """
    inputs = inputs_in(batch, argument)
    labels = batch[1] if isinstance(batch, (tuple, list)) and len(batch) > 1 else None
    if isinstance(inputs, dict):
        named = [inputs.pop(name) for name in LABELS if name in inputs]
        labels = next(iter(named), None) if labels is None else labels
    return inputs, labels


def placed(inputs: torch.Tensor | Mapping, like: torch.Tensor) -> torch.Tensor | dict:
    """A model's inputs where one of its parameters is; images and other floating point numbers in its precision."""
    if isinstance(inputs, Mapping):
        return {name: placed(value, like) for name, value in inputs.items()}
    return inputs.to(like) if inputs.is_floating_point() else inputs.to(like.device)


@dataclass(frozen=True)
class LoadedInputs:
    """A model's inputs in the batches of a loader, as often as they are asked for."""

    batches: Iterable

    def __iter__(self):
        return (inputs_in(batch, "calibration") for batch in self.batches)


def check_batches(images: Iterable, inputs: tuple | dict, count: int | None, side: int | None) -> Iterable:
    """Check images, or other inputs, that the caller gives as tensors, and return them in batches.

    Args:
        images: a tensor (n, channels, height, width), or another for a model that takes only this; or an iterable, such
            as a loader, of what ``inputs_in`` takes.
        inputs: example inputs of the student.
        count, side: must be None, since all batches are taken as they are.

    Raises:
        InputError: they are something else, or an iterator, which can be gone through only once.
    """
    for option, value in (("calibration_images", count), ("calibration_size", side)):
        if value is not None:
            raise InputError(f"{option}={value}: has no effect with images given as tensors; leave it out")
    if isinstance(images, torch.Tensor):
        images = images.split(BATCH_SIZE)
    if not hasattr(images, "__iter__") or iter(images) is images:
        raise InputError(f"calibration: a {type(images).__name__} cannot be gone through three times; give a list")
    batches = LoadedInputs(images)
    if (first := next(iter(images), None)) is None:
        raise InputError("calibration: holds no batches; give some")
    first = inputs_in(first, "calibration")
    if isinstance(first, Mapping):
        return batches
    size = image_shape(inputs)
    if size is None and _is_enough(first, inputs):
        return batches
    if size is None:
        named = inputs.items() if isinstance(inputs, dict) else {"NAME": first}.items()
        names = ", ".join(f'"{name}": tensor' for name, value in named if isinstance(value, torch.Tensor))
        raise InputError(
            f"calibration: the model takes more than a tensor like {tuple(first.shape)}; give batches that are dicts, "
            f"with the names of its forward's arguments: {{{names}}}"
        )
    channels = size[1]
    if not first.is_floating_point() or first.ndim != 4 or not len(first):
        found = f"{first.dtype} {tuple(first.shape)}"
        raise InputError(f"calibration: batches must be floating point (n, {channels}, height, width), not {found}")
    if first.shape[1] != channels:
        raise InputError(f"calibration: images have {first.shape[1]} channels, the model takes {channels}")
    return batches


def _is_enough(batch, inputs):
    """Whether a model needs no more than a batch: beside ids, inputs that have names have defaults too."""
    alone = len(_tensors_in(inputs)) == 1 or isinstance(inputs, dict) and not batch.is_floating_point()
    return alone and place_of(inputs, batch) is not None


def _alike(batch, other):
    if isinstance(batch, Mapping):
        return batch.keys() == other.keys() and all(_alike(value, other[name]) for name, value in batch.items())
    return batch.shape[1:] == other.shape[1:]


def _together(batches):
    if isinstance(batches[0], Mapping):
        return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    return torch.cat(batches)


def _find_images(root):
    """Paths of the images in a directory and below it, in order; InputError if there are none."""
    files = (Path(folder, name) for folder, _, names in os.walk(root, followlinks=True) for name in names)
    paths = sorted(path for path in files if path.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise InputError(f"--calibration {root}: no images there ({' '.join(IMAGE_SUFFIXES)}); name another directory")
    return paths


def _transform(size, config):
    """timm's preparation of images for evaluation."""
    from timm.data import create_transform

    return create_transform(size, **{word: config[word] for word in ("mean", "std", "interpolation", "crop_pct")})
