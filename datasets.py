"""The data sets: a table, and how each is opened. Imports no torch, so that options can be checked before it."""

from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

import numpy as np
from PIL import Image

from weight_selection.errors import InputError
from weight_selection.image_files import read_image


class ImageFiles:
    """Images that lie in files; items are (transformed image, label).

    Args:
        samples: the (path, label) of each image.
        transform: applied to each image as a PIL image in RGB.
        classes: the class names in the order of their labels, if they are known.

    Raises:
        BadImage: when an item is asked for whose file cannot be read.
    """

    def __init__(self, samples, transform, classes=None):
        self.samples, self.transform, self.classes = list(samples), transform, classes

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        path, label = self.samples[index]
        return self.transform(read_image(path)), label


class Digits:
    """scikit-learn's handwritten digits: 1797 images of 8x8, grey, as RGB; the first 1000 train, the last 797 test.

    The order of the set is kept: it was collected in rounds, so the test writers are other people.
    """

    classes = list(range(10))
    train_images = 1000

    def __init__(self, train, transform):
        import sklearn.datasets

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


def _torchvision(name):
    """A class of torchvision's."""
    import torchvision.datasets

    return getattr(torchvision.datasets, name)


def _cifar(name):
    return lambda root, train, transform, download: _torchvision(name)(
        root, train=train, transform=transform, download=download
    )


def _splits(name, *train_splits):
    """Joins the named splits of a torchvision class to train on; its split "test" tests."""

    def build(root, train, transform, download):
        from torch.utils.data import ConcatDataset

        cls = _torchvision(name)
        splits = train_splits if train else ("test",)
        return ConcatDataset([cls(root, split=split, transform=transform, download=download) for split in splits])

    return build


def _listed(name, files, *train_splits):
    """As ``_splits``, of a class that takes the names of its images from a list and looks for none of them.

    ``files`` is its attribute of them.
    """

    def build(root, train, transform, download):
        cls = _torchvision(name)
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
    samples = _torchvision("EuroSAT")(root, download=download).samples
    tests = [int(Path(file).stem.rpartition("_")[2]) % 5 == 0 for file, _ in samples]
    return ImageFiles([sample for sample, test in zip(samples, tests, strict=True) if test != train], transform)


def _folder(root, train, transform, download):
    folder = _torchvision("ImageFolder")(root)
    return ImageFiles(folder.samples, transform, folder.classes)


FOLDERS = "train/CLASS/IMAGE and val/CLASS/IMAGE"
SOURCES = {
    "CIFAR10": Source(_cifar("CIFAR10"), "cifar-10-batches-py/", 10, (50_000, 10_000)),
    "CIFAR100": Source(_cifar("CIFAR100"), "cifar-100-python/", 100, (50_000, 10_000)),
    "pets": Source(
        _listed("OxfordIIITPet", "_images", "trainval"),
        "oxford-iiit-pet/ with images/ and annotations/",
        37,
        (3_680, 3_669),
    ),
    "flowers": Source(
        _listed("Flowers102", "_image_files", "train", "val"),
        "flowers-102/ with jpg/, imagelabels.mat and setid.mat",
        102,
        (2_040, 6_149),
    ),
    "stl10": Source(
        _splits("STL10", "train"),
        "stl10_binary/ with train_X.bin, train_y.bin, test_X.bin, test_y.bin and unlabeled_X.bin",
        10,
        (5_000, 8_000),
    ),
    "food101": Source(
        _listed("Food101", "_image_files", "train"),
        "food-101/ with images/ and meta/",
        101,
        (75_750, 25_250),
    ),
    "dtd": Source(  # torchvision's default: the first of ten partitions
        _listed("DTD", "_image_files", "train", "val"),
        "dtd/dtd/ with images/ and labels/",
        47,
        (3_760, 1_880),
    ),
    "svhn": Source(_splits("SVHN", "train"), "train_32x32.mat and test_32x32.mat", 10, (73_257, 26_032)),
    "eurosat": Source(_eurosat, "eurosat/2750/ with CLASS/CLASS_NUMBER.jpg", 10, (21_600, 5_400)),
    "IMNET": Source(_folder, FOLDERS, folders=True),
    "image_folder": Source(_folder, FOLDERS, folders=True),
    "digits": Source(lambda root, train, transform, download: Digits(train, transform), None, 10),
}


def to_pixels(image) -> "torch.Tensor":  # noqa: F821
    """uint8 (height, width, 3) of a PIL image in RGB."""
    import torch

    return torch.from_numpy(np.array(image))


def build_dataset(args, train: bool) -> tuple:
    """Build the training or the test set that the options describe.

    Returns:
        (dataset of (uint8 (height, width, 3), label), number of classes).

    Raises:
        InputError: the files are not there and cannot be downloaded; some are missing or cannot be read; class folders
            are empty or differ.
    """
    source = SOURCES[args.data_set]
    if source.layout is None:
        return source.build(None, train, to_pixels, False), source.classes
    if args.data_path is None:
        raise InputError(f"--data_path is missing: the directory that holds {source.layout} of {args.data_set}")
    if source.folders:
        roots = [Path(args.data_path) / "train", Path(args.data_path) / "val"]
        if args.eval_data_path is not None:
            roots = [Path(args.data_path), Path(args.eval_data_path)]
        dataset = _open_folder(source, roots[not train], args.data_set)
        if not train and not args.eval and dataset.classes != (other := _class_folders(roots[0])):
            odd = sorted(set(dataset.classes) ^ set(other))[0]
            raise InputError(
                f"--data_path {args.data_path}: class folder {odd} is in only one of {roots[0]} and {roots[1]}"
            )
        return dataset, len(dataset.classes)
    from distributed.process_group import main_first
    from utils import print_main

    dataset = main_first(lambda: _open_or_download(args, source, train))
    if len(dataset) != (complete := source.images[not train]):  # a part of the set may be meant, so it is no error
        part = "training" if train else "test"
        found = f"{len(dataset):,} {part} images of {args.data_set}, not {complete:,}"
        print_main(f"warning: --data_path {args.data_path}: {found}")
    return dataset, source.classes


def _class_folders(root):
    return sorted(path.name for path in root.iterdir() if path.is_dir())


def _open_folder(source, root, name):
    if not root.is_dir():
        raise InputError(f"--data_path: no directory {root}; {name} needs {source.layout}, or --eval_data_path")
    try:
        return source.build(root, None, to_pixels, None)
    except FileNotFoundError as error:  # torchvision's word for no class folders and for empty ones
        raise InputError(f"--data_path: {root} must hold class folders with images in them: {error}") from error


# What torchvision raises for files that are missing, damaged or cut off, for a package that it does without until it
# needs it (scipy) and for connections that break.
UNREADABLE = (RuntimeError, OSError, ValueError, ImportError, HTTPException)


def _open_or_download(args, source, train):
    if not Path(args.data_path).is_dir():
        raise InputError(
            f"--data_path {args.data_path}: no such directory; make it, and {args.data_set} is downloaded into it, "
            f"or name the one that holds {source.layout}"
        )

    try:
        return source.build(args.data_path, train, to_pixels, False)
    except RuntimeError:  # torchvision's word for files that are not there or fail their check sum
        pass
    except UNREADABLE as error:  # there, but torchvision would take it for complete and download nothing
        raise InputError(
            f"--data_path {args.data_path}: cannot read {source.layout} of {args.data_set} ({error}); "
            "if it is incomplete, unpack it again, or remove it to have it downloaded"
        ) from error
    try:
        return source.build(args.data_path, train, to_pixels, True)
    except UNREADABLE as error:
        raise InputError(
            f"--data_path {args.data_path}: holds no complete {source.layout} of {args.data_set}, and downloading "
            f"and reading it failed ({error})"
        ) from error
