"""Data sets, transforms and loaders. Every image a step sees depends on seed, epoch and total batch only."""

import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

import numpy as np
import sklearn.datasets
import torch
import torchvision.datasets
from PIL import Image
from timm.data import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_INCEPTION_MEAN,
    IMAGENET_INCEPTION_STD,
    auto_augment,
    create_transform,
)
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Sampler, default_collate

from consensus import SIGNALS, Consensus
from utils import InputError, main_first, printable, say, seed_everything

# ---------------------------------------------------------------------------------------------------------
# Data sets


# What files of images are read as. Pillow would also run Ghostscript on PostScript that is called an image.
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")


class BadImage(Exception):
    """An image that cannot be read; the message says which and why."""


class ImageFiles(Dataset):
    """Images in files of any mode, converted to RGB as timm does (their EXIF orientation is not applied either).

    Args:
        samples: (path, label) of each.
        transform: of an RGB image.
        classes: names of the labels from 0 on, if they are known.

    Raises:
        BadImage: by an item that cannot be decoded.
    """

    def __init__(self, samples, transform, classes=None):
        self.samples, self.transform, self.classes = list(samples), transform, classes

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        path, label = self.samples[index]
        try:
            with Image.open(path, formats=FORMATS) as file:
                image = file.convert("RGB")
        except Exception as error:  # a damaged image makes Pillow raise nearly anything; only it runs here
            raise BadImage(printable(f"{path} cannot be read ({str(error) or type(error).__name__})")) from error
        return self.transform(image), label


class Digits(Dataset):
    """scikit-learn's handwritten digits: 1797 images of 8x8, grey, as RGB; the first 1000 train, the last 797 test.

    The order of the set is kept: it was collected in rounds, so the test writers are other people.
    """

    classes = list(range(10))
    train_images = 1000

    def __init__(self, train, transform):
        images, targets = sklearn.datasets.load_digits(return_X_y=True)
        part = slice(None, self.train_images) if train else slice(self.train_images, None)
        self.images = (images[part].reshape(-1, 8, 8) * (255 / 16)).round().astype(np.uint8)
        self.targets = targets[part].tolist()
        self.transform = transform

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        return self.transform(Image.fromarray(self.images[index]).convert("RGB")), self.targets[index]


@dataclass(frozen=True)
class Source:
    """A data set that ``--data_set`` can name.

    Attributes:
        build: ``build(root, train, transform, download)`` gives a map-style dataset of (RGB image, label).
        layout: what must lie below ``--data_path``; None for a data set that needs no files.
        classes: how many; None for class folders, which say it themselves. Labels count from 0.
        images: training and test images of a complete copy, other numbers are warned about; None where not checked.
        folders: class folders, so that ``--eval_data_path`` may name the test images.
    """

    build: Callable
    layout: str | None
    classes: int | None = None
    images: tuple[int, int] | None = None
    folders: bool = False


def _cifar(cls):
    return lambda root, train, transform, download: cls(root, train=train, transform=transform, download=download)


def _splits(cls, *train_splits):
    """Joins the named splits of a torchvision class to train on; its split "test" tests."""

    def build(root, train, transform, download):
        splits = train_splits if train else ("test",)
        return ConcatDataset([cls(root, split=split, transform=transform, download=download) for split in splits])

    return build


def _listed(cls, files, *train_splits):
    """As ``_splits``, of a class that takes the names of its images from a list and looks for none of them.

    ``files`` is its attribute of them.
    """

    def build(root, train, transform, download):
        parts = [cls(root, split=split, download=download) for split in (train_splits if train else ("test",))]
        samples = [sample for part in parts for sample in zip(getattr(part, files), part._labels, strict=True)]
        _check_files([file for file, _ in samples])
        return ImageFiles(samples, transform)

    return build


def _check_files(files):
    folders = {file.parent for file in files}  # reading each once is much faster than asking for every file
    present = {file for folder in folders if folder.is_dir() for file in folder.iterdir()}
    missing = [file for file in files if file not in present]
    if missing:
        raise FileNotFoundError(f"{len(missing):,} of {len(files):,} images are missing, such as {missing[0]}")


def _eurosat(root, train, transform, download):
    """EuroSAT has no official split. Here an image tests if its number (10 of Forest_10.jpg) is a multiple of 5."""
    samples = torchvision.datasets.EuroSAT(root, download=download).samples
    tests = [int(Path(file).stem.rpartition("_")[2]) % 5 == 0 for file, _ in samples]
    return ImageFiles([sample for sample, test in zip(samples, tests, strict=True) if test != train], transform)


def _folder(root, train, transform, download):
    folder = torchvision.datasets.ImageFolder(root)
    return ImageFiles(folder.samples, transform, folder.classes)


FOLDERS = "train/CLASS/IMAGE and val/CLASS/IMAGE"
SOURCES = {
    "CIFAR10": Source(_cifar(torchvision.datasets.CIFAR10), "cifar-10-batches-py/", 10, (50_000, 10_000)),
    "CIFAR100": Source(_cifar(torchvision.datasets.CIFAR100), "cifar-100-python/", 100, (50_000, 10_000)),
    "pets": Source(
        _listed(torchvision.datasets.OxfordIIITPet, "_images", "trainval"),
        "oxford-iiit-pet/ with images/ and annotations/",
        37,
        (3_680, 3_669),
    ),
    "flowers": Source(
        _listed(torchvision.datasets.Flowers102, "_image_files", "train", "val"),
        "flowers-102/ with jpg/, imagelabels.mat and setid.mat",
        102,
        (2_040, 6_149),
    ),
    "stl10": Source(
        _splits(torchvision.datasets.STL10, "train"),
        "stl10_binary/ with train_X.bin, train_y.bin, test_X.bin, test_y.bin and unlabeled_X.bin",
        10,
        (5_000, 8_000),
    ),
    "food101": Source(
        _listed(torchvision.datasets.Food101, "_image_files", "train"),
        "food-101/ with images/ and meta/",
        101,
        (75_750, 25_250),
    ),
    "dtd": Source(  # torchvision's default: the first of ten partitions
        _listed(torchvision.datasets.DTD, "_image_files", "train", "val"),
        "dtd/dtd/ with images/ and labels/",
        47,
        (3_760, 1_880),
    ),
    "svhn": Source(
        _splits(torchvision.datasets.SVHN, "train"), "train_32x32.mat and test_32x32.mat", 10, (73_257, 26_032)
    ),
    "eurosat": Source(_eurosat, "eurosat/2750/ with CLASS/CLASS_NUMBER.jpg", 10, (21_600, 5_400)),
    "IMNET": Source(_folder, FOLDERS, folders=True),
    "image_folder": Source(_folder, FOLDERS, folders=True),
    "digits": Source(lambda root, train, transform, download: Digits(train, transform), None, 10),
}


def build_dataset(args, train: bool) -> tuple:
    """Build the training or the test set that the options describe.

    Returns:
        (dataset, number of classes).

    Raises:
        InputError: the files are not there and cannot be downloaded; some are missing or cannot be read; class folders
            are empty or differ.
    """
    source = SOURCES[args.data_set]
    transform = build_transform(args, train)
    if source.layout is None:
        return source.build(None, train, transform, False), source.classes
    if args.data_path is None:
        raise InputError(f"--data_path is missing: the directory that holds {source.layout} of {args.data_set}")
    if source.folders:
        roots = [Path(args.data_path) / "train", Path(args.data_path) / "val"]
        if args.eval_data_path is not None:
            roots = [Path(args.data_path), Path(args.eval_data_path)]
        dataset = _open_folder(source, roots[not train], transform, args.data_set)
        if not train and not args.eval and dataset.classes != (other := _class_folders(roots[0])):
            odd = sorted(set(dataset.classes) ^ set(other))[0]
            raise InputError(
                f"--data_path {args.data_path}: class folder {odd} is in only one of {roots[0]} and {roots[1]}"
            )
        return dataset, len(dataset.classes)
    dataset = main_first(lambda: _open_or_download(args, source, train, transform))
    if len(dataset) != (complete := source.images[not train]):  # a part of the set may be meant, so it is no error
        part = "training" if train else "test"
        found = f"{len(dataset):,} {part} images of {args.data_set}, not {complete:,}"
        say(f"warning: --data_path {args.data_path}: {found}")
    return dataset, source.classes


def _class_folders(root):
    return sorted(path.name for path in root.iterdir() if path.is_dir())


def _open_folder(source, root, transform, name):
    if not root.is_dir():
        raise InputError(f"--data_path: no directory {root}; {name} needs {source.layout}, or --eval_data_path")
    try:
        return source.build(root, None, transform, None)
    except FileNotFoundError as error:  # torchvision's word for no class folders and for empty ones
        raise InputError(f"--data_path: {root} must hold class folders with images in them: {error}") from error


# What torchvision raises for files that are missing, damaged or cut off, for a package that it does without until it
# needs it (scipy) and for connections that break.
UNREADABLE = (RuntimeError, OSError, ValueError, ImportError, HTTPException)


def _open_or_download(args, source, train, transform):
    if not Path(args.data_path).is_dir():
        raise InputError(
            f"--data_path {args.data_path}: no such directory; make it, and {args.data_set} is downloaded into it, "
            f"or name the one that holds {source.layout}"
        )

    try:
        return source.build(args.data_path, train, transform, False)
    except RuntimeError:  # torchvision's word for files that are not there or fail their check sum
        pass
    except UNREADABLE as error:  # there, but torchvision would take it for complete and download nothing
        raise InputError(
            f"--data_path {args.data_path}: cannot read {source.layout} of {args.data_set} ({error}); "
            "if it is incomplete, unpack it again, or remove it to have it downloaded"
        ) from error
    try:
        return source.build(args.data_path, train, transform, True)
    except UNREADABLE as error:
        raise InputError(
            f"--data_path {args.data_path}: holds no complete {source.layout} of {args.data_set}, and downloading "
            f"and reading it failed ({error})"
        ) from error


# ---------------------------------------------------------------------------------------------------------
# Transforms


def normalization(imagenet: bool) -> tuple:
    """Mean and standard deviation, by channel, that images are normalised with: ImageNet's, or 0.5 and 0.5."""
    if imagenet:
        return IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    return IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD


def build_transform(args, train: bool):
    """timm's transform from a PIL image to a normalised (3, input_size, input_size) tensor.

    Training: random resized crop, flip, RandAugment, random erasing (Table 13). Test: resize to 256/224 of the input
    size and crop the centre; from 384 pixels on, squash the whole image, as ConvNeXt does.
    """
    mean, std = normalization(args.imagenet_default_mean_and_std)
    common = {"input_size": args.input_size, "mean": mean, "std": std}
    if train:
        try:
            transform = create_transform(
                **common,
                is_training=True,
                scale=tuple(args.scale),
                hflip=args.hflip,
                color_jitter=args.color_jitter,
                auto_augment=None if args.aa == "none" else args.aa,
                interpolation=args.train_interpolation,
                re_prob=args.reprob,
                re_mode=args.remode,
                re_count=args.recount,
            )
        except (AssertionError, ValueError, KeyError) as error:  # timm's ways of refusing a policy
            raise InputError(f"--aa {args.aa}: no policy of timm's; such as rand-m9-mstd0.5-inc1, or none") from error
        return _with_posterize_to_black(transform)
    squash = args.crop_pct is None and args.input_size >= 384
    return create_transform(
        **common,
        is_training=False,
        interpolation="bicubic",
        crop_pct=1.0 if squash else args.crop_pct or 224 / 256,
        crop_mode="squash" if squash else "center",
    )


def _with_posterize_to_black(transform):
    """Let RandAugment posterize to 0 bits, which the paper's policy draws and Pillow refuses from some version on."""
    for step in transform.transforms:
        operations = getattr(step, "ops", None) or [op for group in getattr(step, "policy", ()) for op in group]
        for operation in operations:
            if operation.aug_fn is auto_augment.posterize:
                operation.aug_fn = _posterize
    return transform


def _posterize(image, bits, **_):
    """timm's operation; no bits leave a black image, as they always did."""
    return image.point(lambda value: 0) if bits == 0 else auto_augment.posterize(image, bits)


# ---------------------------------------------------------------------------------------------------------
# Loaders


class Augmented(Dataset):
    """A data set whose item (index, epoch) is augmented with randomness from (seed, epoch, index) alone.

    An image that cannot be read is replaced by the next one that can.

    Args:
        dataset: gives (image, label).
        seed: of the run.
        skip: images that may be replaced in all. After more in a row the run ends anyway: then it is a black one.

    Returns:
        (image, label, what is wrong with the images that could not be read).
    """

    def __init__(self, dataset, seed, skip):
        self.dataset, self.seed, self.skip = dataset, seed, skip

    def __getitem__(self, item):
        index, epoch = item
        seed_everything(self.seed, epoch, index)
        return _readable(self.dataset, [(index + ahead) % len(self.dataset) for ahead in range(self.skip + 1)])


class Plain(Dataset):
    """A data set whose item is (image, label, what is wrong with the image, which then is a black one)."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __getitem__(self, index):
        return _readable(self.dataset, [index])

    def __len__(self):
        return len(self.dataset)


def _readable(dataset, indices):
    problems = []
    for index in indices:
        try:
            return *dataset[index], problems
        except BadImage as error:
            problems.append(str(error))
    return dataset.transform(Image.new("RGB", (32, 32))), 0, problems


def _collate(samples):
    *images_and_labels, problems = zip(*samples, strict=True)
    images, labels = default_collate(list(zip(*images_and_labels, strict=True)))
    return images, labels, [problem for one in problems for problem in one]


class BadImages:
    """The training images that could not be read, in all processes; too many end the run.

    Args:
        limit: how many there may be.
        consensus: of the processes.
        known: those of a run that goes on.
    """

    def __init__(self, limit: int, consensus: Consensus, known=()):
        self.limit, self.consensus, self.known, self.found = limit, consensus, set(known), set()

    def add(self, problems: list) -> None:
        """Take those of a batch."""
        self.found.update(problems)
        self._check(self.known | self.found)

    def share(self) -> None:
        """Tell those found here to all processes. All must call it after the same step."""
        if self.limit == 0:
            return
        found = set().union(*self.consensus.gather_objects(sorted(self.found - self.known)))
        for problem in sorted(found):
            say(f"warning: {problem}; replaced by another")
        self.known |= found
        self.found.clear()
        self._check(self.known)

    def _check(self, problems):
        if len(problems) > self.limit:
            more = f" ({len(problems)} of them)" if self.limit else ""
            self.consensus.fail(
                f"training image {min(problems)}{more}; repair it, or let up to N be replaced with --skip_bad_images N"
            )


class TrainBatches(Sampler):
    """One process's micro-batches of an epoch, or of the rest of it, as lists of (index, epoch).

    An epoch is one permutation of the images, cut into micro-batches numbered 0, 1, ...; process r takes r, r + world
    size, ... So a step of the optimiser sees the same micro-batches on any number of processes; images that do not
    fill a total batch wait for another epoch's order.

    Args:
        images: number of images in the set.
        batch_size: images in a micro-batch.
        steps: optimiser steps in an epoch.
        update_freq: micro-batches per process and step.
        rank, world_size: this process among all.
        seed: of the run.
    """

    def __init__(self, images, batch_size, steps, update_freq, rank, world_size, seed):
        self.images, self.batch_size, self.seed = images, batch_size, seed
        self.numbers, self.update_freq = range(rank, steps * update_freq * world_size, world_size), update_freq
        self.epoch = self.first = 0

    def set_position(self, epoch, step):
        """Choose the epoch the next iteration goes through, and from which of its steps on."""
        self.epoch, self.first = epoch, step * self.update_freq

    def __len__(self):
        return len(self.numbers) - self.first

    def __iter__(self):
        order = np.random.RandomState(np.random.SeedSequence((self.seed, self.epoch)).generate_state(4))
        order = order.permutation(self.images).tolist()
        for number in self.numbers[self.first :]:
            yield [(i, self.epoch) for i in order[number * self.batch_size : (number + 1) * self.batch_size]]


class Share(Sampler):
    """Every ``world_size``-th of ``images`` indices from ``rank`` on: together the processes see each image once."""

    def __init__(self, images, rank, world_size):
        self.indices, self.most = range(rank, images, world_size), -(-images // world_size)

    def __iter__(self):
        return iter(self.indices)

    def __len__(self):
        return len(self.indices)

    def batches(self, batch_size):
        """How many batches the process with the most of them gets."""
        return -(-self.most // batch_size)


def _obey_only_the_parent(worker):
    """Let no signal end a loader worker but its parent's.

    Launchers, schedulers and Ctrl-C send theirs to every process, and the parent needs batches until it has stopped.
    """
    parent = os.getppid()
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)

    def wait():
        while signal.sigwaitinfo(SIGNALS).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def _loader_options(args):
    return {
        "num_workers": args.num_workers,
        "pin_memory": args.pin_mem and args.device == "cuda",
        "collate_fn": _collate,
        "worker_init_fn": _obey_only_the_parent,
        "timeout": args.timeout if args.num_workers > 0 else 0,
        "multiprocessing_context": "fork" if args.num_workers > 0 else None,  # not Python 3.14's, which imports anew
    }


def train_loader(dataset, batches: TrainBatches, args) -> DataLoader:
    """Loader of micro-batches: images, labels, and what is wrong with those that could not be read."""
    return DataLoader(
        Augmented(dataset, args.seed, args.skip_bad_images),
        batch_sampler=batches,
        persistent_workers=args.num_workers > 0,
        **_loader_options(args),
    )


def eval_loader(dataset, args, rank: int, world_size: int) -> DataLoader:
    """Loader of a process's share of the test images: images, labels, and what is wrong with those it cannot read."""
    return DataLoader(
        Plain(dataset),
        sampler=Share(len(dataset), rank, world_size),
        batch_size=int(1.5 * args.batch_size),
        generator=torch.Generator(),  # the default one is the training's
        **_loader_options(args),
    )
