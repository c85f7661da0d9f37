#!/usr/bin/env python3
"""Make one arm's first weights, and probe them: what are their features worth before any training?

python experiments/rivals/first_weights.py taylor OUT -- --config experiments/vit_half_112.yaml:flowers ...

What follows -- are the options of main.py that train the student, with class folders of images. The program writes
OUT/weights.pth for main.py's --initialize and OUT/facts.json: ``seconds`` of CPU time that the weights took,
``seconds_classifier`` that a classifier in closed form takes on their features of the training images, and ``probe``,
its accuracy in percent on the test images.
"""

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository's modules
sys.path.insert(0, str(Path(__file__).parents[1]))  # and the experiments'
import torch

from distributed.program import find_launch
from distributed.stop_coordinator import StopCoordinator
from engine import evaluate
from rivals.arms import ABLATIONS, ARMS, TEACHER, Pair, arm
from training.first_classifier import fit_first_classifier
from training.options import Options, parse_args, share_batch
from training.setup import build_model, build_train_state, complete_options, open_data
from weight_selection.arguments import Parser
from weight_selection.errors import run_program
from weight_selection.files import new_directory, write_json
from weight_selection.sources.timm_models import create_model


def options_of(words: list) -> Options:
    """Complete options of main.py."""
    return complete_options(share_batch(parse_args(words), 1), 0)


def open_teacher(name: str, path: Path | None, side: int) -> torch.nn.Module:
    """timm's teacher with its trained weights, positions resampled for images of this side in pixels."""
    file = {} if path is None else {"pretrained_cfg_overlay": {"file": str(path)}}
    return create_model(name, option="--teacher", input_size=side, pretrained=True, **file).eval()


def probe(options: Options) -> tuple[float, float]:
    """(accuracy in percent on the test images of a classifier in closed form, CPU seconds of fitting it)."""
    data, launch = open_data(options), find_launch(os.environ)
    with StopCoordinator(options.timeout) as coordinator:
        model = build_model(options, data.classes)
        state = build_train_state(options, model, None, torch.device("cpu"), launch, coordinator, 1, data.classes)
        start = time.process_time()
        fit_first_classifier(options, state, data)
        seconds = time.process_time() - start
        return evaluate(model, data.test_loader(options, state), state)["acc1"], seconds


def get_args_parser() -> Parser:
    parser = Parser("first_weights.py", __doc__)
    parser.add_argument("arm", metavar="ARM", choices=ARMS | ABLATIONS, help=", ".join(ARMS | ABLATIONS))
    parser.add_argument("out", metavar="OUT", type=Path, help="must not exist")
    parser.add_argument("--teacher", default=TEACHER, metavar="NAME", help="a name of timm (default: %(default)s)")
    parser.add_argument("--teacher_path", type=Path, metavar="FILE", help="its weights (default: from the hub)")
    parser.add_argument("--others", type=Path, metavar="DIR", help="class folders of another data set's images")
    parser.add_argument("options", nargs="+", help="options of main.py, after --")
    return parser


def main(argv=None) -> None:
    args = get_args_parser().parse_args(argv)
    options = options_of(args.options)
    student = build_model(options, open_data(options).classes)
    teacher = open_teacher(args.teacher, args.teacher_path, options.input_size)
    with new_directory(args.out, "OUT") as whole:
        start = time.process_time()
        folder = Path(options.data_path) / "train"
        weights = arm(args.arm)(Pair(teacher, student, folder, options.seed, others=args.others))
        seconds = time.process_time() - start
        torch.save(weights, whole / "weights.pth")
        accuracy, fitting = probe(options_of([*args.options, "--initialize", str(whole / "weights.pth")]))
        write_json(
            whole / "facts.json",
            {"arm": args.arm, "seconds": seconds, "seconds_classifier": fitting, "probe": accuracy},
        )


if __name__ == "__main__":
    run_program("first_weights.py", main)
