"""Data sets, transforms and loaders: every image once, the same randomness on any number of processes and workers."""

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

from datasets import SOURCES, Digits, build_dataset
from distributed.stop_coordinator import StopCoordinator
from fabricate import FABRICATE, number_of
from input_pipeline.bad_images import BadImages, BadTestImages
from input_pipeline.loader import eval_loader, train_loader
from input_pipeline.placement import build_pipeline
from input_pipeline.samplers import EvalSampler, TrainBatchSampler
from input_pipeline.transforms import build_transform
from training.options import parse_args
from utils import seed_everything
from weight_selection.errors import InputError

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


def options(text, data_path=None):
    return parse_args([*text.split(), *(["--data_path", str(data_path)] if data_path else []), "--device", "cpu"])


# ---------------------------------------------------------------------------------------------------------
# Which images a step sees


def epoch_of_steps(world_size, update_freq, epoch=0, seed=0):
    """For each step of an epoch of 50 images, the micro-batches of 4 that all processes see in it, in order."""
    processes = [TrainBatchSampler(50, 4, 6, update_freq, rank, world_size, seed) for rank in range(world_size)]
    for batches in processes:
        batches.set_position(epoch, 0)
        assert len(batches) == 6 * update_freq
    shares = [list(batches) for batches in processes]
    rounds = [list(micro_batches) for micro_batches in zip(*shares, strict=True)]
    return [sum(rounds[step * update_freq : (step + 1) * update_freq], []) for step in range(6)]


def test_a_step_sees_the_same_images_in_one_process_and_in_two():
    alone = epoch_of_steps(world_size=1, update_freq=2, epoch=3)
    shared = epoch_of_steps(world_size=2, update_freq=1, epoch=3)
    assert alone == shared
    items = [item for step in shared for micro_batch in step for item in micro_batch]
    assert len(items) == len(set(items)) == 48, "no image twice in an epoch; the last 2 fill no batch"
    assert {epoch for _, epoch in items} == {3}
    assert {index for index, _ in items} <= set(range(50))


def test_order_depends_on_epoch_and_seed_and_on_nothing_else():
    def order(epoch, seed):
        steps = epoch_of_steps(1, 2, epoch, seed)
        return tuple(index for step in steps for micro_batch in step for index, _ in micro_batch)

    assert len({order(epoch, seed) for epoch in range(3) for seed in range(3)}) == 9
    np.random.seed(1)  # the global generator has no say
    assert order(2, 1) == order(2, 1)
    left_out = [set(range(50)) - set(order(epoch, 0)) for epoch in range(4)]
    assert len(set.intersection(*left_out)) == 0, "images that wait in one epoch have their turn in another"


def test_augmentation_of_an_image_depends_on_no_worker(image_folder):
    args = options("--data_set image_folder --input_size 16 --num_workers 0", image_folder)
    dataset, _ = build_dataset(args, train=True)
    pipeline = build_pipeline(args, train=True)

    def epoch_of_images(workers, epoch):
        batches = TrainBatchSampler(len(dataset), 6, 4, 1, rank=0, world_size=1, seed=5)
        batches.set_position(epoch, 0)
        order = [index for batch in batches for index, _ in batch]
        torch.manual_seed(workers)
        loader = train_loader(
            dataset, pipeline, batches, args.replace(num_workers=workers), CPU, BadImages(0, StopCoordinator(1))
        )
        images, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))
        assert labels.tolist() == [dataset.samples[index][1] for index in order]
        return dict(zip(order, images, strict=True))

    here, elsewhere, later = epoch_of_images(0, 0), epoch_of_images(2, 0), epoch_of_images(0, 1)
    assert here.keys() == elsewhere.keys()
    assert all(torch.equal(here[index], elsewhere[index]) for index in here)
    both = here.keys() & later.keys()
    assert not any(torch.equal(here[index], later[index]) for index in both), "every epoch augments anew"


@pytest.mark.parametrize(("images", "world_size"), [(13, 2), (10, 4), (8, 2), (3, 4), (7, 1)])
def test_processes_share_test_images_out_without_duplicates(images, world_size):
    args = options("--data_set digits --num_workers 0 --batch_size 2")
    dataset = [(torch.zeros(8, 8, 3, dtype=torch.uint8), index) for index in range(images)]
    pipeline = build_pipeline(args, train=False)
    samplers = [EvalSampler(images, rank, world_size) for rank in range(world_size)]
    bad = BadTestImages(StopCoordinator(1))
    shards = [eval_loader(dataset, pipeline, sampler, args, CPU, bad) for sampler in samplers]
    seen = [[index for _, labels in shard for index in labels.tolist()] for shard in shards]
    assert sorted(sum(seen, [])) == list(range(images))
    assert max(map(len, seen)) - min(map(len, seen)) <= 1, "fair shares"


# ---------------------------------------------------------------------------------------------------------
# Transforms


def evaluated(size, extra=""):
    """An image 512 wide and 256 high after the test transform, as pixels: red runs 0..255 from left to right, green
    from top to bottom."""
    columns, rows = np.meshgrid(np.arange(512) / 2, np.arange(256))
    image = Image.fromarray(np.stack([columns, rows, 0 * rows], axis=2).astype(np.uint8))
    args = options(f"--data_set digits --input_size {size} {extra}")
    tensor = build_transform(args, train=False)(image)
    assert tensor.shape == (3, size, size)
    return tensor


def unnormalised(tensor, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)):
    return 255 * (tensor * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None])


def test_evaluation_resizes_to_256_and_crops_the_centre():
    pixels = unnormalised(evaluated(224))
    assert pixels[0, 0, [0, -1]].tolist() == pytest.approx([144 / 2, 367 / 2], abs=1), "columns 144 to 367 of 512"
    assert pixels[1, [0, -1], 0].tolist() == pytest.approx([16, 239], abs=1), "rows 16 to 239 of 256"


def test_evaluation_at_384_squashes_the_whole_image():
    pixels = unnormalised(evaluated(384))
    assert pixels[0, 0, [0, -1]].tolist() == pytest.approx([0, 255], abs=1.5)
    assert pixels[1, [0, -1], 0].tolist() == pytest.approx([0, 255], abs=1.5)


def test_evaluation_crops_what_it_is_told_to():
    pixels = unnormalised(evaluated(128, "--crop_pct 0.5"))
    assert pixels[1, [0, -1], 0].tolist() == pytest.approx([64, 191], abs=1)


def test_inception_mean_and_deviation_on_request():
    pixels = unnormalised(evaluated(224, "--imagenet_default_mean_and_std false"), mean=[0.5] * 3, std=[0.5] * 3)
    assert torch.allclose(pixels, unnormalised(evaluated(224)), atol=1e-3)


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


DOWNLOADED = [name for name, source in SOURCES.items() if source.images is not None]
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
            monkeypatch.setitem(SOURCES, name, replace(SOURCES[name], images=(len(train), len(test))))
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
    assert SOURCES[name].layout in message
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
    monkeypatch.setitem(SOURCES, name, replace(SOURCES[name], images=(found, found)))
    build_dataset(args, train)
    assert "warning" not in capsys.readouterr().out
    monkeypatch.setitem(SOURCES, name, replace(SOURCES[name], images=(12_345, 12_345)))
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
    assert SOURCES[name].layout in str(caught.value)


@pytest.mark.parametrize("name", DOWNLOADED)
def test_installation_guide_has_the_counts_of_the_code(name):
    (row,) = [row for row in (ROOT / "INSTALL.md").read_text().splitlines() if row.startswith(f"| `{name}` |")]
    train, test = SOURCES[name].images
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


def test_eval_data_path_names_the_test_folders_themselves(folders):
    args = options(f"--data_set image_folder --eval_data_path {folders}/val", folders / "train")
    assert [len(build_dataset(args, train)[0]) for train in (True, False)] == [48, 13]


@pytest.mark.parametrize("part", ["train", "val"])
def test_missing_folder_names_the_layout(folders, part):
    shutil.rmtree(folders / part)
    with pytest.raises(InputError, match=f"--data_path.*{folders}/{part}.*train/CLASS/IMAGE and val/CLASS/IMAGE"):
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


def test_strongest_augmentation_posterizes_to_black():
    # Level 10 keeps no bits. Pillow once gave a black image for that, and later an error in the middle of a run.
    args = parse_args(["--data_set", "digits", "--aa", "rand-m10-inc1", "--reprob", "0", "--input_size", "8"])
    transform = build_transform(args, train=True)
    (augment,) = [step for step in transform.transforms if hasattr(step, "ops")]
    image = Image.new("RGB", (8, 8), (200, 100, 50))
    images = [operation.aug_fn(image, 0) for operation in augment.ops if operation.name == "PosterizeIncreasing"]
    assert [image.getextrema() for image in images] == [((0, 0),) * 3]
    for seed in range(100):
        seed_everything(seed)
        assert transform(image).isfinite().all()
