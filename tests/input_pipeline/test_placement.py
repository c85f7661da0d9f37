"""Where images are transformed: one by one, in workers or on the device, a run sees the same images up to rounding."""

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from datasets import build_dataset
from distributed.stop_coordinator import StopCoordinator
from helpers import read_log
from input_pipeline.loader import BadImages, BadTestImages, EvalSampler, TrainBatchSampler, eval_loader, train_loader
from input_pipeline.placement import TransformOneByOne, build_pipeline, build_transform
from training.options import parse_args
from weight_selection.errors import InputError

CPU = torch.device("cpu")


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


def test_images_of_other_sizes_share_a_batch(train, image_folder, here):
    copy = shutil.copytree(image_folder, here / "data")
    for number, path in enumerate(sorted(copy.rglob("*.png"))):
        Image.open(path).resize((17 + number % 5, 40 - number % 9)).save(path)
    for way in ("false", "true"):
        train(f"--data_path {copy} --augment_device {way} --output_dir {way}")
    for ours, theirs in zip(read_log(Path("false")), read_log(Path("true")), strict=True):
        assert ours == pytest.approx(theirs, rel=2e-3)
