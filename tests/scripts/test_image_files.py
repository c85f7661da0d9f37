"""Images as files: CIFAR-100 as class folders, and a draw of training images to calibrate with."""

from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torchvision.datasets.cifar
from PIL import Image

import calibration_images
import cifar100_folders
from fabricate import cifar100, number_of

# ---------------------------------------------------------------------------------------------------------
# cifar100_folders.py

TRAIN = [(number, number * 7 % 100) for number in range(200)]  # two of each class
TEST = [(number, number % 100) for number in range(200, 256)]


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Directory of a small CIFAR-100 that counts as complete, without a network."""

    def no_network(*args, **kwargs):
        raise URLError("Name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda path, md5: Path(path).is_file())
    (tmp_path / "data").mkdir()
    cifar100(tmp_path / "data", TRAIN, TEST)
    return tmp_path / "data"


def folders(directory):
    """[(class, name of the file, number of the image)] below a directory."""
    return sorted(
        (path.parent.name, path.name, number_of(np.asarray(Image.open(path)).transpose(2, 0, 1)))
        for path in directory.glob("*/*")
    )


def expected(images, per_class):
    kept = {label: [number for number, its in images if its == label][:per_class] for label in range(100)}
    return sorted((f"class {label}", f"{n:03}.png", number) for label in kept for n, number in enumerate(kept[label]))


@pytest.mark.parametrize(("option", "per_class"), [((), 2), (("--train", 1), 1), (("--train", 2), 2)])
def test_the_first_images_of_each_class_train_and_all_test(data, tmp_path, cli, capsys, option, per_class):
    out = tmp_path / "folders"
    assert cli(cifar100_folders.main, data, out, *option) is None
    assert capsys.readouterr().out == f"{out}: {100 * per_class} training and 56 test images of 100 classes\n"
    assert folders(out / "train") == expected(TRAIN, per_class)
    assert folders(out / "val") == expected(TEST, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "folders"]
    assert out.stat().st_mode & 0o777 == (tmp_path / "data").stat().st_mode & 0o777  # for others to read


def test_only_some_classes(data, tmp_path, cli, capsys):
    out = tmp_path / "out"
    assert cli(cifar100_folders.main, data, out, "--classes", 7, 10) is None
    assert capsys.readouterr().out == f"{out}: 6 training and 3 test images of 3 classes\n"
    for part in ("train", "val"):
        assert sorted(path.name for path in (out / part).iterdir()) == ["class 7", "class 8", "class 9"]
    for wrong in ((5, 5), (-1, 3), (0, 101)):
        assert cli(cifar100_folders.main, data, tmp_path / "none", "--classes", *wrong).startswith("--classes ")


def test_folders_are_written_whole_or_not_at_all(data, tmp_path, cli, monkeypatch):
    out = tmp_path / "out"
    assert cli(cifar100_folders.main, data, out, "--train", 3) == "--train 3: a class has only 2 training images"
    assert "--train 0: " in cli(cifar100_folders.main, data, out, "--train", 0)
    assert "no such directory" in cli(cifar100_folders.main, tmp_path / "none", out)
    assert "OUT" in cli(cifar100_folders.main, data, data) and folders(data / "train") == []
    (tmp_path / "empty").mkdir()
    assert "cannot be downloaded" in cli(cifar100_folders.main, tmp_path / "empty", out)

    def full_disk(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full_disk)
    assert cli(cifar100_folders.main, data, out) == f"OUT {out}: cannot be written (No space left on device)"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "empty"]


# ---------------------------------------------------------------------------------------------------------
# calibration_images.py


def test_calibration_images_are_a_draw_of_the_training_images(data, tmp_path, cli, capsys):
    out = tmp_path / "out"
    assert cli(calibration_images.main, "CIFAR100", data, out, "--count", 20) is None
    assert capsys.readouterr().out == f"{out}: 20 of 200 training images of CIFAR100\n"
    found = [(int(p.stem), number_of(np.asarray(Image.open(p)).transpose(2, 0, 1))) for p in out.iterdir()]
    assert len(found) == 20 and all(index == number for index, number in found)
    assert cli(calibration_images.main, "CIFAR100", data, tmp_path / "other", "--count", 20, "--seed", 1) is None
    assert {path.name for path in out.iterdir()} != {path.name for path in (tmp_path / "other").iterdir()}


def test_calibration_images_are_written_whole_or_not_at_all(data, tmp_path, cli, monkeypatch):
    out = tmp_path / "out"
    assert (
        cli(calibration_images.main, "CIFAR100", data, data)
        == f"OUT {data}: exists; remove it or name another directory"
    )
    assert cli(calibration_images.main, "CIFAR100", data, out) == "--count 1024: give a number from 1 to 200"
    assert "no such directory" in cli(calibration_images.main, "CIFAR100", tmp_path / "none", out)
    (tmp_path / "empty").mkdir()
    assert "cannot read CIFAR100" in cli(calibration_images.main, "CIFAR100", tmp_path / "empty", out)

    def full_disk(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full_disk)
    said = cli(calibration_images.main, "CIFAR100", data, out, "--count", 2)
    assert said == f"OUT {out}: cannot be written (No space left on device)"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "empty"]
