"""The data sets: a table, and how each is opened. Imports no torch: main.py checks its options before it loads it."""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image

from weight_selection.errors import InputError
from weight_selection.files import check_directory
from weight_selection.image_files import IMAGE_SUFFIXES, read_image


class ImageFiles:
    """Images that lie in files, from the (path, label) of each; items are (transformed RGB image, label).

    ``classes`` are the class names in the order of their labels, if they are known; ``left_out`` are paths of files
    beside the images that are not named like images. An item whose file cannot be read raises ``BadImage``.
    """

    def __init__(
        self,
        samples: Iterable[tuple],
        transform: Callable[[Image.Image], object],
        classes: list[str] | None = None,
        left_out: Sequence = (),
    ):
        self.samples, self.transform, self.classes, self.left_out = list(samples), transform, classes, left_out

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        path, label = self.samples[index]
        return self.transform(read_image(path)), label


class Digits:
    """scikit-learn's handwritten digits: 1797 grey images of 8x8 pixels, as RGB.

    The first 1000 are training images, the last 797 test images. The set lists one group of writers after the other,
    so this split tests on other people's handwriting.
    """

    classes = list(range(10))
    train_images = 1000

    def __init__(self, train: bool, transform: Callable[[Image.Image], object]):
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
class DataSet:
    """A data set that ``--data_set`` can name."""

    # build(root, train, transform, download) returns a map-style dataset of (transformed RGB image, label from 0 up).
    build: Callable
    layout: str | None  # the files and directories that must lie below --data_path; None if there are none
    classes: int | None = None  # None for class folders, where the directories decide it
    images: tuple[int, int] | None = None  # for training and test in a complete copy; None where they are not checked
    folders: bool = False  # class folders; --eval_data_path may then name the directory of the test images

    @property
    def places(self) -> tuple[str, ...]:
        """The paths below ``--data_path`` by which a copy is recognised: those of class folders, or the first."""
        return ("train", "val") if self.folders else (self.layout.split()[0],)


def _torchvision(name):
    import torchvision.datasets

    return getattr(torchvision.datasets, name)


def _cifar(name):
    return lambda root, train, transform, download: _torchvision(name)(root, train, transform, download=download)


def _split(name):
    """A ``build`` for a torchvision class that has the splits train and test."""

    def build(root, train, transform, download):
        return _torchvision(name)(root, "train" if train else "test", transform=transform, download=download)

    return build


def _listed(name, files, *train_splits):
    """A ``build`` for a torchvision class with named splits, of which it joins ``train_splits`` for training.

    The class lists its images without looking whether they exist; ``files`` names the attribute that holds the list.
    """

    def build(root, train, transform, download):
        cls = _torchvision(name)
        parts = [cls(root, split=split, download=download) for split in (train_splits if train else ("test",))]
        samples = [sample for part in parts for sample in zip(getattr(part, files), part._labels, strict=True)]
        _check_files([file for file, _ in samples])
        return ImageFiles(samples, transform, getattr(parts[0], "classes", None))

    return build


def _check_files(files):
    folders = {file.parent for file in files}  # listing each folder once is much faster than asking for every file
    present = {file for folder in folders if folder.is_dir() for file in folder.iterdir()}
    missing = [file for file in files if file not in present]
    if missing:
        raise FileNotFoundError(f"{len(missing):,} of {len(files):,} images are missing, such as {missing[0]}")


def _eurosat(root, train, transform, download):
    """EuroSAT has no official split. Here the images whose number (10 in Forest_10.jpg) is divisible by 5 test."""
    whole = _torchvision("EuroSAT")(root, download=download)
    in_test = [int(Path(file).stem.rpartition("_")[2]) % 5 == 0 for file, _ in whole.samples]
    samples = [sample for sample, test in zip(whole.samples, in_test, strict=True) if test != train]
    return ImageFiles(samples, transform, whole.classes)


def _folder(root, train, transform, download):
    left_out = []

    def is_image(path):
        found = path.lower().endswith(IMAGE_SUFFIXES)
        if not found:
            left_out.append(path)
        return found

    folder = _torchvision("ImageFolder")(root, is_valid_file=is_image)
    return ImageFiles(folder.samples, transform, folder.classes, left_out)


FOLDERS = "train/CLASS/IMAGE and val/CLASS/IMAGE"
# fmt: off
DATA_SETS = {
    "CIFAR10": DataSet(_cifar("CIFAR10"), "cifar-10-batches-py/", 10, (50_000, 10_000)),
    "CIFAR100": DataSet(_cifar("CIFAR100"), "cifar-100-python/", 100, (50_000, 10_000)),
    "pets": DataSet(_listed("OxfordIIITPet", "_images", "trainval"),
                    "oxford-iiit-pet/ with images/ and annotations/", 37, (3_680, 3_669)),
    "flowers": DataSet(_listed("Flowers102", "_image_files", "train", "val"),
                       "flowers-102/ with jpg/, imagelabels.mat and setid.mat", 102, (2_040, 6_149)),
    "stl10": DataSet(_split("STL10"),
                     "stl10_binary/ with train_X.bin, train_y.bin, test_X.bin, test_y.bin and unlabeled_X.bin",
                     10, (5_000, 8_000)),
    "food101": DataSet(_listed("Food101", "_image_files", "train"),
                       "food-101/ with images/ and meta/", 101, (75_750, 25_250)),
    "dtd": DataSet(_listed("DTD", "_image_files", "train", "val"),  # torchvision's default: the first of ten partitions
                   "dtd/dtd/ with images/ and labels/", 47, (3_760, 1_880)),
    "svhn": DataSet(_split("SVHN"), "train_32x32.mat and test_32x32.mat", 10, (73_257, 26_032)),
    "eurosat": DataSet(_eurosat, "eurosat/2750/ with CLASS/CLASS_NUMBER.jpg", 10, (21_600, 5_400)),
    "IMNET": DataSet(_folder, FOLDERS, folders=True),
    "image_folder": DataSet(_folder, FOLDERS, folders=True),
    "digits": DataSet(lambda root, train, transform, download: Digits(train, transform), None, 10),
}
# fmt: on


def find_data(args: SimpleNamespace, print_line: Callable[[str], object] = print) -> SimpleNamespace:
    """Options whose ``--data_path`` holds the data set, if it lies there, one or two levels higher, or one deeper.

    Args:
        args: options of main.py.
        print_line: gets a line of text if it lies higher or deeper.

    Raises:
        InputError: it lies in several directories below, or higher than a directory that does not exist.
    """
    data_set = DATA_SETS[args.data_set]
    if data_set.layout is None or args.data_path is None or args.eval_data_path is not None:
        return args
    given = Path(args.data_path)
    if any(os.path.exists(given / place) for place in data_set.places):
        return args
    found = [path for path in _nearby(given, data_set) if all(os.path.exists(path / name) for name in data_set.places)]
    if not found:
        return args
    name = f"--data_path {given}: {args.data_set}"
    check_directory(given, "--data_path", f"{args.data_set} is in {found[0]}")
    if len(found) > 1 and found[0].parent == found[1].parent:
        raise InputError(f"{name} is in {found[0]} and in {found[1]}; name one of them")
    print_line(f"{name} is in {found[0]}, which is read")
    return args.replace(data_path=str(found[0]))


def _nearby(given, data_set):
    """Where else a data set may be: above, as far as its own directories go, then in the directories below."""
    whole = given.absolute()
    above = list(whole.parents[:2])
    if data_set.folders:  # all class folders look alike: only from one of its own directories
        above = above[: whole.name in data_set.places]
    try:
        below = sorted(Path(entry) for entry in os.scandir(given) if entry.is_dir())
    except OSError:  # no such directory, or not a readable one, which whoever opens the data set says
        below = []
    return above + below


def to_pixels(image: Image.Image) -> "torch.Tensor":  # noqa: F821
    """The pixels of a PIL image in RGB, uint8 (height, width, 3)."""
    import torch

    return torch.from_numpy(np.array(image))


def build_dataset(args: SimpleNamespace, train: bool) -> tuple:
    """Build the training or the test set that the options describe.

    Returns:
        (dataset of (uint8 (height, width, 3), label), number of classes).

    Raises:
        InputError: files are missing and cannot be downloaded, or cannot be read; a class folder is empty; training
            and test images have different class folders.
    """
    data_set = DATA_SETS[args.data_set]
    if data_set.layout is None:
        return data_set.build(None, train, to_pixels, False), data_set.classes
    if args.data_path is None:
        raise InputError(f"--data_path is missing: the directory that holds {data_set.layout} of {args.data_set}")
    if data_set.folders:
        dataset = _open_class_folders(args, data_set, train)
        return dataset, len(dataset.classes)
    from distributed.process_group import main_first
    from utils import print_main

    dataset = main_first(lambda: _open_or_download(args, data_set, train))
    complete = data_set.images[not train]
    if len(dataset) != complete:  # no error: the user may want only a part of the set
        part = "training" if train else "test"
        found = f"{len(dataset):,} {part} images of {args.data_set}, not {complete:,}"
        print_main(f"warning: --data_path {args.data_path}: {found}")
    return dataset, data_set.classes


def class_names(dataset: object, classes: int) -> list[str]:
    """The names of a data set's classes in the order of their labels; numbers for a set that does not name them all."""
    names = getattr(dataset, "classes", None) or ()
    return list(map(str, names if len(names) == classes else range(classes)))


def _open_class_folders(args, data_set, train):
    roots = [Path(args.data_path) / "train", Path(args.data_path) / "val"]
    if args.eval_data_path is not None:
        roots = [Path(args.data_path), Path(args.eval_data_path)]
    root, option = roots[not train], "--data_path" if train or args.eval_data_path is None else "--eval_data_path"
    if args.eval_data_path is not None:
        check_directory(root, option, "name the one that holds CLASS/IMAGE")
    if not root.is_dir():
        raise InputError(
            f"--data_path: no directory {root}; {args.data_set} needs {data_set.layout}, or --eval_data_path"
        )
    try:
        dataset = data_set.build(root, None, to_pixels, None)
    except FileNotFoundError as error:  # torchvision raises it if there are no class folders, or empty ones
        raise InputError(f"{option}: {root} must hold class folders with images in them: {error}") from error
    if train and len(dataset.classes) == 1:
        raise InputError(
            f"--data_path {args.data_path}: {root} has one class folder only, {dataset.classes[0]}; give two or more"
        )
    if not train and not args.eval:
        training_classes = [path.name for path in roots[0].iterdir() if path.is_dir()]
        if odd := sorted({*dataset.classes} ^ {*training_classes}):
            given = args.eval_data_path or args.data_path
            raise InputError(f"{option} {given}: class folder {odd[0]} is in only one of {roots[0]} and {roots[1]}")
    return dataset


# torchvision raises these if files are missing, damaged or cut off, if a package is missing that only some data sets
# need (scipy), and if a connection breaks.
UNREADABLE = (RuntimeError, OSError, ValueError, ImportError, HTTPException)


def _open_or_download(args, data_set, train):
    remedy = f"make it, and {args.data_set} is downloaded into it, or name the one that holds {data_set.layout}"
    check_directory(args.data_path, "--data_path", remedy)
    try:
        return data_set.build(args.data_path, train, to_pixels, False)
    except RuntimeError:  # torchvision raises it if files are missing or fail their check sum
        pass
    except UNREADABLE as error:  # files exist, so torchvision would take the set for complete and download nothing
        raise InputError(
            f"--data_path {args.data_path}: cannot read {data_set.layout} of {args.data_set} ({error}); "
            "if it is incomplete, unpack it again, or remove it to have it downloaded"
        ) from error
    try:
        with _undone_if_it_fails(Path(args.data_path), data_set):
            return data_set.build(args.data_path, train, to_pixels, True)
    except UNREADABLE as error:
        raise InputError(
            f"--data_path {args.data_path}: holds no complete {data_set.layout} of {args.data_set}, and downloading "
            f"and reading it failed ({error})"
        ) from error


@contextlib.contextmanager
def _undone_if_it_fails(root, data_set):
    """Remove what a download has left, if it fails: half a file, or a directory that would pass for the data set."""
    own = root / Path(data_set.places[0]).parts[0]
    before = {*root.iterdir(), *own.rglob("*")}
    try:
        yield
    except ImportError:  # all files are there, and what reads them is not installed
        raise
    except BaseException:
        for path in {*root.iterdir(), *own.rglob("*")} - before:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        raise
