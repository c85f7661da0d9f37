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
from rivals.schedule import EPOCHS, RESULTS, STUDENTS, ablated, finalists, of_student, read_results, tuned, tuning_rows
from weight_selection.arguments import Parser
from weight_selection.errors import InputError, run_program

HEAD_OF_ABLATIONS = ("first weights", "probe", "val", "seeds")
HEAD = ("first weights", "probe", "val", "learning rate", "classifier", "test", "CPU seconds before training")


def spread(values: list[float], digits: int = 1) -> str:
    """Mean and, of several values, standard deviation."""
    mean = f"{statistics.mean(values):.{digits}f}" if values else ""
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def tests(rows: list[dict], arm: str, data: str, epochs: int | None = None) -> list[dict]:
    """An arm's runs on test images, of one length or of all."""
    found = [row for row in rows if (row["phase"], row["arm"], row["data"]) == ("test", arm, data)]
    return [row for row in found if epochs in (None, row["epochs"])]


def table(rows: list[dict], student: str, data: str, epochs: int) -> list[tuple]:
    """HEAD's words for each arm, the best on test images first and then on validation images."""
    lines, own = [], [row for row in rows if row["student"] == student]
    for arm in ARMS:
        best, tested = tuned(own, arm), tests(rows, arm, data, epochs)
        accuracies = [row["accuracy"] for row in tested]
        if not tested and (best is None or data != "flowers"):  # the tuning is on Flowers-102
            continue
        of = tested or [best]
        seconds = spread([statistics.mean(row["seconds_before"] for row in of)], 0)
        probe, val = spread([row["probe"] for row in of[:1]]), spread([best["accuracy"]] if best else [])
        words = arm, probe, val, f"{of[0]['lr']:g}", of[0]["classifier"], spread(accuracies), seconds
        lines.append((statistics.mean(accuracies) if tested else 0, best["accuracy"] if best else 0, words))
    return [words for *_, words in sorted(lines, key=lambda line: line[:2], reverse=True)]


def ablations(rows: list[dict], student: str) -> list[tuple]:
    """HEAD_OF_ABLATIONS' words for each projection, and for each without a part or from other images."""
    found = {arm: [row for row in rows if (row["phase"], row["arm"]) == ("ablate", arm)] for arm in ablated(student)}
    return [
        (arm, *(spread([row[figure] for row in own]) for figure in ("probe", "accuracy")), str(len(own)))
        for arm, own in found.items()
        if own
    ]


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
        head, lines = HEAD_OF_ABLATIONS, ablations(rows, args.student)
    else:
        head, lines = HEAD, table(rows, args.student, args.data, args.epochs or EPOCHS[args.data])
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
