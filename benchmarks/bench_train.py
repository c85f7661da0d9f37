#!/usr/bin/env python3
"""Images per second of main.py's training loop at 224 pixels, against its ceiling and a plain loop, in one run.

    python benchmarks/bench_train.py                                    # on a CPU
    python benchmarks/bench_train.py --device cuda --compile true --batch 1024 --steps 40

Rows, of the recipe of CIFAR-100 (RandAugment, erasing, mixup and cutmix) on random images of 32 x 32 pixels:

    plain     float32: timm's transform, PyTorch's default loader, forward, backward, step
    real      mixed precision: what main.py runs, with its input pipeline
    ceiling   the same loop, fed with one batch that lies on the device

The three run in turns; a row is a median. The last columns compare the rate of the model's operations (forward, and
twice as many backward) with that of a product of large matrices on the same device in the same precision. --profile
prints where the time goes.
"""

import argparse
import contextlib
import io
import statistics
import sys
import time
from pathlib import Path

import torch
from timm.layers import set_fused_attn
from torch.utils.data import DataLoader

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from bench_data import Small, our_loader  # noqa: E402
from bench_selection import medians  # noqa: E402
from datasets import to_pixels  # noqa: E402
from distributed.program import Launch  # noqa: E402
from distributed.stop_coordinator import StopCoordinator  # noqa: E402
from engine import EpochMetrics, train_one_epoch  # noqa: E402
from input_pipeline.cache import CachedDataset  # noqa: E402
from input_pipeline.loader import BadImages  # noqa: E402
from input_pipeline.placement import build_transform  # noqa: E402
from training.options import parse_args, share_batch  # noqa: E402
from training.setup import build_model, build_train_state, compile_model, complete_options, set_up_device  # noqa: E402
from weight_selection.cost import multiply_adds  # noqa: E402

MODELS = ("vit_tiny", "convnext_femto")
CLASSES = 100
GOALS = "goals: real at least 0.9 of the ceiling; on a CPU at least 3 times plain; vit_tiny on an H200 10,000 images/s"


class Constant:
    """A loader that gives one batch, already on the device."""

    def __init__(self, images, labels):
        self.batch, self.batch_size = (images, labels), len(labels)

    def __iter__(self):
        while True:
            yield self.batch


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def warm_up(args) -> int:
    """Number of steps for which loader workers have already made a batch, or half of it, when the first step ends."""
    return 1 + 2 * args.num_workers


def plain_loop(args, device, steps):
    """Returns a function that trains for an epoch, and gives images per second after what its loader had prepared."""
    warm = warm_up(args)
    model = build_model(args, CLASSES).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    dataset = Small(steps * args.batch_size, build_transform(args, True))
    loader = DataLoader(dataset, args.batch_size, shuffle=True, drop_last=True, num_workers=args.num_workers)

    def epoch():
        for step, (images, targets) in enumerate(loader):
            loss = torch.nn.functional.cross_entropy(model(images.to(device)), targets.to(device))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if step == warm - 1:
                synchronize(device)
                start = time.perf_counter()
        synchronize(device)
        return (steps - warm) * args.batch_size / (time.perf_counter() - start)

    return epoch


def our_loop(args, device, steps, real):
    """Like ``plain_loop``, but main.py's loop; with its input pipeline if ``real``, else with one batch."""
    warm = warm_up(args)
    model = build_model(args, CLASSES)
    stop_coordinator = StopCoordinator(args.timeout)
    state = build_train_state(args, model, None, device, Launch(), stop_coordinator, steps, CLASSES)
    images = torch.randn(args.batch_size, 3, args.input_size, args.input_size, device=device)
    labels = torch.randint(CLASSES, (args.batch_size,), device=device)
    if args.compile:
        compile_model(state, images, labels, images)
    if real:
        dataset = Small(steps * args.batch_size, to_pixels)
        loader = our_loader(args, CachedDataset(dataset, "images") if args.augment_device else dataset, True, device)
    else:
        loader = Constant(images, labels)

    def epoch():
        moments = []
        metrics = EpochMetrics(state, 0, BadImages(0, stop_coordinator))
        with contextlib.redirect_stdout(io.StringIO()):
            for _ in train_one_epoch(state, loader, metrics):
                if metrics.step in (warm, steps):
                    synchronize(device)
                    moments.append(time.perf_counter())
        return (steps - warm) * args.batch_size / (moments[1] - moments[0])

    return epoch


def peak(device, dtype, size=2048) -> float:
    """10^12 multiplications and additions per second that a product of large matrices reaches."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    speeds = []
    for _ in range(12):
        synchronize(device)
        start = time.perf_counter()
        a @ b
        synchronize(device)
        speeds.append(size**3 / (time.perf_counter() - start) / 1e12)
    return statistics.median(speeds)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=10, help="of a turn; the first few do not count: see warm_up")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1, help="of the loaders")
    parser.add_argument("--compile", default="false")
    parser.add_argument("--channels_last", default="false")
    parser.add_argument("--profile", action="store_true", help="print the operations that take longest")
    ours = parser.parse_args()
    if ours.steps <= 1 + 2 * ours.workers:
        parser.error(f"--steps {ours.steps}: give more than one and twice --workers")
    set_fused_attn(ours.device == "cuda")
    print(f"{'':14}  {'':7}  images/s  to ceiling  to plain  10^12 mult-adds/s  of a large product", flush=True)
    for name in ours.models:
        words = f"--data_set digits --model {name} --input_size 224 --num_workers {ours.workers} --device {ours.device}"
        words += f" --batch_size {ours.batch} --use_amp true --compile {ours.compile}"
        words += f" --channels_last {ours.channels_last} --augment_device {ours.device == 'cuda'}"
        args = parse_args(words.split())
        args = complete_options(share_batch(args, 1), 0)
        device, dtype = set_up_device(args, 0), getattr(torch, args.amp_dtype)
        loops = {
            "plain": plain_loop(args, device, ours.steps),
            "real": our_loop(args, device, ours.steps, real=True),
            "ceiling": our_loop(args, device, ours.steps, real=False),
        }
        speeds = medians(loops, ours.turns)
        for row, speed in speeds.items():
            image = torch.zeros(1, 3, args.input_size, args.input_size)
            work = 3 * multiply_adds(build_model(args, CLASSES), (image,)) * speed / 1e12
            limit = peak(device, torch.float32 if row == "plain" else dtype)
            ratios = f"{speed / speeds['ceiling']:10.2f}  {speed / speeds['plain']:8.2f}"
            print(f"{name:14}  {row:7}  {speed:8.1f}  {ratios}  {work:17.3f}  {work / limit:18.2f}", flush=True)
        if ours.profile:
            with torch.profiler.profile() as profiler:
                loops["real"]()
            key = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
            print(profiler.key_averages().table(sort_by=key, row_limit=15, max_name_column_width=50))
    print(GOALS)


if __name__ == "__main__":
    main()
