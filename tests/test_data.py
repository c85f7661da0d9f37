"""Data sets, transforms and loaders: every image once, the same randomness on any number of processes and workers."""

import hashlib
import pickle
import shutil
from urllib.error import URLError

import numpy as np
import pytest
import scipy.io
import sklearn.datasets
import torch
import torchvision.datasets
from PIL import Image

from datasets import Digits, TrainBatches, build_dataset, build_transform, eval_loader, train_loader
from options import parse_args
from utils import InputError, seed_everything


def options(text, data_path=None):
    args = parse_args([*text.split(), *(["--data_path", str(data_path)] if data_path else [])])
    args.device = "cpu"
    return args


# ---------------------------------------------------------------------------------------------------------
# Which images a step sees


def epoch_of_steps(world_size, update_freq, epoch=0, seed=0):
    """For each step of an epoch of 50 images, the micro-batches of 4 that all processes see in it, in order."""
    processes = [TrainBatches(50, 4, 6, update_freq, rank, world_size, seed) for rank in range(world_size)]
    for batches in processes:
        batches.set_epoch(epoch)
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

    def epoch_of_images(workers, epoch):
        args.num_workers = workers
        batches = TrainBatches(len(dataset), 6, 4, 1, rank=0, world_size=1, seed=5)
        batches.set_epoch(epoch)
        order = [index for batch in batches for index, _ in batch]
        torch.manual_seed(workers)
        loaded = list(train_loader(dataset, batches, args))
        labels = torch.cat([labels for _, labels in loaded]).tolist()
        assert labels == [dataset.targets[index] for index in order]
        return dict(zip(order, torch.cat([images for images, _ in loaded]), strict=True))

    here, elsewhere, later = epoch_of_images(0, 0), epoch_of_images(2, 0), epoch_of_images(0, 1)
    assert here.keys() == elsewhere.keys()
    assert all(torch.equal(here[index], elsewhere[index]) for index in here)
    both = here.keys() & later.keys()
    assert not any(torch.equal(here[index], later[index]) for index in both), "every epoch augments anew"


@pytest.mark.parametrize(("images", "world_size"), [(13, 2), (10, 4), (8, 2), (3, 4), (7, 1)])
def test_processes_share_test_images_out_without_duplicates(images, world_size):
    args = options("--data_set digits --num_workers 0 --batch_size 2")
    dataset = [(index, 0) for index in range(images)]
    shards = [eval_loader(dataset, args, rank, world_size) for rank in range(world_size)]
    seen = [[index for indices, _ in shard for index in indices.tolist()] for shard in shards]
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


def test_flowers_trains_on_train_and_val_joined(tmp_path, monkeypatch):
    base = tmp_path / "flowers-102"
    (base / "jpg").mkdir(parents=True)
    splits = {"trnid": [2, 9, 4], "valid": [7, 1], "tstid": [3, 5, 6, 8]}
    for image in range(1, 10):
        Image.new("RGB", (8, 8), (20 * image, 0, 0)).save(base / "jpg" / f"image_{image:05}.jpg")
    scipy.io.savemat(base / "setid.mat", {key: np.array([ids], np.uint16) for key, ids in splits.items()})
    labels = np.arange(93, 102, dtype=np.uint8)  # of images 1 to 9; the file counts classes from 1
    scipy.io.savemat(base / "imagelabels.mat", {"labels": labels[None]})
    own_sums = {
        key: (name, hashlib.md5((base / name).read_bytes()).hexdigest() if key != "image" else None)
        for key, (name, _) in torchvision.datasets.Flowers102._file_dict.items()
    }
    monkeypatch.setattr(torchvision.datasets.Flowers102, "_file_dict", own_sums)

    args = options("--data_set flowers", tmp_path)
    train, classes = build_dataset(args, train=True)
    test, _ = build_dataset(args, train=False)
    assert classes == 102
    assert [train[i][1] for i in range(len(train))] == [image + 91 for image in (2, 9, 4, 7, 1)]
    assert [test[i][1] for i in range(len(test))] == [image + 91 for image in (3, 5, 6, 8)]


def test_cifar100_is_read_from_its_python_version(tmp_path, monkeypatch):
    base, cls = tmp_path / "cifar-100-python", torchvision.datasets.CIFAR100
    base.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (6, 3, 32, 32), dtype=np.uint8)
    files = {
        "train": {"data": pixels[:4].reshape(4, -1), "fine_labels": [99, 0, 7, 7], "coarse_labels": [1, 2, 3, 4]},
        "test": {"data": pixels[4:].reshape(2, -1), "fine_labels": [42, 5], "coarse_labels": [0, 1]},
        "meta": {"fine_label_names": [f"class {number}" for number in range(100)]},
    }
    sums = {}
    for name, content in files.items():
        (base / name).write_bytes(pickle.dumps(content))
        sums[name] = hashlib.md5((base / name).read_bytes()).hexdigest()
    monkeypatch.setattr(cls, "train_list", [["train", sums["train"]]])
    monkeypatch.setattr(cls, "test_list", [["test", sums["test"]]])
    monkeypatch.setattr(cls, "meta", cls.meta | {"md5": sums["meta"]})

    args = options("--data_set CIFAR100 --input_size 32 --crop_pct 1", tmp_path)
    train, classes = build_dataset(args, train=True)
    test, _ = build_dataset(args, train=False)
    assert (len(train), len(test), classes) == (4, 2, 100)
    assert [train.targets, test.targets] == [[99, 0, 7, 7], [42, 5]]
    assert torch.allclose(unnormalised(test[1][0]), torch.tensor(pixels[5]).float(), atol=1e-3)


@pytest.mark.parametrize(
    ("data_set", "layout"), [("CIFAR100", "cifar-100-python/"), ("CIFAR10", "cifar-10-batches-py/")]
)
def test_missing_cifar_that_cannot_be_downloaded_is_one_line(tmp_path, monkeypatch, data_set, layout):
    def no_network(*args, **kwargs):
        raise URLError("Name or service not known")

    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", no_network)
    with pytest.raises(InputError, match="Name or service not known") as caught:
        build_dataset(options(f"--data_set {data_set}", tmp_path), train=True)
    message = str(caught.value)
    assert f"--data_path {tmp_path}" in message
    assert layout in message
    assert "\n" not in message


def test_missing_flowers_that_cannot_be_downloaded_names_its_layout(tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise URLError("Name or service not known")

    monkeypatch.setattr(torchvision.datasets.flowers102, "download_and_extract_archive", no_network)
    with pytest.raises(InputError, match="flowers-102/ with jpg/, imagelabels.mat and setid.mat"):
        build_dataset(options("--data_set flowers", tmp_path), train=True)


def test_directory_that_does_not_exist_is_not_downloaded_into(tmp_path):
    with pytest.raises(InputError, match=f"--data_path {tmp_path}/none: no such directory.*cifar-100-python/"):
        build_dataset(options("--data_set CIFAR100", tmp_path / "none"), train=True)


@pytest.mark.parametrize("data_set", ["IMNET", "CIFAR100", "flowers", "image_folder"])
def test_data_path_is_asked_for_with_the_layout_it_must_have(data_set):
    layouts = {"CIFAR100": "cifar-100-python/", "flowers": "flowers-102/"}
    with pytest.raises(InputError, match=f"--data_path is missing.*{layouts.get(data_set, 'train/CLASS/IMAGE')}"):
        build_dataset(options(f"--data_set {data_set}"), train=True)


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
    assert train.class_to_idx == test.class_to_idx == {"blue": 0, "green": 1, "red": 2}
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
