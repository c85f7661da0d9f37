"""The transforms of training and of the test: what they show of an image; where they run makes no difference."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datasets import build_dataset
from distributed.stop_coordinator import StopCoordinator
from helpers import read_log
from input_pipeline.loader import BadImages, BadTestImages, EvalSampler, TrainBatchSampler, eval_loader, train_loader
from input_pipeline.placement import TransformOneByOne, build_pipeline, build_transform
from training.options import parse_args
from utils import seed_everything
from weight_selection.errors import InputError

CPU = torch.device("cpu")


# ---------------------------------------------------------------------------------------------------------
# What they show


def evaluated(size, extra=""):
    """An image 512 wide and 256 high after the test transform, as pixels: red runs 0..255 from left to right, green
    from top to bottom."""
    columns, rows = np.meshgrid(np.arange(512) / 2, np.arange(256))
    image = Image.fromarray(np.stack([columns, rows, 0 * rows], axis=2).astype(np.uint8))
    args = parse_args(f"--data_set digits --input_size {size} {extra}".split())
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


# ---------------------------------------------------------------------------------------------------------
# One by one, in workers or on the device, a run sees the same images up to rounding


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


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
            sampler = EvalSampler(range(len(dataset)), 0, 1)
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


def test_images_of_other_sizes_share_a_batch(train, image_folder, here):
    copy = shutil.copytree(image_folder, here / "data")
    for number, path in enumerate(sorted(copy.rglob("*.png"))):
        Image.open(path).resize((17 + number % 5, 40 - number % 9)).save(path)
    for way in ("false", "true"):
        train(f"--data_path {copy} --augment_device {way} --output_dir {way}")
    for ours, theirs in zip(read_log(Path("false")), read_log(Path("true")), strict=True):
        assert ours == pytest.approx(theirs, rel=2e-3)
