#!/usr/bin/env python3
"""Images per second of training now, against an earlier revision of this repository, in the same run.

    python benchmarks/bench_overhead.py --before 17a8c24

By default it compares with the last revision without agreement between processes, checked gradients, checkpoints within
an epoch and replaced images. The other revision may be laid out in any way, as long as it has a main.py with these
options that prints its progress; it must be in this clone's history. Both train ViT-T on small images on the CPU, in
turns. A start counts with its median epoch, a variant with its median start. The present revision is measured twice: as
it is, and with a checkpoint every 25 steps.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from bench_faults import make_images
from bench_selection import medians

ROOT = Path(__file__).resolve().parent.parent
OPTIONS = "--data_set image_folder --data_path ../data --device cpu --num_workers 1 --epochs 4 --warmup_epochs 1"
BATCH = 8
OPTIONS += f" --model vit_tiny --input_size 64 --batch_size {BATCH} --disable_eval true --model_ema true"
VARIANTS = {"before": (), "now": (), "now, --save_ckpt_steps 25": ("--save_ckpt_steps", "25")}


def images_per_second(root: Path, variant: str, processes: int, options) -> float:
    """Train once. Each epoch but the first counts from its first line of progress on; the result is their median."""
    code = root / "before" if variant == "before" else ROOT
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    run = subprocess.Popen(
        [*launcher, str(code / "main.py"), *OPTIONS.split(), "--output_dir", "run", *options],
        cwd=tempfile.mkdtemp(dir=root),
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    moments = {}
    for line in run.stdout:
        if progress := re.match(r"epoch (\d+) \[ *(\d+)/", line):
            moments.setdefault(int(progress[1]), []).append((time.monotonic(), int(progress[2])))
    if run.wait():
        sys.exit(f"exit status {run.returncode}")
    spans = [(*epoch[0], *epoch[-1]) for number, epoch in moments.items() if number > 0]
    speeds = [(last - first) * BATCH * processes / (end - start) for start, first, end, last in spans]
    return statistics.median(speeds)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", default="17a8c24", metavar="COMMIT", help="to compare with")
    parser.add_argument("--starts", type=int, default=5, help="of each variant")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        root = Path(root)
        make_images(root / "data")
        (root / "before").mkdir()
        archive = subprocess.run(["git", "-C", str(ROOT), "archive", args.before], capture_output=True)
        if archive.returncode:
            sys.exit(f"--before {args.before}: no commit of this clone; if it is shallow, git fetch --unshallow")
        subprocess.run(["tar", "-x", "-C", str(root / "before")], input=archive.stdout, check=True)
        print(f"{'processes':9}  {'':26}  images/s  to before", flush=True)
        for processes in args.processes:
            speeds = {
                variant: partial(images_per_second, root, variant, processes, options)
                for variant, options in VARIANTS.items()
            }
            found = medians(speeds, args.starts, warm_ups=0)
            for variant, speed in found.items():
                print(f"{processes:9}  {variant:26}  {speed:8.1f}  {speed / found['before']:9.3f}", flush=True)


if __name__ == "__main__":
    main()
