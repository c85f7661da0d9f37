#!/usr/bin/env python3
"""Print the table of the arena, and plot accuracy against learning rate and epochs, from results.jsonl.

python experiments/rivals/table.py --figure docs/rivals.png
python experiments/rivals/table.py --ablations
"""

import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
sys.path.insert(0, str(Path(__file__).parents[2]))  # the repository's modules
sys.path.insert(0, str(Path(__file__).parents[1]))  # and the experiments'
from rivals.arms import ARMS
from rivals.schedule import EPOCHS, RESULTS, STUDENTS, ablated, finalists, of_student, read_results, tuning_rows
from weight_selection.arguments import Parser
from weight_selection.errors import InputError, run_program

TITLES = {  # of arms whose names do not say it all
    "selection": "weight selection (uniform)",
    "consecutive": "weight selection (consecutive)",
    "random_consistent": "weight selection (random with consistency)",
    "random": "random (timm)",
    "kaiming": "random (Kaiming)",
    "minitron": "activation-ranked pruning (Minitron's)",
    "l2": "Torch-Pruning, L2",
    "taylor": "Torch-Pruning, Taylor",
    "hessian": "Torch-Pruning, Hessian",
    "subcloning": "weight subcloning",
    "front": "FRONT",
    "teacher": "*the ceiling:* the whole teacher",
}
TITLES |= {  # without these words, the first layers are kept
    f"{arm}_{rule}": f"{TITLES.get(arm, arm)}, {words} layers"
    for arm in ("project", "greedy", "selection")
    for rule, words in {"uniform": "evenly spaced", "quadratic": "quadratic"}.items()
}


def spread(values: list[float], digits: int = 1) -> str:
    """Mean and, of several values, standard deviation."""
    mean = f"{statistics.mean(values):.{digits}f}" if values else ""
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def tests(rows: list[dict], arm: str, data: str, epochs: int | None = None) -> list[dict]:
    """An arm's runs on test images, of one length or of all."""
    found = [row for row in rows if (row["phase"], row["arm"], row["data"]) == ("test", arm, data)]
    return [row for row in found if epochs in (None, row["epochs"])]


def table(rows: list[dict], student: str, data: str, epochs: int) -> list[tuple]:
    """A head and a line for each arm: probe, validation accuracies, test accuracy, and the seconds before training.

    The best on test images come first, then the best on validation images. Of these each arm's best is bold; they are
    of a classifier in closed form at each learning rate, and of a random one. The tuning is on Flowers-102.
    """
    own = [row for row in rows if row["student"] == student]
    tunings = {arm: tuning_rows(own, arm) if data == "flowers" else [] for arm in ARMS}
    settings = {(row["classifier"], row["lr"]) for found in tunings.values() for row in found}
    columns = sorted({(kind, lr if kind == "ridge" else None) for kind, lr in settings}, key=lambda one: one[1] or 1)
    head = ["first weights", "probe", *(f"{lr:g}" if lr else "random classifier" for _, lr in columns)]
    lines = []
    for arm, found in tunings.items():
        tested = tests(rows, arm, data, epochs)
        if not found and not tested:
            continue
        best = max((row["accuracy"] for row in found), default=0)
        words = [TITLES.get(arm, arm), spread([row["probe"] for row in (found or tested)[:1]])]
        for kind, lr in columns:
            cell = [row["accuracy"] for row in found if row["classifier"] == kind and lr in (None, row["lr"])]
            words.append(f"**{cell[0]:.1f}**" if cell[:1] == [best] else spread(cell[:1]))
        words.append(spread([row["accuracy"] for row in tested]) + f" ({len(tested)})" * bool(tested))
        words.append(spread([statistics.mean(row["seconds_before"] for row in tested or found)], 0))
        lines.append((statistics.mean(row["accuracy"] for row in tested) if tested else 0, best, words))
    lines.sort(key=lambda line: line[:2], reverse=True)
    return [[*head, "test (seeds)", "CPU seconds before training"], *(words for *_, words in lines)]


def ablations(rows: list[dict], student: str) -> list[tuple]:
    """A head, and a line for each projection, and for each without a part or from other images."""
    found = {arm: [row for row in rows if (row["phase"], row["arm"]) == ("ablate", arm)] for arm in ablated(student)}
    lines = [
        (arm, *(spread([row[metric] for row in own]) for metric in ("probe", "accuracy")), str(len(own)))
        for arm, own in found.items()
        if own
    ]
    return [("first weights", "probe", "val", "seeds"), *lines]


def draw(rows: list[dict], data: str):
    """Validation accuracy against learning rate, from a classifier in closed form; test accuracy against epochs."""
    import style

    figure, panels = style.new_figure(2)
    for number, arm in enumerate(finalists(rows)):
        look = style.look(number)
        found = {row["lr"]: row["accuracy"] for row in tuning_rows(rows, arm) if row["classifier"] == "ridge"}
        if found:
            panels[0].plot(*zip(*sorted(found.items()), strict=True), markersize=4, label=arm, **look)
        by_epochs = {}
        for row in sorted(tests(rows, arm, data), key=lambda row: row["epochs"]):
            by_epochs.setdefault(row["epochs"], []).append(row["accuracy"])
        if by_epochs:
            style.draw_seeds(panels[1], list(by_epochs), list(by_epochs.values()), arm, **look)
    rates = sorted({row["lr"] for row in rows if row["phase"] == "tune"})
    panels[0].set(xscale="log", xlabel="learning rate", ylabel="validation accuracy, %")
    panels[0].set_xticks(rates, [f"{rate:g}" for rate in rates])
    panels[0].minorticks_off()
    panels[0].legend()
    panels[1].set(xlabel=f"epochs on {data}", ylabel=style.ACCURACY)
    return figure


def get_args_parser() -> Parser:
    parser = Parser("table.py", __doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FILE")
    parser.add_argument("--student", choices=STUDENTS, default="vit_half", help="default: %(default)s")
    parser.add_argument("--data", choices=EPOCHS, default="flowers", help="of the test (default: %(default)s)")
    parser.add_argument("--epochs", type=int, help="of the test (default: 20 of flowers, 12 of cifar100)")
    parser.add_argument("--ablations", action="store_true", help="the table of --phase ablate")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="also draw this figure")
    return parser


def main(argv=None) -> None:
    args = get_args_parser().parse_args(argv)
    rows = of_student(read_results(args.results), args.student)
    if args.ablations:
        head, *lines = ablations(rows, args.student)
    else:
        head, *lines = table(rows, args.student, args.data, args.epochs or EPOCHS[args.data])
    if not lines:
        which = f"no finished runs of {args.student} on {args.data}"
        raise InputError(f"--results {args.results}: {which}; experiments/rivals/run.py makes them")
    for words in (head, ["---"] * len(head), *lines):
        print(f"| {' | '.join(words)} |")
    if args.figure:
        import style

        style.save(draw(rows, args.data), args.figure)


if __name__ == "__main__":
    run_program("table.py", main)
