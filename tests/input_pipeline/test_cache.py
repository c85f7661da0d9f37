"""Images that are decoded once and kept in memory: they change nothing, and must fit."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from bench_faults import differences
from datasets import build_dataset
from distributed.program import RunError
from input_pipeline import cache
from input_pipeline.cache import CachedDataset
from training.options import parse_args
from weight_selection.errors import InputError
from weight_selection.image_files import BadImage


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def differing(one, other, *options):
    """The differences between two runs, without those in these options."""
    return [what for what in differences(Path(one), Path(other)) if not any(name in what for name in options)]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("device", ["false", "true"])
def test_images_in_memory_change_nothing(train, here, device, workers):
    for cached in ("false", "true"):
        options = f"--num_workers {workers} --reprob 1 --augment_device {device} --cache_images {cached}"
        train(f"{options} --output_dir {cached}")
    assert differing("false", "true", "cache_images", "output_dir") == []


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
    kept = CachedDataset(
        build_dataset(parse_args(f"--data_set image_folder --data_path {copy}".split()), train=True)[0], "images"
    )
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
