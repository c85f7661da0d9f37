#!/usr/bin/env python3
"""Make the images of docs/tutorial.md: drawn patterns to pretrain on, and pieces of two photographs to train on.

python scripts/tutorial_images.py DIR

DIR/patterns and DIR/photographs are class folders, train/CLASS/IMAGE.png and val/CLASS/IMAGE.png; DIR/sheet.png shows
some of each class. The photographs come with scikit-learn. All is grey: colour alone would give most classes away.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))  # the repository's modules
from weight_selection.arguments import Parser
from weight_selection.errors import InputError, run_program
from weight_selection.files import new_directory

SIDE = 48  # pixels of every image
PATTERNS = {"train": 120, "val": 30}  # images of each class
PHOTOGRAPHS = {"train": 12, "val": 40}

# Class: (photograph, the boxes of training and test images as top, left, height, width in pixels).
REGIONS = {
    "pagoda": ("china.jpg", (120, 80, 230, 115), (120, 195, 230, 130)),
    "petals": ("flower.jpg", (100, 190, 240, 110), (100, 310, 240, 110)),
    "sky": ("china.jpg", (0, 330, 180, 150), (0, 480, 130, 160)),
    "trees": ("china.jpg", (330, 0, 97, 200), (300, 400, 127, 240)),
    "water": ("china.jpg", (200, 340, 100, 90), (200, 430, 90, 110)),
}


def draw_patterns() -> dict:
    """{class: function of coordinates x and y, in waves, that gives values from -1 to 1}."""
    sine = lambda phase: np.sin(2 * np.pi * phase)  # noqa: E731
    return {
        "checks": lambda x, y: np.sign(sine(x) * sine(y)),
        "dots": lambda x, y: np.where(np.hypot(x % 1 - 0.5, y % 1 - 0.5) < 0.3, 1, -1),
        "grid": lambda x, y: np.where((x % 1 < 0.2) | (y % 1 < 0.2), 1, -1),
        "rings": lambda x, y: sine(np.hypot(x, y)),
        "ripples": lambda x, y: sine(x + 0.3 * sine(y)),
        "stripes": lambda x, y: np.sign(sine(x)),
        "tiles": lambda x, y: 2 * ((x + 0.5 * np.floor(y % 2)) % 1) - 1,
        "waves": lambda x, y: sine(x) * sine(y),
    }


def pattern(draw: Callable, rng: np.random.Generator) -> np.ndarray:
    """A grey image of a pattern, turned, scaled, moved and lit at random, with noise."""
    angle, scale, (dx, dy) = rng.uniform(0, 2 * np.pi), rng.uniform(2, 5) / SIDE, rng.uniform(-1, 1, 2)
    y, x = np.mgrid[:SIDE, :SIDE] - SIDE / 2
    turned = np.cos(angle) * x - np.sin(angle) * y, np.sin(angle) * x + np.cos(angle) * y
    values = draw(scale * turned[0] + dx, scale * turned[1] + dy)
    return rng.uniform(90, 160) + rng.uniform(30, 80) * values + rng.normal(0, 20, values.shape)


def piece(photograph: np.ndarray, box: tuple, rng: np.random.Generator) -> np.ndarray:
    """A square piece of a box in a grey photograph, of 32 to 96 pixels, lit at random: no class is always bright."""
    top, left, height, width = box
    side = rng.integers(32, min(height, width, 96) + 1)
    y, x = top + rng.integers(height - side + 1), left + rng.integers(width - side + 1)
    image = Image.fromarray(photograph[y : y + side, x : x + side]).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    values = np.asarray(image, float)
    return rng.uniform(90, 160) + rng.uniform(0.7, 1.3) * (values - values.mean()) + rng.normal(0, 4, values.shape)


def save(pixels: np.ndarray, path: Path) -> None:
    """Write a grey image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8)).save(path)


def make_patterns(directory: Path, rng: np.random.Generator) -> None:
    """Fill a directory with class folders of patterns."""
    for part, count in PATTERNS.items():
        for name, draw in draw_patterns().items():
            for number in range(count):
                save(pattern(draw, rng), directory / part / name / f"{number:03}.png")


def make_photographs(directory: Path, rng: np.random.Generator) -> None:
    """Fill a directory with class folders of pieces of photographs; test images are of other parts of them."""
    from sklearn.datasets import load_sample_image

    for name, (file, *boxes) in REGIONS.items():
        grey = np.asarray(Image.fromarray(load_sample_image(file)).convert("L"))
        for (part, count), box in zip(PHOTOGRAPHS.items(), boxes, strict=True):
            for number in range(count):
                save(piece(grey, box, rng), directory / part / name / f"{number:03}.png")


def make_sheet(directory: Path, columns: int = 10) -> None:
    """Write sheet.png: a row of training images of each class of the two sets."""
    classes = sorted(directory.glob("*/train/*"))
    sheet = Image.new("L", (columns * SIDE, len(classes) * SIDE))
    for row, folder in enumerate(classes):
        for column, path in enumerate(sorted(folder.iterdir())[:columns]):
            sheet.paste(Image.open(path), (column * SIDE, row * SIDE))
    sheet.save(directory / "sheet.png")


def main(argv: list[str] | None = None) -> None:
    parser = Parser("tutorial_images.py", "Make the images of docs/tutorial.md.")
    parser.add_argument("directory", metavar="DIR", type=Path, help="to make")
    directory = parser.parse_args(argv).directory
    if directory.exists():
        raise InputError(f"DIR {directory}: exists; name another, or remove it")
    with new_directory(directory, "DIR") as new:
        rng = np.random.default_rng(0)
        make_patterns(new / "patterns", rng)
        make_photographs(new / "photographs", rng)
        make_sheet(new)
    print(f"images: {directory}/patterns and {directory}/photographs")


if __name__ == "__main__":
    run_program("tutorial_images.py", main)
