#!/usr/bin/env python3
"""Kill training runs at random moments, let them go on, and compare them with one that was never interrupted.

    python benchmarks/bench_faults.py --kills 50

With several processes, a kill hits one of three victims, chosen at random: one process, which torchrun starts again
with the others; all processes and torchrun; or torchrun alone, at any moment from its start on. Its processes must then
be gone within seconds. After the last two the benchmark gives the same command again at once, with the same
--master_port. The first two only hit runs that train, and half of these kills are aimed at a moment at which a
checkpoint is being written. A run that takes longer than five minutes counts as hanging, and ends the benchmark.

The run uses everything whose state could be lost: accumulation, mixed precision, a moving average, mixup, drop path,
loader workers and checkpoints within an epoch.

The benchmark compares all that the last and the best checkpoint hold (weights, moving average, optimiser, accuracies),
log.txt byte by byte, and results.json without its times (seconds, wall_time). "while writing" counts the kills at which
a checkpoint was half written. The exit status is 1 if anything differs.
"""

import argparse
import contextlib
import functools
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.distributed.elastic.utils.distributed import get_free_port

MAIN = Path(__file__).resolve().parent.parent / "main.py"
EPOCHS = 4
OPTIONS = (
    "--data_set image_folder --data_path ../data --output_dir run --device cpu --num_workers 1 "
    "--model vit_tiny --model_kwargs embed_dim=192 depth=4 num_heads=3 patch_size=4 --input_size 16 --drop_path 0.1 "
    f"--epochs {EPOCHS} --warmup_epochs 1 --total_batch_size 48 --batch_size 8 --save_ckpt_steps 3 "
    "--model_ema true --model_ema_decay 0.9 --model_ema_eval true"
).split()
COLUMNS = "processes  kills  while writing  of one process  of launcher  runs  bit-equal  values that differ"
CLOCK = {"seconds", "wall_time"}
VICTIMS = ("one", "all", "launcher")
LIMIT = 300  # seconds that a run, or a wait for something in it, may take


def make_images(root: Path, train: int = 384, val: int = 48) -> None:
    """Class folders of noise around a colour: so many images to train on, and to test on."""
    rng = np.random.default_rng(0)
    for part, images in (("train", train), ("val", val)):
        for number in range(images):
            folder = root / part / str(number % 4)
            folder.mkdir(parents=True, exist_ok=True)
            pixels = rng.normal(40 + 50 * (number % 4), 40, (20, 20, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")


class Launched:
    """A run of main.py in one process or in several, and what it has printed."""

    def __init__(self, directory: Path, processes: int, port: int, options: list):
        launcher = [sys.executable]
        if processes > 1:
            launcher += ["-m", "torch.distributed.run", f"--master_port={port}", f"--nproc_per_node={processes}"]
            launcher += ["--max_restarts=100", "--monitor_interval=0.1"]
        self.processes = processes
        self.output = open(directory / "output.txt", "a")
        self.start = self.output.tell()
        self.process = subprocess.Popen(
            [*launcher, str(MAIN), *options],
            cwd=directory,
            stdout=self.output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        )

    def printed(self) -> str:
        """Of this launch."""
        with open(self.output.name) as file:
            file.seek(self.start)
            return file.read()

    def starts(self) -> int:
        """How often training has begun since."""
        return self.printed().count("train_images ")

    def ranks(self) -> list:
        """Numbers of the processes that train."""
        if self.processes == 1:
            return [self.process.pid]
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [int(child) for child in children]

    def kill(self, victim: str, rng) -> list:
        """Kill one of the processes that train, all and the launcher, or the launcher; returns their numbers."""
        ranks = self.ranks()
        if victim == "one" and ranks:
            os.kill(rng.choice(ranks), signal.SIGKILL)
            return ranks
        os.kill(self.process.pid, signal.SIGKILL)
        for rank in ranks if victim != "launcher" else []:
            with contextlib.suppress(ProcessLookupError):  # it has ended with the launcher
                os.kill(rank, signal.SIGKILL)
        self.process.wait()
        return ranks

    def wait_for(self, condition, interval=0.0005, limit=LIMIT) -> bool:
        """Wait until a condition holds (True) or the run has ended (False)."""
        start = time.monotonic()
        while not condition():
            if self.process.poll() is not None:
                return False
            if time.monotonic() - start > limit:
                raise TimeoutError(f"{self.process.args}: nothing in {limit} s:\n{self.printed()[-2000:]}")
            time.sleep(interval)
        return True


def partial_files(directory: Path) -> set:
    """Checkpoints that are being written."""
    return {path.name for path in (directory / "run").glob(".partial-*checkpoint*")}


def strike(launched: Launched, directory: Path, victim: str, aimed: bool, seconds: float, rng) -> bool | None:
    """Kill a run at some moment of the next ``seconds``, or while it writes a checkpoint.

    Returns:
        Whether it was writing one; None if it ended before it could be killed.
    """
    if aimed:
        for _ in range(rng.randint(1, 3)):
            seen = partial_files(directory)
            if not launched.wait_for(lambda seen=seen: partial_files(directory) - seen):
                return None
        time.sleep(rng.random() * 0.01)
    else:
        moment = time.monotonic() + rng.random() * seconds
        if not launched.wait_for(lambda: time.monotonic() > moment, 0.01):
            return None
    starts = launched.starts()
    ranks = launched.kill(victim, rng)
    writing = bool(partial_files(directory))
    if victim == "one":  # wait until the launcher has started them again
        launched.wait_for(lambda: launched.starts() > starts, 0.05)
    else:
        check_gone(ranks)
    return writing


def check_gone(numbers: list) -> None:
    """Wait until none of these processes runs; a TimeoutError if one does after seconds."""
    start = time.monotonic()
    while any(is_running(number) for number in numbers):
        if time.monotonic() - start > 5:
            raise TimeoutError(f"orphans: {[number for number in numbers if is_running(number)]}")
        time.sleep(0.001)


def is_running(number: int) -> bool:
    """Whether there is a process with this number that has not ended (a zombie has)."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def survive(directory, reference, launch, victims, kills, seconds, rng) -> Counter:
    """Kill runs until there were ``kills``, each time letting them go on, and compare each that ends; count COLUMNS.

    ``launch(directory)`` starts a run. One that nobody kills prepares for ``seconds[0]`` and trains for ``seconds[1]``.
    """
    count = Counter()
    while count["kills"] < kills:
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        launched = launch(directory)
        while count["kills"] < kills:
            victim = rng.choice(victims)
            aimed = victim != "launcher" and count["aimed"] <= count["kills"] // 2
            if victim != "launcher":
                launched.wait_for(lambda running=launched: running.starts() > 0, 0.05)
            until = 0.6 * seconds[1] + (seconds[0] if victim == "launcher" else 0)
            hit = strike(launched, directory, victim, aimed, until, rng)
            if hit is None:
                break
            count.update({"kills": 1, "aimed": aimed, "while writing": hit})
            count.update({"of one process": victim == "one", "of launcher": victim == "launcher"})
            if victim != "one":
                launched = launch(directory)
        status = launched.process.wait(LIMIT)
        found = [f"exit status {status}"] if status else differences(directory / "run", reference / "run")
        count.update({"runs": 1, "bit-equal": not found, "values that differ": len(found)})
        if found:
            print(f"run {count['runs']}: {', '.join(found[:3])}; {launched.printed()[-500:]}", flush=True)
    return count


def differences(ours: Path, theirs: Path) -> list:
    """What differs between two finished runs, in words."""
    names = [{path.name for path in run.iterdir()} for run in (ours, theirs)]
    found = [f"only one has {name}" for name in sorted(names[0] ^ names[1])]
    for name in sorted(name for name in names[0] & names[1] if name.endswith(".pth")):
        found += [f"{name}: {what}" for what in unequal(*(torch.load(run / name) for run in (ours, theirs)))]
    results = [json.loads((run / "results.json").read_text()) for run in (ours, theirs)]
    found += [f"results.json: {what}" for what in unequal(*results)]
    if (ours / "log.txt").read_bytes() != (theirs / "log.txt").read_bytes():
        found.append("log.txt")
    return found


def unequal(ours, theirs, where="") -> list:
    """Paths to the values that differ in bits or kind, except those of the clock."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        if ours.keys() != theirs.keys():
            return [f"{where}: {sorted(map(str, ours.keys() ^ theirs.keys()))}"]
        return [what for key in ours if key not in CLOCK for what in unequal(ours[key], theirs[key], f"{where}.{key}")]
    if isinstance(ours, (list, tuple)) and isinstance(theirs, (list, tuple)) and len(ours) == len(theirs):
        return [
            what for i, pair in enumerate(zip(ours, theirs, strict=True)) for what in unequal(*pair, f"{where}.{i}")
        ]
    if isinstance(ours, torch.Tensor) and isinstance(theirs, torch.Tensor):
        same = ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    else:
        same = type(ours) is type(theirs) and ours == theirs
    return [] if same else [where]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="in all")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="numbers of processes to train in")
    parser.add_argument("--victims", nargs="+", choices=VICTIMS, default=VICTIMS, help="of several processes")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    amp = ["--use_amp", "true"] if torch.ops.mkldnn._is_mkldnn_bf16_supported() else []
    failed = False
    with tempfile.TemporaryDirectory() as root:
        root = Path(root)
        make_images(root / "data")
        print(COLUMNS, flush=True)
        for number, processes in enumerate(args.processes):
            share = args.kills * (number + 1) // len(args.processes) - args.kills * number // len(args.processes)
            launch = functools.partial(Launched, processes=processes, port=get_free_port(), options=OPTIONS + amp)
            reference = root / f"whole-{processes}"
            reference.mkdir()
            times = [time.monotonic()]
            launched = launch(reference)
            launched.wait_for(lambda running=launched: running.starts() > 0, 0.05)
            times.append(time.monotonic())
            if launched.process.wait(LIMIT):
                sys.exit(f"the uninterrupted run failed:\n{launched.printed()[-2000:]}")
            times.append(time.monotonic())
            seconds = [end - start for start, end in itertools.pairwise(times)]
            victims = args.victims if processes > 1 else ["all"]
            count = survive(root / "killed", reference, launch, victims, share, seconds, rng)
            count["processes"] = processes
            failed |= count["bit-equal"] < count["runs"]
            print("  ".join(f"{count[name]:{len(name)}}" for name in COLUMNS.split("  ")), flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
