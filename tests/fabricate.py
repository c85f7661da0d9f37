"""Tiny copies of the data sets, laid out as the real ones are.

Each function fills a directory for ``--data_path`` and returns what is in it: a list for training and one for testing
of (number, label), in the order of the data set. The number is an image's only content: see ``picture`` and
``number_of``.
"""

import json
import pickle

import numpy as np
import scipy.io
from PIL import Image

STEP = 16  # between colours: JPEG changes a plain one by a few levels


def picture(number, side=8):
    """A plain image (side, side, 3) whose colour tells its number, which is less than 256."""
    return np.full((side, side, 3), [number % STEP * STEP + 8, number // STEP * STEP + 8, 99], np.uint8)


def number_of(pixels):
    """The number of a plain image of shape (3, height, width)."""
    red, green, blue = (round(float(channel.mean())) for channel in pixels)
    assert abs(blue - 99) < 5, "not RGB"
    return red // STEP + green // STEP * STEP


def save(number, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(number)).save(path)


def planes(images, side):
    """The images' pixels as CIFAR and STL-10 keep them, one channel after another."""
    return np.stack([picture(number, side) for number, _ in images]).transpose(0, 3, 1, 2)


def cifar(base, files, labels):
    """One pickle for each of ``files``, a mapping to the images in it."""
    base.mkdir()
    for name, images in files.items():
        content = {"data": planes(images, 32).reshape(len(images), -1), labels: [label for _, label in images]}
        if labels == "fine_labels":
            content["coarse_labels"] = [0] * len(images)
        (base / name).write_bytes(pickle.dumps(content))


def cifar10(root):
    train = [(number, label) for number, label in enumerate([3, 0, 9, 9, 1, 5])]
    test = [(6, 9), (7, 0)]
    parts = [train[:1], train[1:2], train[2:3], train[3:4], train[4:]]
    batches = {f"data_batch_{number}": part for number, part in enumerate(parts, 1)}
    cifar(root / "cifar-10-batches-py", {**batches, "test_batch": test}, "labels")
    meta = {"label_names": [f"class {label}" for label in range(10)]}
    (root / "cifar-10-batches-py" / "batches.meta").write_bytes(pickle.dumps(meta))
    return train, test


def cifar100(root, train=((0, 99), (1, 0), (2, 7), (3, 7)), test=((4, 42), (5, 99))):
    train, test = list(train), list(test)
    cifar(root / "cifar-100-python", {"train": train, "test": test}, "fine_labels")
    meta = {"fine_label_names": [f"class {label}" for label in range(100)]}
    (root / "cifar-100-python" / "meta").write_bytes(pickle.dumps(meta))
    return train, test


def pets(root):
    base = root / "oxford-iiit-pet"
    names = {0: "Abyssinian", 12: "beagle", 36: "yorkshire_terrier"}
    parts = {"trainval": [(0, 0), (1, 36), (2, 12), (3, 36)], "test": [(4, 12), (5, 0), (6, 36)]}
    (base / "annotations").mkdir(parents=True)
    for part, images in parts.items():
        rows = []
        for number, label in images:
            save(number, base / "images" / f"{names[label]}_{number}.jpg")
            rows.append(f"{names[label]}_{number} {label + 1} 1 1\n")  # classes from 1, cat or dog, breed within it
        (base / "annotations" / f"{part}.txt").write_text("".join(rows))
    save(7, base / "images" / "Abyssinian_7.jpg")  # the real one also has images that no list names
    return parts["trainval"], parts["test"]


def flowers(root):
    base = root / "flowers-102"
    splits = {"trnid": [2, 9, 4], "valid": [7, 1], "tstid": [3, 5, 6, 8]}
    for number in range(1, 10):
        save(number, base / "jpg" / f"image_{number:05}.jpg")
    scipy.io.savemat(base / "setid.mat", {key: np.array([ids], np.uint16) for key, ids in splits.items()})
    labels = np.array([[1, *range(95, 103)]], np.uint8)  # of images 1 to 9; classes from 1
    scipy.io.savemat(base / "imagelabels.mat", {"labels": labels})
    images = {part: [(number, int(labels[0, number - 1]) - 1) for number in ids] for part, ids in splits.items()}
    return images["trnid"] + images["valid"], images["tstid"]


def stl10(root):
    base = root / "stl10_binary"
    base.mkdir()
    parts = {"train": [(0, 9), (1, 0), (2, 4)], "test": [(3, 0), (4, 9)]}
    for part, images in parts.items():
        planes(images, 96).transpose(0, 1, 3, 2).tofile(base / f"{part}_X.bin")  # column by column
        np.array([label + 1 for _, label in images], np.uint8).tofile(base / f"{part}_y.bin")
    planes([(5, None)], 96).tofile(base / "unlabeled_X.bin")
    (base / "class_names.txt").write_text("".join(f"class {label}\n" for label in range(10)))
    (base / "fold_indices.txt").write_text("0 1 \n" * 10)
    return parts["train"], parts["test"]


def food101(root):
    base = root / "food-101"
    names = ["apple_pie", "beignets", "waffles"]
    parts = {"train": [(0, 0), (1, 0), (2, 1), (3, 1), (4, 2), (5, 2)], "test": [(6, 0), (7, 1), (8, 2)]}
    (base / "meta").mkdir(parents=True)
    for part, images in parts.items():
        listed = {name: [] for name in names}
        for number, label in images:
            listed[names[label]].append(f"{names[label]}/{100500 + number}")
            save(number, base / "images" / f"{listed[names[label]][-1]}.jpg")
        (base / "meta" / f"{part}.json").write_text(json.dumps(listed))
    return parts["train"], parts["test"]


def dtd(root):
    base = root / "dtd" / "dtd"
    names = ["banded", "polka-dotted", "zigzagged"]
    parts = {
        "train": [(0, 0), (1, 1), (2, 2)],
        "val": [(3, 0), (4, 1), (5, 2)],
        "test": [(6, 0), (7, 1), (8, 2)],
    }
    (base / "labels").mkdir(parents=True)
    images = [image for part in parts.values() for image in part]
    files = {number: f"{names[label]}/{names[label]}_{number:04}.jpg" for number, label in images}
    for number, file in files.items():
        save(number, base / "images" / file)
    for partition in range(1, 11):  # only the first counts; the others have the parts in another order
        order = dict(zip(parts, parts.values() if partition == 1 else reversed(parts.values()), strict=True))
        for part, listed in order.items():
            rows = [f"{files[number]}\n" for number, _ in listed]
            (base / "labels" / f"{part}{partition}.txt").write_text("".join(rows))
    return parts["train"] + parts["val"], parts["test"]


def svhn(root):
    parts = {"train": [(0, 1), (1, 0), (2, 9), (3, 5)], "test": [(4, 0), (5, 9), (6, 2)]}
    for part, images in parts.items():
        pixels = np.stack([picture(number, 32) for number, _ in images], axis=3)
        digits = np.array([[label or 10] for _, label in images], np.uint8)  # the digit 0 is the last of ten
        scipy.io.savemat(root / f"{part}_32x32.mat", {"X": pixels, "y": digits})
    return parts["train"], parts["test"]


def eurosat(root):
    names = (
        *("AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial"),
        *("Pasture", "PermanentCrop", "Residential", "River", "SeaLake"),
    )
    train, test = [], []
    for label, name in enumerate(names):
        for number in sorted(range(1, 16), key=str):  # the order of file names: 1, 10, 11, ..., 15, 2, 3, ...
            image = 15 * label + number
            save(image, root / "eurosat" / "2750" / name / f"{name}_{number}.jpg")
            (test if number in (5, 10, 15) else train).append((image, label))
    return train, test


def imagenet(root):
    names = ["n01440764", "n02102040", "n15075141"]
    train = [(2 * label + number, label) for label in range(3) for number in range(2)]
    test = [(6 + label, label) for label in range(3)]
    for number, label in train:
        save(number, root / "train" / names[label] / f"{names[label]}_{number}.JPEG")
    for number, label in test:
        save(number, root / "val" / names[label] / f"ILSVRC2012_val_{number:08}.JPEG")
    return train, test


FABRICATE = {
    "CIFAR10": cifar10,
    "CIFAR100": cifar100,
    "pets": pets,
    "flowers": flowers,
    "stl10": stl10,
    "food101": food101,
    "dtd": dtd,
    "svhn": svhn,
    "eurosat": eurosat,
    "IMNET": imagenet,
}
