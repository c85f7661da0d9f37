#!/usr/bin/env python3
"""Images per second and core of the input pipeline, compared with timm's transforms in PyTorch's default loader.

    python benchmarks/bench_data.py

One core does all the work on an image: reading or decoding, the transform, collation and normalisation, up to a batch
of float32 at 224 pixels. Both loaders run the recipe's transforms of training and of the test, in turns; each number
is a median. The images are noise over smooth colours: in memory and as small as CIFAR's, or JPEG files of 500 x 375
pixels, which are decoded each time or once (--cache_images).

    worker   only what a loader worker does, which is all that is left to a CPU beside a GPU
    read     only reading or decoding

--device cuda measures --augment_device instead, with images that are resident on the GPU.
"""

import argparse
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench_selection import medians  # noqa: E402
from datasets import ImageFiles, build_dataset, to_pixels  # noqa: E402
from distributed.stop_coordinator import StopCoordinator  # noqa: E402
from input_pipeline.cache import CachedDataset  # noqa: E402
from input_pipeline.loader import BadImages, BadTestImages, EvalSampler, TrainBatchSampler, eval_loader, train_loader  # noqa: E402
from input_pipeline.placement import Batch, build_pipeline, build_transform  # noqa: E402
from training.options import parse_args  # noqa: E402

BATCH = 64
GOAL, DEVICE_GOAL = 2.0, 20_000  # a multiple of the baseline's speed; images/s of one GPU


class Small:
    """Images in memory of 32 x 32 pixels, the size of CIFAR's."""

    def __init__(self, images, transform):
        rng = np.random.default_rng(0)
        self.images = [np.asarray(smooth(rng, 32, 32)) for _ in range(images)]
        self.transform = transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.transform(Image.fromarray(self.images[index])), index % 100


def smooth(rng, width, height):
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    noisy = np.asarray(coarse) + rng.normal(0, 12, (height, width, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def write_jpegs(root: Path, images: int):
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        for number in range(images):
            path = root / part / str(number % 4) / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            smooth(rng, 500, 375).save(path, quality=90)


def options(root, *more):
    words = ["--data_set", "image_folder", "--data_path", str(root), "--num_workers", "0", "--batch_size", str(BATCH)]
    return parse_args([*words, "--eval_batch_size", str(BATCH), "--device", "cpu", *more])


def our_loader(args, dataset, train, device):
    pipeline, coordinator = build_pipeline(args, train), StopCoordinator(args.timeout)
    if train:
        steps = len(dataset) // args.batch_size
        sampler = TrainBatchSampler(len(dataset), args.batch_size, steps, 1, 0, 1, args.seed)
        return train_loader(dataset, pipeline, sampler, args, device, BadImages(0, coordinator))
    sampler = EvalSampler(range(len(dataset)), 0, 1)
    return eval_loader(dataset, pipeline, sampler, args, device, BadTestImages(coordinator))


def images_per_second(loader, device) -> float:
    """The speed of one pass over a loader whose batches are (images, labels) or a worker's ``Batch``."""
    start, images = time.perf_counter(), 0
    for batch in loader:
        images += len(batch.labels if isinstance(batch, Batch) else batch[0].to(device))
    if device.type == "cuda":
        torch.cuda.synchronize()
    return images / (time.perf_counter() - start)


def reads_per_second(dataset) -> float:
    """The speed of reading or decoding alone."""
    start = time.perf_counter()
    for index in range(len(dataset)):
        dataset[index]
    return len(dataset) / (time.perf_counter() - start)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1024, help="of each kind and turn")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args()
    device, on_device = torch.device(arguments.device), arguments.device != "cpu"
    if not on_device:
        torch.set_num_threads(1)
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    print(f"{'':22}{'':6}  images/s, timm    ours ratio  worker ratio    read", flush=True)
    with tempfile.TemporaryDirectory() as root:
        write_jpegs(Path(root), arguments.images)
        for kind in ("32 x 32, in memory", "500 x 375, JPEG", "500 x 375, cached"):
            for train in (True, False):
                args = options(root, "--augment_device", str(on_device))
                transform = build_transform(args, train)
                if kind.startswith("32"):
                    baseline, dataset = Small(arguments.images, transform), Small(arguments.images, to_pixels)
                else:
                    dataset = build_dataset(args, train)[0]
                    baseline = ImageFiles(dataset.samples, transform)
                if on_device or kind.endswith("cached"):
                    dataset = CachedDataset(dataset, "images")
                plain = DataLoader(baseline, batch_size=BATCH, shuffle=train, drop_last=True)
                ours = our_loader(args, dataset, train, device)
                passes = {
                    "timm": partial(images_per_second, plain, device),
                    "ours": partial(images_per_second, ours, device),
                    "worker": partial(images_per_second, ours.workers, device),
                    "read": partial(reads_per_second, dataset),
                }
                timm, own, worker, read = medians(passes, arguments.turns).values()
                part = "train" if train else "test"
                ratios = f"{own:6.0f} {own / timm:5.2f}  {worker:6.0f} {worker / timm:5.2f}"
                print(f"{kind:22}{part:6}  {timm:14.0f}  {ratios}  {read:6.0f}", flush=True)
    goal = f"{DEVICE_GOAL} images/s in training" if on_device else f"{GOAL} times timm's"
    print(f"goal: {goal}")


if __name__ == "__main__":
    main()
