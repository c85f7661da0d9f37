#!/usr/bin/env python3
"""How near is a student to its teacher before any training? Print the table of docs/results.md for several students.

python experiments/quality.py data/ --teacher_path vit_tiny_patch16_224.augreg_in21k_ft_in1k.safetensors

Nothing is trained; the first weights include the classifier. Training images of Flowers-102 calibrate. The table says
on how many of its test images, in percent, student and teacher choose the same class. Of fewer layers the paper's rule
keeps the first ones, and both projections keep evenly spaced ones.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the repository's modules
import timm
import torch
from timm.data import create_transform, resolve_data_config
from torch.utils.data import DataLoader, Subset

from datasets import DATA_SETS
from weight_selection import PROJECTION, select_weights
from weight_selection.agreement import top1_classes
from weight_selection.arguments import Parser
from weight_selection.cost import parameter_count
from weight_selection.errors import run_program
from weight_selection.options import CALIBRATION_IMAGES
from weight_selection.projection.images import draw

TEACHER = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
RULES = ("uniform", "greedy", "project")
STUDENTS = {
    "width 3/4, 3 heads of 48": {"embed_dim": 144},
    "width 2/3, 2 heads of 64": {"embed_dim": 128, "num_heads": 2},
    "width 1/2, 3 heads of 32": {"embed_dim": 96},
    "10 of 12 layers": {"depth": 10},
    "9 of 12 layers": {"depth": 9},
    "6 of 12 layers": {"depth": 6},
    "MLP ratio 3, of 4": {"mlp_ratio": 3},
    "MLP ratio 2, of 4": {"mlp_ratio": 2},
}


def batches(path: Path, train: bool, count: int, transform) -> list:
    """Images of Flowers-102, drawn as scripts/calibration_images.py draws them: [(n, 3, side, side), ...]."""
    data_set = DATA_SETS["flowers"].build(path, train, transform, False)
    return [images for images, _ in DataLoader(Subset(data_set, draw(len(data_set), count, seed=0)), batch_size=16)]


def agreements(teacher, kwargs: dict, calibration: list, test: list, expected: torch.Tensor) -> list:
    """For each of RULES the percentage of test images on which the student's top-1 class is the ``expected`` one, (n,).

    None of ``greedy`` for a student of the teacher's width: no stream is rotated, so that it is ``project``.
    """
    found = []
    for rule in RULES:
        if rule == "greedy" and "embed_dim" not in kwargs:
            found.append(None)
            continue
        student = timm.create_model(TEACHER.partition(".")[0], **kwargs)
        fitted = {"calibration": calibration} if rule in PROJECTION else {}
        layers = "uniform" if fitted else "first_n"
        weights = select_weights(
            teacher, student, element_selection=rule, layer_selection=layers, include_head=True, **fitted
        )
        student.load_state_dict(weights)
        same = torch.cat([top1_classes(student, batch)[0] for batch in test]) == expected
        found.append(100 * same.double().mean().item())
    return found


def get_args_parser() -> Parser:
    parser = Parser("quality.py", __doc__)
    parser.add_argument("data", metavar="DATA", type=Path, help="holds flowers-102/")
    parser.add_argument("--teacher_path", metavar="FILE", help=f"weights of timm's {TEACHER} (default: the hub's)")
    parser.add_argument("--calibration_images", type=int, default=CALIBRATION_IMAGES, metavar="N", help="from training")
    parser.add_argument("--test_images", type=int, default=500, metavar="N", help="to compare on")
    return parser


def main(argv=None) -> None:
    args = get_args_parser().parse_args(argv)
    started = time.monotonic()
    file = {"pretrained_cfg_overlay": {"file": args.teacher_path}} if args.teacher_path else {}
    teacher = timm.create_model(TEACHER, pretrained=True, **file).eval()
    transform = create_transform(**resolve_data_config(model=teacher))
    calibration = batches(args.data, True, args.calibration_images, transform)
    test = batches(args.data, False, args.test_images, transform)
    expected = torch.cat([top1_classes(teacher, batch)[0] for batch in test])
    print(f"| student | parameters | {' | '.join(RULES)} |\n|---|---|{'---|' * len(RULES)}")
    for name, kwargs in STUDENTS.items():
        count = parameter_count(timm.create_model(TEACHER.partition(".")[0], **kwargs)) / 1e6
        found = agreements(teacher, kwargs, calibration, test, expected)
        cells = ("" if percent is None else f"{percent:.1f}" for percent in found)
        print(f"| {name} | {count:.1f} M | {' | '.join(cells)} |", flush=True)
    seconds, threads = time.monotonic() - started, torch.get_num_threads()
    print(f"\nTeacher: timm's {TEACHER}, {parameter_count(teacher) / 1e6:.1f} M parameters.")
    print(f"{len(expected)} test images, {args.calibration_images} training images to calibrate.")
    print(f"{seconds:.0f} seconds on {threads} thread{'s' * (threads > 1)}.")


if __name__ == "__main__":
    run_program("quality.py", main)
