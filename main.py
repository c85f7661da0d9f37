#!/usr/bin/env python3
"""Train or evaluate one model, from random weights or from selected ones, in one process or many.

python main.py --model vit_tiny --data_set CIFAR100 --data_path data/ --initialize init/ --output_dir results/
torchrun --nproc_per_node=8 main.py ...
"""

import os

from distributed.parent import end_with_launcher

if __name__ == "__main__":
    end_with_launcher(os.environ)  # before the other imports: the launcher may end while they last

from datasets import find_data
from distributed.program import find_launch, run_program
from training.options import check_weights, parse_args, parse_args_with, share_batch
from weight_selection.errors import InputError


def main(argv: list[str] | None = None) -> None:
    """Check and complete the options, let the processes of the run meet, and train. A mistake raises InputError."""
    args = parse_args(argv)
    check_weights(args)
    launch = find_launch(os.environ, args.dist_on_itp)
    if args.world_size not in (None, launch.world_size):
        raise InputError(f"--world_size {args.world_size}: the launcher started {launch.world_size} processes")
    share_batch(args, launch.world_size)
    # These import torch, which takes seconds: mistakes in options do not wait for it.
    from distributed.process_group import init_distributed
    from training.output_dir import keep_warmup
    from training.run import run
    from training.setup import complete_options, set_up_device
    from training.trained_model import find_recorded

    if found := find_recorded(args):
        args = parse_args_with(found, argv)
        check_weights(args)
    args = find_data(args, lambda line: launch.rank or print(line))
    options = complete_options(share_batch(args, launch.world_size), launch.local_rank)
    device = set_up_device(options, launch.local_rank)
    init_distributed(launch, device, options.dist_url, options.timeout)
    default_warmup = args.warmup_epochs is None and args.warmup_steps < 0
    if args.warmup_epochs is None and not args.eval:
        options = keep_warmup(options)
    run(options, launch, device, default_warmup)


if __name__ == "__main__":
    run_program("main.py", main)
