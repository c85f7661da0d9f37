#!/usr/bin/env python3
"""Export a model that main.py trained, for programs that do not know this repository.

python scripts/export.py RUN --format hub --output exported/
python scripts/export.py RUN --format onnx --output exported.onnx

hub          a directory that timm.create_model("local-dir:DIR", pretrained=True) opens, or a repository of the
             Hugging Face hub: config.json, model.safetensors, README.md
safetensors  a file of the weights, which says in its metadata what model they are of
onnx         a file that ONNX Runtime and others run, for any number of images at once

RUN is the output directory of a run, or a checkpoint. What is written is opened again, and its outputs are compared
with the model's own on images: those of --images, or else test images of the run, or else noise. A model card comes
with it.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the repository's modules
from model_card import path_beside
from predict import find_images
from weight_selection.arguments import Parser
from weight_selection.errors import InputError, run_program
from weight_selection.files import check_no_file, without_empty_directories

PACKAGES = {"hub": (), "safetensors": (), "onnx": ("onnx", "onnxscript", "onnxruntime")}  # format -> what it needs


def check_format(name: str) -> None:
    """Raise InputError unless the packages are installed that a format needs."""
    for package in PACKAGES[name]:
        if find_spec(package) is None:
            raise InputError(
                f'--format {name}: the package {package} is not installed; run: pip install "weight-selection[{name}]"'
            )


def check_output(output: str, name: str, overwrite: bool) -> None:
    """Raise InputError unless a format can be written there without losing anything."""
    path = Path(output)
    if name == "hub":
        check_no_file(output, "--output")
        written = [path / file for file in ("config.json", "model.safetensors", "README.md")]
    else:
        if path.suffix != f".{name}" or path.is_dir():
            raise InputError(f"--output {output}: name a file that ends in .{name}")
        written = [path, path_beside(path)]
    existing = next((file for file in written if file.exists()), None)
    if existing is not None and not overwrite:
        raise InputError(f"--output {output}: {existing.name} exists; add --overwrite to replace it")


def get_args_parser() -> Parser:
    parser = Parser("export.py", __doc__)
    parser.add_argument("run", metavar="RUN", help="output directory of a run of main.py, or a checkpoint")
    parser.add_argument("--format", choices=tuple(PACKAGES), required=True)
    parser.add_argument("--output", required=True, metavar="PATH", help="directory or file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    parser.add_argument("--ema", action="store_true", help="take the moving average of the weights")
    words = "image files, directories, .txt files of paths: what the outputs are compared on"
    parser.add_argument("--images", nargs="+", default=[], metavar="IMAGE", help=words)
    return parser


def main(argv: list[str] | None = None) -> None:
    args = get_args_parser().parse_args(argv)
    check_format(args.format)
    check_output(args.output, args.format, args.overwrite)
    images = find_images(args.images)
    from timm.layers import set_fused_attn  # these import torch, which takes seconds

    import export_formats
    from training.trained_model import open_trained

    set_fused_attn(False)  # as in training on a CPU; MaxViT's fused attention cannot be converted to ONNX
    trained = open_trained(args.run, "RUN", args.ema)
    comparison = export_formats.Comparison(trained, images)
    with without_empty_directories(args.output):
        export_formats.WRITE[args.format](trained, Path(args.output), comparison)
    print(f"{args.output}: {trained.options.model} of {len(trained.class_names)} classes")


if __name__ == "__main__":
    run_program("export.py", main)
