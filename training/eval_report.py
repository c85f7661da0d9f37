"""What an evaluation with ``--output_dir`` leaves to look at: accuracy by class, confusions, every image, the worst.

report.json      metrics of all images and of each class, and which classes are taken for which
predictions.csv  a row for each test image
confusion.png    the share of each class's images that each class is predicted for
worst.png        the mistakes that the model was surest of
"""

import csv
import textwrap
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from sklearn.metrics import confusion_matrix

from distributed.process_group import main_only
from engine import TrainState
from training.options import Options
from training.setup import RunData
from utils import print_main
from weight_selection.errors import InputError
from weight_selection.files import check_writable, new_file, write_json

FILES = ("report.json", "predictions.csv", "confusion.png", "worst.png")
WORST = 24  # images on the sheet
CONFUSIONS = 20  # pairs of classes in report.json
NAMED = 40  # classes whose names fit beside the matrix


class EvalReport:
    """Collects an evaluation's outputs, in every process, and writes the report in the first.

    Raises:
        InputError: ``--output_dir`` cannot be written, or holds a report and ``--overwrite`` is not given.
    """

    def __init__(self, options: Options, data: RunData, state: TrainState):
        self.options, self.data, self.state = options, data, state
        self.directory, self.batches = Path(options.output_dir), []
        self.image_files = [str(path) for path, _ in getattr(data.test_set, "samples", ())]  # none: not in files
        main_only(self._check)

    def _check(self):
        held = [name for name in FILES if (self.directory / name).exists()]
        if held and not self.options.overwrite:
            raise InputError(
                f"--output_dir {self.directory}: holds a report ({held[0]}); choose another directory, or add "
                "--overwrite true to replace it"
            )
        check_writable(self.directory, "--output_dir")

    def note(self, logits: torch.Tensor, targets: torch.Tensor) -> None:
        """Take the outputs of a batch: logits (images, classes) and targets (images,)."""
        probabilities = logits.softmax(1)
        shares, classes = probabilities.topk(min(5, logits.shape[1]))
        own = probabilities.gather(1, targets[:, None])[:, 0]
        self.batches.append([values.cpu() for values in (targets, own, classes, shares)])

    def write(self, metrics: dict) -> None:
        """Write the files. All processes must call it.

        Args:
            metrics: of ``engine.evaluate``.

        Raises:
            InputError: the disk is full; no part of the report is left.
        """
        mine = [torch.cat(values) for values in zip(*self.batches, strict=True)] if self.batches else None
        if self.options.dist_eval:
            parts = [part for part in self.state.stop_coordinator.gather_objects(mine) if part is not None]
        else:
            parts = [mine]
        main_only(self._write_all_or_nothing, metrics, parts)

    def _write_all_or_nothing(self, metrics, parts):
        try:
            self._write(metrics, parts)
        except InputError:
            for name in FILES:  # or the same command would find a report
                (self.directory / name).unlink(missing_ok=True)
            raise

    def _write(self, metrics, parts):
        processes = len(parts)
        images = sum(len(part[0]) for part in parts)
        # Process r had the images r, r + processes, ...
        order = torch.cat([torch.arange(rank, images, processes) for rank in range(processes)]).argsort()
        rows = [torch.cat(values)[order] for values in zip(*parts, strict=True)]
        targets, _, classes, _ = rows
        matrix = confusion_matrix(targets, classes[:, 0], labels=range(self.data.classes))
        write_json(self.directory / "report.json", self._report(metrics, matrix))
        with new_file(self.directory / "predictions.csv") as temporary, open(temporary, "w", newline="") as file:
            csv.writer(file).writerows(self._table(*rows))
        save(draw_confusion(matrix, self.data.class_names), self.directory / "confusion.png")
        written = list(FILES)
        if sheet := self._draw_worst(*rows):
            save(sheet, self.directory / "worst.png")
        else:
            (self.directory / written.pop()).unlink(missing_ok=True)
        print_main(f"report: {', '.join(written)} in {self.directory}")

    def _report(self, metrics, matrix):
        names, options = self.data.class_names, self.options
        wrong = matrix.copy()
        wrong.ravel()[:: len(names) + 1] = 0
        pairs = sorted(zip(*wrong.nonzero(), strict=True), key=lambda pair: -wrong[pair])[:CONFUSIONS]
        return {
            "model": options.model,
            "weights": options.resume or options.initialize or options.finetune,
            "data_set": options.data_set,
            **metrics,
            "classes": {
                name: {
                    "images": int(matrix[label].sum()),
                    "acc1": _percent(matrix[label, label], matrix[label].sum()),
                    "predicted": int(matrix[:, label].sum()),
                    "precision": _percent(matrix[label, label], matrix[:, label].sum()),
                }
                for label, name in enumerate(names)
            },
            "confusions": [
                {"class": names[true], "predicted": names[said], "images": int(wrong[true, said])}
                for true, said in pairs
            ],
        }

    def _table(self, targets, own, classes, shares):
        """Rows of predictions.csv; the first names the columns."""
        names = self.data.class_names
        ranks = [f"{what}_{rank + 1}" for rank in range(classes.shape[1]) for what in ("class", "probability")]
        yield ["image", "class", "probability", *ranks]
        rows = zip(targets.tolist(), own.tolist(), classes.tolist(), shares.tolist(), strict=True)
        for number, (target, share, best, best_shares) in enumerate(rows):
            pairs = zip(best, best_shares, strict=True)
            predicted = [value for label, its in pairs for value in (names[label], f"{its:.6f}")]
            image = self.image_files[number] if self.image_files else str(number)
            yield [image, names[target], f"{share:.6f}", *predicted]

    def _draw_worst(self, targets, own, classes, shares):
        """A sheet of the mistakes that the model was surest of; None if it made none."""
        wrong = (classes[:, 0] != targets).nonzero()[:, 0]
        worst = wrong[shares[wrong, 0].argsort(descending=True, stable=True)][:WORST].tolist()
        if not worst:
            return None
        names, columns = self.data.class_names, min(6, len(worst))
        lines = -(-len(worst) // columns)
        figure = Figure(figsize=(2 * columns, 2.35 * lines), layout="constrained")
        for panel in (panels := figure.subplots(lines, columns, squeeze=False).ravel()):
            panel.axis("off")
        for panel, number in zip(panels, worst, strict=False):
            panel.imshow(Image.fromarray(self.data.test_set[number][0].numpy()))
            said = f"{_short(names[classes[number, 0]])} ({100 * shares[number, 0]:.0f} %)"
            true = f"{_short(names[targets[number]])} ({100 * own[number]:.0f} %)"
            panel.set_title(f"said: {said}\nis: {true}", fontsize=7)
        return figure


def draw_confusion(matrix: np.ndarray, names: list[str]) -> Figure:
    """A confusion matrix (classes, classes) of numbers of images, as shares of each row."""
    side = 4 + 0.16 * min(len(names), NAMED)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    shares = matrix / matrix.sum(1, keepdims=True).clip(1)
    figure.colorbar(axes.imshow(100 * shares, cmap="Blues", vmin=0, vmax=100), label="% of the class's images")
    if len(names) <= NAMED:
        axes.set_xticks(range(len(names)), map(_short, names), rotation=90, fontsize=7)
        axes.set_yticks(range(len(names)), map(_short, names), fontsize=7)
    axes.set(xlabel="predicted class", ylabel="class")
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    with new_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


def _short(name):
    return textwrap.shorten(name, 24, placeholder="…") if " " in name else name[:24]


def _percent(part, whole):
    """In percent; None of nothing."""
    return 100 * float(part) / float(whole) if whole else None
