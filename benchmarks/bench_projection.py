#!/usr/bin/env python3
"""Seconds and memory of weight_selection.py with project and with greedy, as ratios to uniform in the same run.

    python benchmarks/bench_projection.py

The teacher is ViT-S/16 at 224 pixels with random values, the student ViT-T, and the images are noise: 1,024, which is
the default, and 256, which show how seconds and memory grow with their number. We print the median of several starts.
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path

from bench_selection import MAKE, ROOT, measure, medians

TEACHER = "vit_small_patch16_224"
VARIANTS = {"uniform": ["uniform"]} | {
    f"{rule}, {count} images": [rule, "--calibration", "noise", "--calibration_images", count]
    for rule in ("greedy", "project")
    for count in (256, 1024)
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=3, help="of each variant")
    args = parser.parse_args()
    print(f"{'':24}  seconds  to uniform  peak MB  to uniform", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "teacher.pth")
        measure(["-c", MAKE, TEACHER, "{}", path])
        words = [ROOT / "weight_selection.py", "--pretrained_model", TEACHER, "--pretrained_path", path]
        words += ["--student", "vit_tiny", "--output_dir", Path(directory, "init.pth"), "--overwrite"]
        words += ["--element_selection"]
        commands = {name: partial(measure, [*words, *options]) for name, options in VARIANTS.items()}
        found = medians(commands, args.starts, warm_ups=0)
    for name, (seconds, memory) in found.items():
        ratios = [value / base for value, base in zip((seconds, memory), found["uniform"], strict=True)]
        print(f"{name:24}  {seconds:7.2f}  {ratios[0]:10.2f}  {memory:7.0f}  {ratios[1]:10.2f}", flush=True)


if __name__ == "__main__":
    main()
