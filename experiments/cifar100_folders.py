#!/usr/bin/env python3
"""Write CIFAR-100 as class folders, all of it or only some images or classes.

python experiments/cifar100_folders.py data/ cifar100_50/ --train 50
python main.py --data_set image_folder --data_path cifar100_50/ ...

DATA is the --data_path of --data_set CIFAR100: it holds cifar-100-python/, which is downloaded if it is missing. The
script writes OUT/train/CLASS/NNN.png, the first --train training images of each class in the data set's order, and
OUT/val/CLASS/NNN.png, all test images.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the repository's modules
from torchvision.datasets import CIFAR100

from datasets import UNREADABLE
from weight_selection.arguments import Parser
from weight_selection.errors import InputError, run_program
from weight_selection.files import new_directory


def open_cifar100(root: Path, train: bool) -> CIFAR100:
    """Open the training or the test images below ``root``; download them if they are missing.

    Raises:
        InputError: they cannot be read or downloaded.
    """
    try:
        return CIFAR100(root, train=train, download=True)
    except UNREADABLE as error:
        raise InputError(f"DATA {root}: holds no complete CIFAR-100, and it cannot be downloaded ({error})") from error


def by_class(dataset: CIFAR100) -> dict:
    """{name of a class: indices of its images}, in the data set's order."""
    indices = {name: [] for name in dataset.classes}
    for index, label in enumerate(dataset.targets):
        indices[dataset.classes[label]].append(index)
    return indices


def write(dataset: CIFAR100, indices: dict, directory: Path) -> None:
    """Write the images of each class, given by their indices, as DIRECTORY/CLASS/NNN.png."""
    for name, found in indices.items():
        (directory / name).mkdir(parents=True)
        for number, index in enumerate(found):
            dataset[index][0].save(directory / name / f"{number:03}.png")


def get_args_parser() -> Parser:
    parser = Parser("cifar100_folders.py", __doc__)
    parser.add_argument("data", metavar="DATA", type=Path)
    parser.add_argument("out", metavar="OUT", type=Path, help="must not exist")
    parser.add_argument("--train", type=int, metavar="N", help="training images per class (default: all)")
    parser.add_argument(
        "--classes",
        type=int,
        nargs=2,
        metavar=("FROM", "TO"),
        help="only these of the 100, by number from 0, without the last (default: all)",
    )
    return parser


def main(argv=None) -> None:
    args = get_args_parser().parse_args(argv)
    if args.train is not None and args.train < 1:
        raise InputError(f"--train {args.train}: give a number from 1 up")
    first, end = args.classes or (0, 100)
    if not 0 <= first < end <= 100:
        raise InputError(f"--classes {first} {end}: give two numbers from 0 to 100, the smaller one first")
    if args.out.exists():
        raise InputError(f"OUT {args.out}: exists; remove it or name another directory")
    if not args.data.is_dir():
        raise InputError(f"DATA {args.data}: no such directory; make it, and CIFAR-100 is downloaded into it")
    train, test = open_cifar100(args.data, train=True), open_cifar100(args.data, train=False)
    training, testing = (dict(list(by_class(dataset).items())[first:end]) for dataset in (train, test))
    if args.train is not None and args.train > (fewest := min(map(len, training.values()))):
        raise InputError(f"--train {args.train}: a class has only {fewest} training images")
    training = {name: indices[: args.train] for name, indices in training.items()}
    with new_directory(args.out, "OUT") as whole:
        write(train, training, whole / "train")
        write(test, testing, whole / "val")
    images, tests = (sum(map(len, chosen.values())) for chosen in (training, testing))
    print(f"{args.out}: {images:,} training and {tests:,} test images of {len(training)} classes")


if __name__ == "__main__":
    run_program("cifar100_folders.py", main)
