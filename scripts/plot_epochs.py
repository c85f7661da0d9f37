#!/usr/bin/env python3
"""Draw Figure 4 of the paper: what weight selection saves of training ViT-T on CIFAR-100.

python scripts/plot_epochs.py results/ --output figure04.png

Panel (a) has accuracy against the number of epochs, from random and from selected weights. It is drawn from the runs
vit_tiny/cifar100/{random,selected}_EPOCHS/SEED, and from those without _EPOCHS, which have the recipe's 300. Panel (b)
has accuracy against the epochs of pretraining on ImageNet-1K before fine-tuning (the runs finetuned_EPOCHS), beside the
level that weight selection reaches without pretraining.
"""

import statistics
import sys
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))  # the repository's modules
import paper
import style
from runs import figure_parser, print_lines, read_run, seed_directories, trained_epochs
from weight_selection.errors import InputError, run_program

RANDOM, SELECTED, TUNED = "random init", "weight selection", "pretraining and fine-tuning"
NEVER = "none of these runs does"
SCRIPT = "scripts/figure04.sh"
DIRECTORY, IMAGENET = "vit_tiny/cifar100", "vit_tiny/imagenet"
RECIPE = paper.recipe(*DIRECTORY.split("/"))
# The paper shortens the warm-up with the training, and does not say to how many whole epochs.
SHORTENED = ("epochs", "warmup_epochs")
FIXED = {name: value for name, value in RECIPE.items() if name not in SHORTENED}
PRETRAINED = {name: value for name, value in paper.recipe(*IMAGENET.split("/")).items() if name not in SHORTENED}


def find(out: Path, name: str, options: dict, strange: list, directory: str = DIRECTORY) -> list:
    """The finished runs of a name. Each that deviates from the paper's ``options`` adds a line to ``strange``."""
    path, epochs = f"{directory}/{name}", trained(out)
    runs = [read_run(directory) for directory in seed_directories(out / path)]
    for run in runs:
        if differs := paper.deviations(path, run, SCRIPT, options, **epochs):
            strange.append(f"{path}, seed {run.seed}: {', '.join(differs)}")
    return runs


def trained(out: Path) -> dict:
    """The variables of figure04.sh with which it makes the runs in ``out``: numbers of epochs in words."""
    names = {"EPOCHS": ("random", "selected"), "PRETRAINING": ("finetuned",)}
    return {
        variable: " ".join(str(epochs) for name in some for epochs in trained_epochs(out / DIRECTORY, name))
        for variable, some in names.items()
    }


def accuracies(runs: list) -> list:
    """The best accuracy of each run."""
    return [run.accuracy("best") for run in runs]


def training(out: Path, strange: list) -> dict:
    """The data of panel (a): {label of the weights: {number of epochs: accuracies over the seeds}}."""
    lines = {}
    for label, name in ((RANDOM, "random"), (SELECTED, "selected")):
        runs = {}
        for epochs in trained_epochs(out / DIRECTORY, name):
            runs[epochs] = find(out, f"{name}_{epochs}", FIXED | {"epochs": epochs}, strange)
        runs[RECIPE["epochs"]] = find(out, name, RECIPE, strange)
        lines[label] = {epochs: accuracies(runs[epochs]) for epochs in sorted(runs) if runs[epochs]}
    return {label: line for label, line in lines.items() if line}


def pretraining(out: Path, strange: list) -> dict:
    """The data of panel (b): {number of epochs of pretraining: accuracies after fine-tuning, over the seeds}."""
    options = {"epochs": RECIPE["epochs"]}  # all that the paper says of fine-tuning
    lengths = trained_epochs(out / DIRECTORY, "finetuned")
    for epochs in lengths:  # a run that another pretraining began is strange too
        find(out, f"pretrained_{epochs}", PRETRAINED | {"epochs": epochs}, strange, IMAGENET)
    runs = {epochs: find(out, f"finetuned_{epochs}", options, strange) for epochs in lengths}
    return {epochs: accuracies(found) for epochs, found in runs.items() if found}


def claims(lines: dict, tuned: dict) -> list:
    """What the paper claims of Figure 4, computed from the runs there are: lines of text.

    Selection reaches the accuracy of random init in a third of its epochs. Pretraining needs 60 epochs of ImageNet-1K
    to reach that of selection, and fine-tuning included it sees 6.12 times as many images.
    """
    whole, said = RECIPE["epochs"], []
    if goal := lines.get(RANDOM, {}).get(whole):
        epochs = first_to_reach(lines.get(SELECTED, {}), goal)
        share = epochs and f"{epochs} of {whole} epochs, {epochs / whole:.0%} (paper: a third)"
        said.append(f"weight selection reaches random init ({statistics.fmean(goal):.1f}) after: {share or NEVER}")
    if goal := lines.get(SELECTED, {}).get(whole):
        epochs = first_to_reach(tuned, goal)
        (imagenet, _), (cifar, _) = map(paper.images, ("imagenet", "cifar100"))
        times = epochs and 1 + epochs * imagenet / (whole * cifar)
        share = epochs and f"{epochs} epochs, {times:.2f} times the images of selection (paper: 60, 6.12)"
        said.append(f"pretraining reaches weight selection ({statistics.fmean(goal):.1f}) after: {share or NEVER}")
    return said


def first_to_reach(line: dict, goal: list) -> int | None:
    """The smallest number of epochs of a line {epochs: accuracies} whose mean is at least that of ``goal``."""
    return min(
        (epochs for epochs, found in line.items() if statistics.fmean(found) >= statistics.fmean(goal)), default=None
    )


def draw_level(axes: Axes, values: list, color: str) -> None:
    """A horizontal line at the mean of ``values`` in a band over their range."""
    axes.axhline(statistics.fmean(values), label=SELECTED, color=color, linestyle="--")
    axes.axhspan(min(values), max(values), alpha=0.2, color=color, linewidth=0)


def draw(lines: dict, tuned: dict, strange: list) -> Figure:
    """The figure, with each panel for which there are runs."""
    figure, panels = style.new_figure(bool(lines) + bool(tuned))
    if lines:
        for label, line in lines.items():
            style.draw_seeds(panels[0], list(line), list(line.values()), label)
        panels[0].set(xlabel="epochs of training on CIFAR-100", title="(a) Random and selected weights")
    if tuned:
        style.draw_seeds(panels[-1], list(tuned), list(tuned.values()), TUNED, color=style.COLOURS[2])
        if level := lines.get(SELECTED, {}).get(RECIPE["epochs"]):
            draw_level(panels[-1], level, style.COLOURS[1])
        panels[-1].set(xlabel="epochs of pretraining on ImageNet-1K", title="(b) Pretraining and fine-tuning")
    for axes in panels:
        axes.set(ylabel=f"CIFAR-100 {style.ACCURACY}", xlim=(0, None))
        axes.legend(title=style.LEGEND, loc="lower right")
    if strange:
        figure.suptitle(f"Runs that are not of the paper's recipe: {len(strange)}", color="red")
    return figure


def main(argv: list[str] | None = None) -> None:
    args = figure_parser("plot_epochs.py", __doc__).parse_args(argv)
    strange = []
    lines, tuned = training(args.out, strange), pretraining(args.out, strange)
    if not lines and not tuned:
        raise InputError(f"OUT {args.out}: no finished runs {DIRECTORY}/{{random,selected,finetuned}}_EPOCHS/SEED")
    print_lines(lines | {TUNED: tuned})
    for line in claims(lines, tuned) + [f"not the paper's recipe: {line}" for line in strange]:
        print(line)
    style.save(draw(lines, tuned, strange), args.output)
    print(f"figure: {args.output}")


if __name__ == "__main__":
    run_program("plot_epochs.py", main)
