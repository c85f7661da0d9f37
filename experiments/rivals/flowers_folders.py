#!/usr/bin/env python3
"""Write the splits of Flowers-102 as class folders of links, OUT/train/CLASS and OUT/val/CLASS.

python experiments/rivals/flowers_folders.py data/ flowers_tune/ --phase tune

``tune`` trains on the official training images (1,020) and evaluates on the validation images (1,020); ``test`` trains
on both and evaluates on the test images (6,149), as main.py --data_set flowers does.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository's modules
from torchvision.datasets import Flowers102

from weight_selection.arguments import Parser
from weight_selection.errors import run_program
from weight_selection.files import new_directory

PHASES = {"tune": {"train": ["train"], "val": ["val"]}, "test": {"train": ["train", "val"], "val": ["test"]}}


def get_args_parser() -> Parser:
    parser = Parser("flowers_folders.py", __doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("data", metavar="DATA", type=Path, help="what main.py takes as --data_path; holds flowers-102/")
    parser.add_argument("out", metavar="OUT", type=Path, help="must not exist")
    parser.add_argument("--phase", choices=PHASES, required=True)
    return parser


def main(argv=None) -> None:
    args = get_args_parser().parse_args(argv)
    with new_directory(args.out, "OUT") as whole:
        for part, splits in PHASES[args.phase].items():
            for dataset in (Flowers102(args.data, split) for split in splits):
                for path, label in zip(dataset._image_files, dataset._labels, strict=True):
                    folder = whole / part / f"{label:03}"
                    folder.mkdir(parents=True, exist_ok=True)
                    (folder / path.name).symlink_to(path.resolve())


if __name__ == "__main__":
    run_program("flowers_folders.py", main)
