"""The data sets: every image once, with its label, and one line about files that are missing or damaged."""

import shutil
import sys
from dataclasses import replace
from http.client import IncompleteRead
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import sklearn.datasets
import torch
import torchvision.datasets as tv
from PIL import Image

from datasets import DATA_SETS, Digits, build_dataset, find_data
from fabricate import FABRICATE, number_of
from training.options import parse_args, share_batch
from training.setup import complete_options, open_data
from weight_selection.errors import InputError

ROOT = Path(__file__).parents[1]


def options(text, data_path=None):
    return parse_args([*text.split(), *(["--data_path", str(data_path)] if data_path else []), "--device", "cpu"])


# ---------------------------------------------------------------------------------------------------------
# Data sets


def test_digits_split_keeps_all_images_and_their_labels():
    train, test = Digits(True, np.asarray), Digits(False, np.asarray)
    assert (len(train), len(test)) == (1000, 797)
    expected, labels = sklearn.datasets.load_digits(return_X_y=True)
    images = np.stack([image for part in (train, test) for image, _ in (part[i] for i in range(len(part)))])
    assert images.shape == (1797, 8, 8, 3)
    assert (images == images[..., :1]).all(), "grey"
    assert np.abs(images[..., 0].reshape(1797, 64) / 255 - expected / 16).max() < 0.5 / 255 + 1e-9
    assert train.targets + test.targets == labels.tolist()


DOWNLOADED = [name for name, data_set in DATA_SETS.items() if data_set.images is not None]
LISTED = {  # a file whose absence or damage torchvision does not notice, and one that lists the images
    "pets": ("oxford-iiit-pet/images/Abyssinian_0.jpg", "oxford-iiit-pet/annotations/trainval.txt"),
    "flowers": ("flowers-102/jpg/image_00002.jpg", None),
    "food101": ("food-101/images/apple_pie/100500.jpg", "food-101/meta/train.json"),
    "dtd": ("dtd/dtd/images/banded/banded_0003.jpg", "dtd/dtd/labels/val1.txt"),
}


@pytest.fixture
def offline(monkeypatch):
    def no_network(*args, **kwargs):
        raise URLError("Name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", no_network)


@pytest.fixture
def fabricate(monkeypatch, offline):
    """``fabricate(name, root)`` makes a tiny copy of a data set that counts as complete."""

    def make(name, root):
        root.mkdir(exist_ok=True)
        train, test = FABRICATE[name](root)
        if name in DOWNLOADED:
            monkeypatch.setitem(DATA_SETS, name, replace(DATA_SETS[name], images=(len(train), len(test))))
        for module in (tv.cifar, tv.stl10, tv.svhn, tv.flowers102):  # without the real files' check sums
            monkeypatch.setattr(module, "check_integrity", lambda path, md5=None: Path(path).is_file())
        return train, test

    return make


def read(name, root):
    """(number, label) of all training and of all test images, and the number of classes."""
    parts = []
    for train in (True, False):
        dataset, classes = build_dataset(options(f"--data_set {name}", root), train)
        images = [dataset[index] for index in range(len(dataset))]
        assert {type(label) for _, label in images} == {int}
        assert {(image.dtype, image.shape[2]) for image, _ in images} == {(torch.uint8, 3)}
        parts.append([(number_of(image.permute(2, 0, 1).float()), label) for image, label in images])
    return *parts, classes


def refusal(name, root, train=True):
    """The message for a data set that cannot be read; it is one line and names option, value and layout."""
    with pytest.raises(InputError) as caught:
        build_dataset(options(f"--data_set {name}", root), train)
    message = str(caught.value)
    assert "\n" not in message
    assert f"--data_path {root}" in message or f"--data_path: no directory {root}" in message
    assert DATA_SETS[name].layout in message
    return message


@pytest.mark.parametrize(
    ("name", "classes"),
    [
        *[("CIFAR10", 10), ("CIFAR100", 100), ("pets", 37), ("flowers", 102), ("stl10", 10)],
        *[("food101", 101), ("dtd", 47), ("svhn", 10), ("eurosat", 10), ("IMNET", 3)],
    ],
)
def test_every_image_with_its_label_in_one_part(tmp_path, fabricate, name, classes):
    expected = fabricate(name, tmp_path)
    train, test, found = read(name, tmp_path)
    assert (train, test) == expected
    assert found == classes
    assert not {number for number, _ in train} & {number for number, _ in test}
    assert {label for _, label in train + test} <= set(range(classes))


@pytest.mark.parametrize("name", ["pets", "flowers", "food101", "dtd", "eurosat", "IMNET"])
@pytest.mark.parametrize("mode", ["L", "P", "RGBA"])
def test_files_in_other_modes_become_rgb(tmp_path, fabricate, name, mode):
    fabricate(name, tmp_path)
    for file in (file for file in tmp_path.rglob("*") if file.suffix.lower() in (".jpg", ".jpeg")):
        Image.open(file).convert(mode).save(file, "JPEG" if mode == "L" else "PNG")
    args = options(f"--data_set {name}", tmp_path)
    images = [build_dataset(args, train)[0][0][0] for train in (True, False)]
    assert {(image.dtype, image.shape[2]) for image in images} == {(torch.uint8, 3)}


@pytest.mark.parametrize("name", FABRICATE)
@pytest.mark.parametrize("train", [True, False])
def test_absent_data_set_names_its_layout(tmp_path, offline, name, train):
    message = refusal(name, tmp_path, train)
    assert name in message
    if name in DOWNLOADED:
        assert "Name or service not known" in message


def test_download_that_breaks_off_is_no_traceback(tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise IncompleteRead(b"", 1000)

    monkeypatch.setattr("urllib.request.urlopen", broken)
    assert "1000 more expected" in refusal("pets", tmp_path)


@pytest.mark.parametrize("name", DOWNLOADED)
def test_absent_data_set_is_downloaded(tmp_path, fabricate, monkeypatch, name):
    expected = fabricate(name, tmp_path / "server")

    def download(*args, **kwargs):
        shutil.copytree(tmp_path / "server", tmp_path / "here", dirs_exist_ok=True)

    for module in (tv.cifar, tv.oxford_iiit_pet, tv.flowers102, tv.stl10, tv.food101, tv.dtd, tv.svhn, tv.eurosat):
        for function in ("download_and_extract_archive", "download_url"):
            monkeypatch.setattr(module, function, download, raising=False)
    (tmp_path / "here").mkdir()
    assert read(name, tmp_path / "here")[:2] == expected


@pytest.mark.parametrize("name", DOWNLOADED)
@pytest.mark.parametrize("train", [True, False])
def test_other_numbers_of_images_than_published_are_warned_about(tmp_path, fabricate, monkeypatch, capsys, name, train):
    found = len(fabricate(name, tmp_path)[not train])
    args = options(f"--data_set {name}", tmp_path)
    monkeypatch.setitem(DATA_SETS, name, replace(DATA_SETS[name], images=(found, found)))
    build_dataset(args, train)
    assert "warning" not in capsys.readouterr().out
    monkeypatch.setitem(DATA_SETS, name, replace(DATA_SETS[name], images=(12_345, 12_345)))
    build_dataset(args, train)
    part = "training" if train else "test"
    assert f"warning: --data_path {tmp_path}: {found} {part} images of {name}, not 12,345" in capsys.readouterr().out


@pytest.mark.parametrize("name", LISTED)
def test_listed_image_that_is_missing_is_named(tmp_path, fabricate, name):
    images = len(fabricate(name, tmp_path)[0])
    missing = tmp_path / LISTED[name][0]
    missing.unlink()
    message = refusal(name, tmp_path)
    assert f"1 of {images} images are missing, such as {missing}" in message
    assert "remove it to have it downloaded" in message


@pytest.mark.parametrize("name", LISTED)
def test_folder_of_listed_images_that_is_missing_is_no_traceback(tmp_path, fabricate, name):
    fabricate(name, tmp_path)
    shutil.rmtree((tmp_path / LISTED[name][0]).parent)
    refusal(name, tmp_path)


@pytest.mark.parametrize("name", [name for name, (_, file) in LISTED.items() if file])
def test_list_that_is_missing_or_cut_off_is_no_traceback(tmp_path, fabricate, name):
    fabricate(name, tmp_path)
    file = tmp_path / LISTED[name][1]
    file.write_text(file.read_text()[:-3])
    refusal(name, tmp_path)
    file.unlink()
    assert file.name in refusal(name, tmp_path)


def test_eurosat_with_odd_names_or_no_images_is_no_traceback(tmp_path, fabricate):
    fabricate("eurosat", tmp_path)
    images = tmp_path / "eurosat" / "2750"
    (images / "Forest" / "Forest_8.jpg").rename(images / "Forest" / "copy.jpg")
    assert "copy" in refusal("eurosat", tmp_path)
    shutil.rmtree(images)
    images.mkdir()
    assert "class folder" in refusal("eurosat", tmp_path)


@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR100", "flowers", "stl10", "svhn"])
def test_files_that_fail_their_check_sum_are_not_read(tmp_path, offline, name):
    FABRICATE[name](tmp_path)
    assert "holds no complete" in refusal(name, tmp_path)


@pytest.mark.parametrize("name", ["flowers", "svhn"])
def test_missing_scipy_is_named(tmp_path, fabricate, monkeypatch, name):
    fabricate(name, tmp_path)
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    assert "scipy" in refusal(name, tmp_path)


def test_directory_that_does_not_exist_is_not_downloaded_into(tmp_path):
    assert "no such directory" in refusal("CIFAR100", tmp_path / "none")


@pytest.mark.parametrize("name", [*FABRICATE, "image_folder"])
def test_data_path_is_asked_for_with_the_layout_it_must_have(name):
    with pytest.raises(InputError, match="--data_path is missing") as caught:
        build_dataset(options(f"--data_set {name}"), train=True)
    assert DATA_SETS[name].layout in str(caught.value)


@pytest.mark.parametrize("name", DOWNLOADED)
def test_installation_guide_has_the_counts_of_the_code(name):
    (row,) = [row for row in (ROOT / "INSTALL.md").read_text().splitlines() if row.startswith(f"| `{name}` |")]
    train, test = DATA_SETS[name].images
    assert f"| {train:,} / {test:,} |" in row


# ---------------------------------------------------------------------------------------------------------
# Class folders


@pytest.fixture
def folders(image_folder, tmp_path):
    """A copy of the class folders that a test may spoil."""
    return shutil.copytree(image_folder, tmp_path / "copy")


def build_both(*args):
    return [build_dataset(options("--data_set image_folder", *args), train) for train in (True, False)]


def test_class_folders_are_classes_in_alphabetical_order(folders):
    (train, classes), (test, test_classes) = build_both(folders)
    assert classes == test_classes == 3
    assert train.classes == test.classes == ["blue", "green", "red"]
    for dataset in (train, test):
        assert {Path(path).parent.name: label for path, label in dataset.samples} == {"blue": 0, "green": 1, "red": 2}
    assert (len(train), len(test)) == (48, 13)


def test_files_that_are_not_named_like_images_are_left_out_and_said(folders, capsys):
    for name in ("train/blue/moving.gif", "val/red/phone.heic"):
        (folders / name).touch()
    given = options("--data_set image_folder --model vit_tiny --total_batch_size 8", folders)
    data = open_data(complete_options(share_batch(given, 1), 0))
    assert (len(data.train_set), len(data.test_set)) == (48, 13)
    said = f"--data_path {folders}: 2 files are left out, such as {folders}/train/blue/moving.gif; images end with .jpg"
    assert said in capsys.readouterr().out


def test_eval_data_path_names_the_test_folders_themselves(folders):
    args = options(f"--data_set image_folder --eval_data_path {folders}/val", folders / "train")
    assert [len(build_dataset(args, train)[0]) for train in (True, False)] == [48, 13]


@pytest.mark.parametrize("part", ["train", "val"])
def test_missing_folder_names_the_layout(folders, part):
    shutil.rmtree(folders / part)
    with pytest.raises(InputError, match=f"--data_path.*{folders}/{part}.*train/CLASS/IMAGE and val/CLASS/IMAGE"):
        build_both(folders)


def test_eval_data_path_that_is_not_there_is_named(folders):
    args = options(f"--data_set image_folder --eval_data_path {folders}/test", folders / "train")
    with pytest.raises(InputError, match=f"^--eval_data_path {folders}/test: no such directory"):
        build_dataset(args, train=False)
    args = options(f"--data_set image_folder --eval_data_path {folders}/val", folders / "training")
    with pytest.raises(InputError, match=f"^--data_path {folders}/training: no such directory"):
        build_dataset(args, train=True)


def test_classes_of_eval_data_path_that_do_not_fit_are_refused_by_its_name(folders):
    args = options(f"--data_set image_folder --eval_data_path {folders}/val", folders / "train")
    for path in (folders / "val" / "green").iterdir():
        path.unlink()
    with pytest.raises(InputError, match=f"^--eval_data_path: {folders}/val must hold class folders"):
        build_dataset(args, train=False)
    (folders / "val" / "green").rmdir()
    with pytest.raises(InputError, match=f"^--eval_data_path {folders}/val: class folder green is in only one"):
        build_dataset(args, train=False)


def test_a_single_class_folder_is_refused(folders):
    for part in ("train", "val"):
        for name in ("green", "red"):
            shutil.rmtree(folders / part / name)
    with pytest.raises(InputError, match=f"{folders}/train has one class folder only, blue"):
        build_both(folders)


@pytest.mark.parametrize("part", ["train", "val"])
def test_class_that_only_one_part_has_is_named(folders, part):
    shutil.rmtree(folders / part / "green")
    with pytest.raises(InputError, match=f"--data_path {folders}: class folder green is in only one"):
        build_both(folders)


@pytest.mark.parametrize("part", ["train", "val"])
def test_empty_class_folder_is_named(folders, part):
    for image in (folders / part / "red").iterdir():
        image.unlink()
    with pytest.raises(InputError, match=f"--data_path.*{folders}/{part}.*red"):
        build_both(folders)


# ---------------------------------------------------------------------------------------------------------
# --data_path one level off, and downloads that fail


def found(name, path):
    said = []
    return find_data(options(f"--data_set {name}", path), said.append).data_path, said


@pytest.mark.parametrize("name", FABRICATE)
def test_data_set_a_level_higher_or_deeper_is_found(tmp_path, name):
    root = tmp_path / "data"
    root.mkdir()
    FABRICATE[name](root)
    assert found(name, root) == (str(root), [])
    own = root / DATA_SETS[name].places[0]
    off = [tmp_path, *(path for path in (own, own.parent) if path.is_dir() and path != root)]
    assert len(off) == {"svhn": 1, "dtd": 3, "eurosat": 3}.get(name, 2)
    for path in off:
        said = f"--data_path {path}: {name} is in {root}, which is read"
        assert found(name, path) == (str(root), [said])


def test_data_set_in_two_places_or_above_a_directory_that_is_not_there_is_named(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name / "cifar-10-batches-py").mkdir(parents=True)
    with pytest.raises(InputError, match=f"CIFAR10 is in {tmp_path}/a and in {tmp_path}/b; name one of them"):
        found("CIFAR10", tmp_path)
    with pytest.raises(InputError, match=f"^--data_path .*/a/CIFAR: no such directory; CIFAR10 is in {tmp_path}/a$"):
        found("CIFAR10", tmp_path / "a" / "CIFAR")
    assert found("CIFAR100", tmp_path) == (str(tmp_path), []), "it is downloaded there"
    (tmp_path / "train").mkdir()
    (tmp_path / "val").mkdir()
    assert found("image_folder", tmp_path / "a") == (str(tmp_path / "a"), []), "other class folders are another set"


@pytest.mark.parametrize("error", [URLError("no route"), KeyboardInterrupt()])
def test_download_that_fails_leaves_nothing_behind(tmp_path, monkeypatch, error):
    def download(url, root, filename=None, **kwargs):
        (Path(root) / "half.tar.gz").write_text("half")
        (Path(root) / "flowers-102" / "jpg").mkdir(parents=True)
        raise error

    monkeypatch.setattr(tv.flowers102, "download_and_extract_archive", download)
    (tmp_path / "flowers-102").mkdir()
    (tmp_path / "flowers-102" / "setid.mat").write_text("mine")
    with pytest.raises((InputError, KeyboardInterrupt)):
        build_dataset(options("--data_set flowers", tmp_path), train=True)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["flowers-102", "setid.mat"]
