#!/usr/bin/env python3
"""Half of a ViT's hidden units go, the classifier stays, nothing is trained: how often does it agree with its teacher?

python experiments/rivals/halved.py FOLDERS --teacher_path FILE

FOLDERS holds class folders in train/ and val/, as run.py writes them to OUT/data/. As many images of train calibrate as
projection takes by default; --images of val are classified, in 1000 classes, by the teacher and by each student of
mlp_ratio 2: by plain selection, by CORP (2602.05243), and by project.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository's modules
sys.path.insert(0, str(Path(__file__).parents[1]))  # and the experiments'
import torch

from rivals.arms import TEACHER, Pair
from rivals.corp import compensated
from rivals.first_weights import open_teacher
from weight_selection import select_weights
from weight_selection.agreement import top1_classes
from weight_selection.arguments import Parser
from weight_selection.errors import run_program
from weight_selection.sources.timm_models import create_model

BATCH_SIZE = 64


def classes(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """The model's first choice for each image, int64 (images,)."""
    return torch.cat([top1_classes(model, batch)[0] for batch in images.split(BATCH_SIZE)])


def get_args_parser() -> Parser:
    parser = Parser("halved.py", __doc__)
    parser.add_argument("folders", metavar="FOLDERS", type=Path)
    parser.add_argument(
        "--teacher_path", type=Path, metavar="FILE", help="the teacher's weights (default: from the hub)"
    )
    parser.add_argument("--images", type=int, default=512, help="of val (default: %(default)s)")
    parser.add_argument("--side", type=int, default=224, help="of the images, in pixels (default: %(default)s)")
    return parser


def main(argv=None) -> None:
    args = get_args_parser().parse_args(argv)
    teacher = open_teacher(TEACHER, args.teacher_path, args.side)
    student = create_model(
        "vit_tiny", option="FOLDERS", img_size=args.side, mlp_ratio=2, num_classes=teacher.num_classes
    )
    calibration = Pair(teacher, student, args.folders / "train", seed=0).images
    images = Pair(teacher, student, args.folders / "val", seed=0, count=args.images).images
    theirs = classes(teacher, images)
    units = student.blocks[0].mlp.fc1.out_features
    made = {
        "selection": lambda: select_weights(teacher, student, include_head=True),
        "CORP": lambda: compensated(teacher, calibration, units),
        "project": lambda: select_weights(
            teacher, student, include_head=True, element_selection="project", calibration=calibration
        ),
    }
    for name, make in made.items():
        start = time.process_time()
        student.load_state_dict(make())
        seconds = time.process_time() - start
        agreement = 100 * (classes(student, images) == theirs).double().mean()
        print(
            f"{name}: agrees with its teacher on {agreement:.1f} % of {len(images)} images; {seconds:.0f} CPU seconds"
        )


if __name__ == "__main__":
    run_program("halved.py", main)
