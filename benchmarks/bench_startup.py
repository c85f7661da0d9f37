#!/usr/bin/env python3
"""Seconds that a user waits for main.py and weight_selection.py to say something, as whole processes.

    python benchmarks/bench_startup.py

Help and mistakes in options need no torch; they are compared with the seconds that its import and timm's take. The last
row is from the command to the end of the first training step, with a model and images so small that the step itself
takes no time. Each row is a median.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from bench_selection import medians

ROOT = Path(__file__).resolve().parent.parent
GOAL = 1.0  # seconds, for help and mistakes
TINY = "--model_kwargs embed_dim=32 depth=2 num_heads=2 patch_size=4 --input_size 16 --warmup_steps 0 --num_workers 0"
TINY += " --data_set digits --device cpu --batch_size 1000 --epochs 1"
MAIN, SELECT = str(ROOT / "main.py"), str(ROOT / "weight_selection.py")
COMMANDS = {  # words, and the exit status
    "import torch, timm": (["-c", "import torch, timm"], 0),
    "main.py --help": ([MAIN, "--help"], 0),
    "main.py --epochs 0": ([MAIN, "--epochs", "0"], 2),
    "weight_selection.py --help": ([SELECT, "--help"], 0),
    "weight_selection.py, no such file": ([SELECT, "--model_type", "vit", "--pretrained_path", "none.pth"], 2),
    "main.py to its first step": ([MAIN, *TINY.split()], 0),
}


def seconds(words: list, status: int, directory: str) -> float:
    """Run a command and check its exit status; until it ends, or until the end of its first training step."""
    begun = time.monotonic()
    run = subprocess.Popen(
        [sys.executable, *words], cwd=directory, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    first_step = next((time.monotonic() for line in run.stdout if line.startswith("epoch 0 [")), None)
    run.stdout.read()
    if run.wait() != status:
        sys.exit(f"{' '.join(words)}: exit status {run.returncode}")
    return (first_step or time.monotonic()) - begun


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=5, help="of each command")
    args = parser.parse_args()
    print(f"{'':36}seconds  to the import", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        measures = {name: partial(seconds, *command, directory) for name, command in COMMANDS.items()}
        found = medians(measures, args.starts)  # the first start warms up the disk's cache
    for name, median in found.items():
        print(f"{name:36}{median:7.2f}  {median / found['import torch, timm']:13.2f}")
    print(f"goal: help and mistakes under {GOAL:g} second")


if __name__ == "__main__":
    main()
