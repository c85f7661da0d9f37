"""The transforms of training and of the test: which part of an image they show, and how it is normalised."""

import numpy as np
import pytest
import torch
from PIL import Image

from input_pipeline.placement import build_transform
from training.options import parse_args
from utils import seed_everything


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
