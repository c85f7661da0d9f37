"""Which runs the arena wants: its students, and the settings that its finished runs have chosen for each arm."""

import json
from dataclasses import dataclass
from pathlib import Path

from rivals.arms import ABLATIONS, ARMS, CEILING, FINAL, TEACHER

RESULTS = Path(__file__).with_name("results.jsonl")
EPOCHS = {"flowers": 20, "cifar100": 12}  # of the recipes
VIT = "experiments/vit_half_112.yaml"


@dataclass(frozen=True)
class Student:
    """A student of the arena.

    Attributes:
        recipe: options of main.py; the section of each data set bears its name.
        teacher: timm's name of its teacher.
        arms: that can make its first weights, in the order of their runs.
        changes: further options of main.py.
        tuned_as: the student whose settings it takes, if not its own.
    """

    recipe: str
    teacher: str
    arms: tuple[str, ...]
    changes: tuple[str, ...] = ()
    tuned_as: str | None = None


STUDENTS = {
    "vit_half": Student(VIT, TEACHER, tuple(arm for arm in ARMS if not arm.endswith(("_uniform", "_quadratic")))),
    **{  # as many parameters, in fewer and wider layers
        f"vit_{depth}_layers": Student(
            VIT,
            TEACHER,
            ("project_uniform", "project", "selection"),
            ("--model_kwargs", f"embed_dim={width}", "num_heads=3", f"depth={depth}"),
        )
        for width, depth in ((120, 8), (144, 5), (192, 3))
    },
    "vit_a": Student(  # half as deep, and as wide as the teacher
        "experiments/vit_a_112.yaml",
        TEACHER,
        ("selection", "selection_uniform", "selection_quadratic", "project_uniform", "project_quadratic", "random"),
    ),
    "lite0_half": Student(
        "experiments/efficientnet_half.yaml", "tf_efficientnet_lite0.in1k", ("greedy", "selection", "taylor", "random")
    ),
    "lite0": Student(  # shallower than its teacher too, which Torch-Pruning cannot make it
        "experiments/efficientnet_half.yaml",
        "tf_efficientnet_lite2.in1k",
        ("greedy_uniform", "greedy", "selection", "random"),
        ("--model_kwargs", "channel_multiplier=1.0"),
        "lite0_half",
    ),
}
FIRST = (5e-4, 1e-3)  # the learning rates that decide whether an arm goes on
RATES = 4  # at least so many are tried for an arm that goes on
CEILING_RATES = (5e-4, 2.5e-4, 1e-3)  # of the ceiling, which takes four times as long
BEHIND = 10  # points
KEY = ("student", "data", "arm", "epochs", "lr", "classifier", "seed", "phase")


def key_of(row: dict) -> tuple:
    """What makes a run another run."""
    return tuple(row[name] for name in KEY)


def read_results(path: Path) -> list[dict]:
    """The finished runs."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def of_student(rows: list[dict], student: str) -> list[dict]:
    """A student's finished runs; those of its tuning may be another student's."""
    tuned_as = STUDENTS[student].tuned_as or student
    return [row for row in rows if row["student"] == (tuned_as if row["phase"] == "tune" else student)]


def tuning_rows(rows: list[dict], arm: str) -> list[dict]:
    """The finished runs of an arm's tuning."""
    return [row for row in rows if row["phase"] == "tune" and row["arm"] == arm]


def tuned(rows: list[dict], arm: str) -> dict | None:
    """The best run of an arm's tuning."""
    return max(tuning_rows(rows, arm), key=lambda row: row["accuracy"], default=None)


def finalists(rows: list[dict]) -> list[str]:
    """FINAL, the best of the other arms so far, and the ceiling."""
    others = [best for arm in ARMS if arm not in (*FINAL, CEILING) and (best := tuned(rows, arm))]
    return [*FINAL, *(best["arm"] for best in sorted(others, key=lambda row: -row["accuracy"])[:1]), CEILING]


def tuning(rows: list[dict], arms: list[str], student: str, rates: list[float] | None) -> list[dict]:
    """The runs of the tuning: at the given learning rates, or as far as the finished ones show that they are wanted."""
    going = [arm for arm in arms if arm != CEILING]
    wanted = [(lr, "ridge", arm) for lr in rates or FIRST for arm in going]
    wanted += [(lr, "ridge", CEILING) for lr in rates or CEILING_RATES if CEILING in arms]
    if not rates:
        wanted += [(*_next_setting(rows, arm), arm) for arm in going if _goes_on(rows, arm)]
    keys = [(student, "flowers", arm, EPOCHS["flowers"], lr, classifier, 0, "tune") for lr, classifier, arm in wanted]
    return [dict(zip(KEY, key, strict=True)) for key in keys]


def _goes_on(rows, arm):
    first = [row for row in rows if row["phase"] == "tune" and row["lr"] in FIRST and row["classifier"] == "ridge"]
    own = [row["accuracy"] for row in first if row["arm"] == arm]
    best = max((row["accuracy"] for row in first if row["arm"] != CEILING), default=0)
    return len(own) == len(FIRST) and (arm in finalists(rows) or max(own) > best - BEHIND)


def _next_setting(rows, arm):
    """A rate beyond the best while that is at an end, or too few are tried; then the best with a random classifier."""
    rates = sorted(row["lr"] for row in tuning_rows(rows, arm) if row["classifier"] == "ridge")
    best = tuned(rows, arm)["lr"]
    if best == rates[0]:
        return best / 2, "ridge"
    if best == rates[-1] or len(rates) < RATES:
        return rates[-1] * 2, "ridge"
    return best, "random"


def ablated(student: str) -> list[str]:
    """The student's projections, and their ablations."""
    return [arm for arm in ("project", "greedy", *ABLATIONS) if _whole(arm) in STUDENTS[student].arms]


def _whole(arm):
    return arm.partition("_")[0]  # project of project_noise


def ablating(rows: list[dict], arms: list[str], student: str, seeds: int) -> list[dict]:
    """The runs of projections and their ablations on validation images, at the settings of the tuned projection."""
    best = [(arm, row) for arm in arms if (row := tuned(rows, _whole(arm)))]
    return [
        {name: row[name] for name in KEY} | {"student": student, "arm": arm, "seed": seed, "phase": "ablate"}
        for seed in range(seeds)
        for arm, row in best
    ]


def testing(rows: list[dict], arms: list[str] | None, student: str, data: str, epochs: int, seeds: int) -> list[dict]:
    """The runs of arms, by default the finalists, on test images at the settings of the tuning; seed 0 comes first."""
    arms = arms or [arm for arm in finalists(rows) if arm in STUDENTS[student].arms]
    best = [row for arm in arms if (row := tuned(rows, arm))]
    changes = {"student": student, "data": data, "epochs": epochs, "phase": "test"}
    return [{name: row[name] for name in KEY} | changes | {"seed": seed} for seed in range(seeds) for row in best]
