#!/usr/bin/env python3
"""Predict the classes of images with a model that main.py trained.

python scripts/predict.py RUN photo.jpg more_photos/ list.txt
python scripts/predict.py RUN photos/ --format csv --output predictions.csv

RUN is the output directory of a run, or a checkpoint. An image is a file, any image in a directory and below it, or a
line of a .txt file. It is brought to the model exactly as a test image of the run is.
"""

import contextlib
import csv
import json
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import TextIO

sys.path.insert(0, str(Path(__file__).parents[1]))  # the repository's modules
from distributed.program import run_program
from weight_selection.arguments import Parser
from weight_selection.errors import InputError, printable
from weight_selection.files import Damaged, check_writable, new_file, read_text
from weight_selection.image_files import IMAGE_SUFFIXES

STAND_IN = 0  # label of the black image that stands in for one that cannot be read; the others count from 1


def find_images(words: list[str]) -> list[Path]:
    """The image files that words of the command line name: files, directories, and .txt files with a path a line.

    Raises:
        InputError: a path does not exist, a list cannot be read, or a directory or list has no images.
    """
    images = []
    for word in words:
        path = Path(word)
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())
        elif not path.is_file():
            raise InputError(f"{word}: no such file or directory")
        elif path.suffix == ".txt":
            found = _listed(path)
        else:
            found = [path]
        if not found:
            raise InputError(f"{word}: no images in it ({', '.join(IMAGE_SUFFIXES)})")
        images += found
    return images


def _listed(path):
    """The files that a list names; a relative path is taken from the list's own directory."""
    try:
        found = [path.parent / line.strip() for line in read_text(path).splitlines() if line.strip()]
        missing = next((file for file in found if not file.is_file()), None)
    except (Damaged, OSError) as error:  # of a text that is no list, a line can be too long for a path
        raise InputError(f"{path}: is no list of paths ({error})") from error
    if missing is not None:
        raise InputError(f"{path}: lists {printable(missing)}, which is no file")
    return found


def predict_images(
    trained: "TrainedModel",  # noqa: F821
    images: list[Path],
    args: Namespace,
) -> tuple[list[dict], list[str]]:
    """Predict images in their order.

    Returns:
        ([{"image": path, "predictions": [{"class", "label", "probability"}, most probable first]}] of the images that
        can be read, messages about those that cannot).
    """
    import torch

    from datasets import ImageFiles, to_pixels
    from engine import predict
    from input_pipeline.loader import EvalSampler, eval_loader
    from input_pipeline.placement import build_pipeline
    from training.setup import complete_options
    from utils import Progress

    machine = {"device": args.device, "num_workers": args.num_workers, "eval_batch_size": args.batch_size}
    options = complete_options(trained.options.replace(**machine), local_rank=0)
    device = torch.device(options.device)
    numbered = ImageFiles(zip(images, range(STAND_IN + 1, len(images) + 1), strict=True), to_pixels)
    sampler, problems = EvalSampler(range(len(images)), 0, 1), []
    skipped = SimpleNamespace(add=problems.extend)  # takes each batch's messages about images that cannot be read
    loader = eval_loader(numbered, build_pipeline(options, train=False), sampler, options, device, skipped)
    rows = []
    with Progress("images", sampler.most_batches(args.batch_size), lines=0) as progress:
        for logits, labels in predict(trained.model.to(device), loader, None):
            best = logits.softmax(1).topk(min(args.top_k, logits.shape[1]))
            values = labels.tolist(), best.values.tolist(), best.indices.tolist()
            for number, shares, classes in zip(*values, strict=True):
                predictions = [
                    {"class": trained.class_names[label], "label": label, "probability": share}
                    for label, share in zip(classes, shares, strict=True)
                ]
                if number != STAND_IN:
                    rows.append({"image": str(images[number - 1]), "predictions": predictions})
            progress.step(str)
    return rows, problems


def write_table(rows: list[dict], file: TextIO) -> None:
    """Write a line for each image, for people: its path, then classes with their probabilities in percent."""
    width = max(len(printable(row["image"])) for row in rows)
    names = max(len(printable(each["class"])) for row in rows for each in row["predictions"])
    for row in rows:
        pairs = ((printable(each["class"]), 100 * each["probability"]) for each in row["predictions"])
        cells = "  ".join(f"{name:<{names}} {percent:5.1f} %" for name, percent in pairs)
        print(f"{printable(row['image']):<{width}}  {cells}", file=file)


def write_csv(rows: list[dict], file: TextIO) -> None:
    """Write a line for each image; the first line names the columns."""
    ranks = range(1, len(rows[0]["predictions"]) + 1)
    writer = csv.writer(file)
    writer.writerow(["image", *(f"{what}_{rank}" for rank in ranks for what in ("class", "probability"))])
    for row in rows:
        pairs = ((each["class"], f"{each['probability']:.6f}") for each in row["predictions"])
        writer.writerow([row["image"], *(value for pair in pairs for value in pair)])


def write_json(rows: list[dict], file: TextIO) -> None:
    """Write a list of objects with the image's path and its predictions."""
    json.dump(rows, file, indent=2)
    file.write("\n")


FORMATS = {"table": write_table, "csv": write_csv, "json": write_json}


def get_args_parser() -> Parser:
    parser = Parser("predict.py", __doc__)
    parser.add_argument("run", metavar="RUN", help="output directory of a run of main.py, or a checkpoint")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files, directories, .txt files of paths")
    parser.add_argument("--top_k", type=int, default=5, metavar="K", help="classes for each image")
    parser.add_argument("--format", choices=tuple(FORMATS), default="table", help="of the output")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where to write; the terminal when not given")
    parser.add_argument("--overwrite", action="store_true", help="replace the file of --output")
    parser.add_argument("--ema", action="store_true", help="take the moving average of the weights")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="cuda where there is one when not given")
    parser.add_argument("--batch_size", type=int, default=64, metavar="IMAGES", help="at once")
    parser.add_argument("--num_workers", type=int, default=2, metavar="N", help="loader processes")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = get_args_parser().parse_args(argv)
    for name, least in (("top_k", 1), ("batch_size", 1), ("num_workers", 0)):
        if getattr(args, name) < least:
            raise InputError(f"--{name} {getattr(args, name)}: give a number from {least} up")
    if args.output and args.output.exists() and not args.overwrite:
        raise InputError(f"--output {args.output}: exists; add --overwrite to replace it")
    images = find_images(args.images)
    from training.trained_model import open_trained  # imports torch, which takes seconds

    with contextlib.redirect_stdout(sys.stderr):  # a program may read the output, where predictions alone belong
        trained = open_trained(args.run, "RUN", args.ema)
        if args.output:
            check_writable(args.output.parent, "--output")
        rows, problems = predict_images(trained, images, args)
        for problem in problems:
            print(f"warning: {problem}; skipped")
        if problems:
            print(f"warning: {len(problems)} of {len(images)} images skipped")
    if not rows:
        raise InputError("none of the images can be read")
    if args.output is None:
        FORMATS[args.format](rows, sys.stdout)
        return
    with new_file(args.output) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        FORMATS[args.format](rows, file)
    print(f"predictions of {len(rows)} images: {args.output}", file=sys.stderr)


if __name__ == "__main__":
    run_program("predict.py", main)
