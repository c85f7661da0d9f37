#!/usr/bin/env python3
"""Train or evaluate one model, from random weights or from selected ones, in one process or many.

python main.py --model vit_tiny --data_set CIFAR100 --data_path data/ --initialize init/ --output_dir results/
torchrun --nproc_per_node=8 main.py ...
"""

import os

from options import check_weights, parse_args, share_batch
from program import InputError, find_launch, run_program


def main(argv=None) -> None:
    args = parse_args(argv)
    check_weights(args)
    launch = find_launch(os.environ, args.dist_on_itp)
    if args.world_size not in (None, launch.world_size):
        raise InputError(f"--world_size {args.world_size}: the launcher started {launch.world_size} processes")
    share_batch(args, launch.world_size)
    from training import run  # torch takes seconds to import, which --help and mistakes in options need not wait for

    run(args, launch)


if __name__ == "__main__":
    run_program("main.py", main)
