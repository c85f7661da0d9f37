#!/usr/bin/env python3
"""Write some training images of a data set as files, for weight_selection.py --calibration.

python scripts/calibration_images.py flowers data/ flowers_256/ --count 256

The seed decides which images are drawn. They are written unchanged, as OUT/NNNNN.png. For a data set in class folders
this is not needed: give --calibration the folder of its training images.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the repository's modules
from datasets import DATA_SETS, UNREADABLE
from weight_selection.arguments import Parser
from weight_selection.errors import InputError, run_program
from weight_selection.files import check_directory, new_directory
from weight_selection.options import CALIBRATION_IMAGES
from weight_selection.projection.images import draw


def get_args_parser() -> Parser:
    parser = Parser("calibration_images.py", __doc__)
    names = [name for name, data_set in DATA_SETS.items() if not data_set.folders]
    parser.add_argument("data_set", metavar="DATA_SET", choices=names, help=", ".join(names))
    parser.add_argument("data", metavar="DATA", type=Path, help="what main.py takes as --data_path")
    parser.add_argument("out", metavar="OUT", type=Path, help="must not exist")
    parser.add_argument("--count", type=int, default=CALIBRATION_IMAGES, metavar="N", help="number of images")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = get_args_parser().parse_args(argv)
    check_directory(args.data, "DATA", "name the one that holds the data set")
    if args.out.exists():
        raise InputError(f"OUT {args.out}: exists; remove it or name another directory")
    try:
        dataset = DATA_SETS[args.data_set].build(args.data, True, lambda image: image, False)
    except UNREADABLE as error:
        raise InputError(f"DATA {args.data}: cannot read {args.data_set} ({error})") from error
    if not 1 <= args.count <= len(dataset):
        raise InputError(f"--count {args.count}: give a number from 1 to {len(dataset)}")
    with new_directory(args.out, "OUT") as whole:
        for index in draw(len(dataset), args.count, args.seed):
            dataset[index][0].save(whole / f"{index:05}.png")
    print(f"{args.out}: {args.count} of {len(dataset):,} training images of {args.data_set}")


if __name__ == "__main__":
    run_program("calibration_images.py", main)
