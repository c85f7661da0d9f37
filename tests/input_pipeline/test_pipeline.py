"""Ways from an image to a model's input: one by one, in workers, on the device, from memory."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bench_faults import differences
from datasets import build_dataset
from distributed.program import RunError
from distributed.stop_coordinator import StopCoordinator
from helpers import read_log
from input_pipeline import cache
from input_pipeline.bad_images import BadImages, BadTestImages
from input_pipeline.cache import CachedDataset
from input_pipeline.loader import eval_loader, train_loader
from input_pipeline.placement import TransformOneByOne, build_pipeline
from input_pipeline.samplers import EvalSampler, TrainBatchSampler
from input_pipeline.transforms import build_transform
from training.options import parse_args
from weight_selection.errors import InputError
from weight_selection.image_files import BadImage

CPU = torch.device("cpu")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def differing(one, other, *options):
    """What differs between two runs beside these options."""
    return [what for what in differences(Path(one), Path(other)) if not any(name in what for name in options)]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("device", ["false", "true"])
def test_images_in_memory_change_nothing(train, here, device, workers):
    for cached in ("false", "true"):
        options = f"--num_workers {workers} --reprob 1 --augment_device {device} --cache_images {cached}"
        train(f"{options} --output_dir {cached}")
    assert differing("false", "true", "cache_images", "output_dir") == []


def test_run_with_augmentation_on_the_device_is_the_same_but_for_rounding(train, here):
    for device in ("false", "true"):
        train(f"--augment_device {device} --reprob 1 --output_dir {device}")
    for ours, theirs in zip(read_log(Path("false")), read_log(Path("true")), strict=True):
        assert ours != theirs, "other code has rounded other pixels"
        assert ours == pytest.approx(theirs, rel=2e-3)


def args_of(image_folder, *more):
    words = (
        f"--data_set image_folder --data_path {image_folder} --input_size 32 --num_workers 0 --batch_size 16".split()
    )
    return parse_args([*words, *more, "--device", "cpu"])


@pytest.mark.parametrize("train", [True, False])
def test_fast_way_gives_what_timm_gives_one_by_one(image_folder, train):
    args = args_of(image_folder, "--reprob", "0")
    dataset, _ = build_dataset(args, train)
    values, coordinator = [], StopCoordinator(1)
    for pipeline in (build_pipeline(args, train), TransformOneByOne(build_transform(args, train))):
        if train:
            sampler = TrainBatchSampler(len(dataset), 16, 3, 1, 0, 1, seed=2)
            loader = train_loader(dataset, pipeline, sampler, args, CPU, BadImages(0, coordinator))
        else:
            sampler = EvalSampler(len(dataset), 0, 1)
            loader = eval_loader(dataset, pipeline, sampler, args, CPU, BadTestImages(coordinator))
        values.append(torch.cat([images for images, _ in loader]))
    fast, plain = values
    assert fast.shape == plain.shape and fast.dtype == plain.dtype
    levels = (fast - plain).abs() * 0.226 * 255
    assert (levels > 0.5).float().mean() < 0.02, "of the values may be a level off by rounding"
    assert (levels > 3).float().mean() < 0.002, "of them more, where an operation amplifies it"


def test_what_has_no_batched_form_is_said_and_done_one_by_one(train, here, capsys):
    train("--aa augmix-m5 --output_dir run")
    assert "images are transformed one by one in loader workers: no batched form of " in capsys.readouterr().out
    with pytest.raises(InputError, match="--augment_device true: no batched form of .*AugMix.*; leave the option out"):
        train("--aa augmix-m5 --augment_device true --output_dir other")
    assert not Path("other").exists()


# ---------------------------------------------------------------------------------------------------------
# Images in memory


def images_of(sizes):
    rng = np.random.default_rng(0)
    return [(torch.from_numpy(rng.integers(0, 256, (*size, 3), dtype=np.uint8)), n) for n, size in enumerate(sizes)]


def test_store_has_the_items_of_the_data_set():
    sizes = [(1 + number % 7, 30 - number % 11) for number in range(150)]
    images = images_of(sizes)
    kept = CachedDataset(images, "images")
    assert len(kept) == 150
    for (image, label), (mine, number) in zip(images, (kept[index] for index in range(150)), strict=True):
        assert label == number and torch.equal(image, mine)
    assert torch.equal(kept.data, torch.cat([image.reshape(-1) for image, _ in images]))


def test_store_keeps_what_is_wrong_with_images(image_folder, tmp_path):
    copy = shutil.copytree(image_folder, tmp_path / "data")
    (copy / "train" / "green" / "1.png").write_bytes(b"no image")
    kept = CachedDataset(build_dataset(args_of(copy), train=True)[0], "images")
    bad = []
    for index in range(len(kept)):
        try:
            kept[index]
        except BadImage as error:
            bad.append(str(error))
    assert len(bad) == 1 and "green/1.png cannot be read" in bad[0]


@pytest.mark.parametrize("device", ["true", "false"])
def test_bad_image_in_memory_is_replaced_or_named(train, image_folder, here, device, capsys):
    copy = shutil.copytree(image_folder, here / "data")
    (copy / "train" / "green" / "1.png").write_bytes(b"no image")
    options = f"--data_path {copy} --cache_images true --augment_device {device}"
    with pytest.raises(RunError, match="training image .*green/1.png cannot be read"):
        train(options)
    train(options, "--skip_bad_images 1")
    assert "green/1.png cannot be read" in capsys.readouterr().out


def test_more_images_than_memory_are_refused_before_anything_is_written(train, here, monkeypatch):
    monkeypatch.setattr(cache, "_free_memory", lambda: 61 * 20 * 20 * 3 * 2)
    with pytest.raises(InputError, match=r"--cache_images true: needs about .* GB, this machine has .* free; leave it"):
        train("--cache_images true --output_dir run")
    assert not Path("run").exists()
    monkeypatch.setattr(cache, "_free_memory", lambda: 61 * 20 * 20 * 3 * 3)
    train("--cache_images true --output_dir run")


def test_images_of_other_sizes_share_a_batch(train, image_folder, here):
    copy = shutil.copytree(image_folder, here / "data")
    for number, path in enumerate(sorted(copy.rglob("*.png"))):
        Image.open(path).resize((17 + number % 5, 40 - number % 9)).save(path)
    for way in ("false", "true"):
        train(f"--data_path {copy} --augment_device {way} --output_dir {way}")
    for ours, theirs in zip(read_log(Path("false")), read_log(Path("true")), strict=True):
        assert ours == pytest.approx(theirs, rel=2e-3)
