#!/usr/bin/env python3
"""Make the stand-ins that SMOKE=1 runs on: a teacher with random weights, and images of three colours.

python scripts/smoke.py runs/smoke/images
python scripts/smoke.py runs/smoke/teachers/NAME.pth --teacher NAME --teacher_kwargs embed_dim=48 depth=4 num_heads=6
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))  # the repository's modules
from utils import seed_everything
from weight_selection.arguments import Kwargs, Parser
from weight_selection.errors import InputError, run_program
from weight_selection.files import new_directory, new_file
from weight_selection.sources.timm_models import create_model
from weight_selection.sources.weight_files import write_weights

COLOURS = {"blue": (40, 60, 200), "green": (60, 190, 70), "red": (200, 50, 50)}
PIXELS, TRAIN_IMAGES, TEST_IMAGES = 32, 16, 6


def write_images(path: Path) -> None:
    """Write train/ and val/ with class folders, each of noise around one colour; all of it or nothing."""
    rng = np.random.default_rng(0)
    with new_directory(path, "PATH") as root:
        for part, images in (("train", TRAIN_IMAGES), ("val", TEST_IMAGES)):
            for number in range(images):
                name = list(COLOURS)[number % len(COLOURS)]
                pixels = rng.normal(COLOURS[name], 40, (PIXELS, PIXELS, 3)).clip(0, 255).astype(np.uint8)
                (root / part / name).mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(root / part / name / f"{number}.png")


def write_teacher(path: Path, name: str, kwargs: dict) -> None:
    """Write random weights of a model that takes images of PIXELS and has a classifier for COLOURS."""
    seed_everything(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    model = create_model(name, option="--teacher", input_size=PIXELS, num_classes=len(COLOURS), **kwargs)
    with new_file(path) as temporary:
        write_weights(model.state_dict(), temporary)


def main(argv: list[str] | None = None) -> None:
    parser = Parser("smoke.py", "Make tiny images, or a tiny teacher with random weights.")
    parser.add_argument("path", metavar="PATH", type=Path, help="directory of images, or file of weights, to make")
    parser.add_argument("--teacher", metavar="NAME", help="any timm name")
    parser.add_argument("--teacher_kwargs", nargs="*", default={}, action=Kwargs, metavar="K=V")
    args = parser.parse_args(argv)
    if args.teacher_kwargs and not args.teacher:
        raise InputError("--teacher_kwargs: has no effect without --teacher; leave it out")
    if args.path.exists():
        raise InputError(f"PATH {args.path}: exists; remove it, or choose another")
    if args.teacher:
        write_teacher(args.path, args.teacher, args.teacher_kwargs)
    else:
        write_images(args.path)


if __name__ == "__main__":
    run_program("smoke.py", main)
