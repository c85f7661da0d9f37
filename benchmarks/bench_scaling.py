#!/usr/bin/env python3
"""Images per second against processes and total batch, and what an epoch spends beside training.

    python benchmarks/bench_scaling.py                                                   # on a CPU
    python benchmarks/bench_scaling.py --device cuda --processes 1 2 4 8 --batches 512 1024 4096

Runs main.py under torchrun on random images at 224 pixels, in mixed precision. A process computes with as many threads
as it has cores to itself. The speed is what main.py prints for its second epoch. The last lines say what one process
spends in three epochs, each with an evaluation, a checkpoint and its log: seconds, and percent of all.
"""

import argparse
import contextlib
import io
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench_faults import make_images

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
STEPS = 6


def words(data, args, batch, epochs):
    options = (
        f"--data_set image_folder --data_path {data} --model {args.model} --device {args.device} --epochs {epochs}"
    )
    options += f" --warmup_epochs 1 --use_amp true --num_workers {args.workers} --total_batch_size {batch}"
    return f"{options} --batch_size {args.micro_batch} --disable_eval true".split()


def speed(data, args, processes, batch) -> float:
    """Images per second of the second epoch."""
    threads = max(1, len(os.sched_getaffinity(0)) // processes)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    run = subprocess.run(
        [*launcher, str(ROOT / "main.py"), *words(data, args, batch, 2)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
    )
    return float(re.search(r"^epoch 1:.* (\d+) images/s", run.stdout, re.M)[1])


def shares(data, args, batch, output):
    """{what: seconds} of three epochs with evaluation, checkpoint and log after each, and of all."""

    import main
    import training.run
    from training import checkpoint
    from training.metric_log import MetricLog

    spent = dict.fromkeys(("evaluation", "checkpoints", "log"), 0.0)

    def timed(what, owner, name):
        function = getattr(owner, name)

        def measured(*arguments, **options):
            start = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                spent[what] += time.perf_counter() - start

        setattr(owner, name, measured)

    timed("evaluation", training.run, "evaluate")
    timed("checkpoints", checkpoint, "save")
    timed("log", MetricLog, "add")
    spent["all"] = 0.0
    timed("all", training.run, "train")
    options = [*words(data, args, batch, 3), "--output_dir", str(output), "--log_dir", str(output / "board")]
    options[options.index("--disable_eval") + 1] = "false"
    with contextlib.redirect_stdout(io.StringIO()):
        main.main(options)
    return spent


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", default="vit_tiny")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batches", type=int, nargs="+", default=[16, 32, 64], help="total batch sizes")
    parser.add_argument("--micro_batch", type=int, default=32, help="at most, in a process")
    parser.add_argument("--workers", type=int, default=1, help="loader processes of each process")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        print("processes  total batch  images/s  to one process", flush=True)
        for batch in args.batches:
            data = Path(root) / str(batch)
            make_images(data, batch * STEPS, max(4, batch * STEPS // 5))
            alone = None
            for processes in args.processes:
                found = speed(data, args, processes, batch)
                alone = alone or found
                print(f"{processes:9}  {batch:11}  {found:8.1f}  {found / alone:14.2f}", flush=True)
        spent = shares(Path(root) / str(batch), args, batch, Path(root) / "run")
    for what, seconds in spent.items():
        print(f"{what:12} {seconds:7.2f} s  {100 * seconds / spent['all']:5.1f} %")


if __name__ == "__main__":
    main()
