"""The metrics of a run: by epoch in ``log.txt``, TensorBoard and Weights & Biases, and by step in TensorBoard."""

import contextlib
import json
from pathlib import Path

import torch

from distributed.process_group import main_only
from distributed.program import RunError
from training.options import CANNOT_CHANGE_RESULT, Options
from utils import is_main
from weight_selection import files
from weight_selection.errors import InputError, first_line

WANDB_RUN = "wandb_run.txt"  # in the output directory: the id of the run of Weights & Biases
HEADS = {"loss": "loss", "class_acc": "loss", "distance": "loss"}  # of TensorBoard's tags by step; all others: opt


class MetricLog:
    """Writes the metrics of a run. Only the main process writes; in the others nothing happens.

    ``log.txt`` holds no time and no speed, so that a run leaves the same log whether it was interrupted or not. An
    existing one keeps the rows before ``first_epoch``; later epochs are trained again. ``first_step`` of the run is the
    next to be trained; both count from 0.

    TensorBoard's tags are those of the ConvNeXt code: loss/loss or opt/lr by step, perf/test_acc1 by epoch.

    Raises:
        InputError: ``log.txt`` is damaged, or Weights & Biases refuses the run.
    """

    def __init__(self, options: Options, first_epoch: int, first_step: int):
        self.options = options
        self.path, self.rows = None, []
        self.tensorboard = self.wandb = None
        self.checkpoint = None  # to upload to Weights & Biases at the end if ``--wandb_ckpt`` asks for it
        self.shows_images = bool(options.log_dir and first_step == 0 and is_main())  # whether it takes ``add_images``
        main_only(self._open, first_epoch, first_step)

    def _open(self, first_epoch, first_step):
        options = self.options
        self.path = Path(options.output_dir) / "log.txt" if options.output_dir else None
        if self.path and self.path.exists():
            self.rows = [row for row in read_log(self.path) if row["epoch"] < first_epoch]
        if options.enable_wandb:
            self.wandb = start_wandb(options)
        if options.log_dir:
            from torch.utils.tensorboard import SummaryWriter

            # TensorBoard drops what has this step or a later one. Of the metrics by epoch, which have smaller numbers,
            # some may stay; the epoch that is trained again has the same.
            self.tensorboard = SummaryWriter(options.log_dir, purge_step=first_step)

    def add_images(self, images: dict[str, torch.Tensor]) -> None:
        """Show images, {name: (images, 3, size, size) from 0 to 1}, as grids."""
        with contextlib.suppress(OSError):  # the writer keeps the error, and ``add`` raises it
            for name, values in images.items():
                self.tensorboard.add_images(f"images/{name}", values)

    def add_step(self, step: int, row: dict[str, float]) -> None:
        """Log the metrics of a step of the run, counted from 0, in TensorBoard."""
        with contextlib.suppress(OSError):  # as above
            for name, value in row.items() if self.tensorboard else ():
                self.tensorboard.add_scalar(f"{HEADS.get(name, 'opt')}/{name}", value, step)

    def add(self, row: dict, speed: dict) -> None:
        """Log an epoch: ``row`` everywhere, and ``speed``, which depends on the clock, everywhere but in ``log.txt``.

        TensorBoard leaves out what it has by step. The last epoch ends its log with the options.

        Raises:
            RunError: a log cannot be written.
        """
        self.rows.append(row)
        try:
            if self.path:
                with files.new_file(self.path) as temporary:
                    temporary.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
            if self.tensorboard:
                self._add_to_tensorboard(row, speed)
            if self.wandb:
                self.wandb.log(row | speed, step=row["epoch"])
        except (InputError, OSError) as error:
            raise RunError(f"the log of epoch {row['epoch']} is lost: {error}") from error

    def _add_to_tensorboard(self, row, speed):
        by_epoch = ("test_", "train_skipped_steps", "train_loss_scale", *speed)
        for name, value in (row | speed).items():
            if name.startswith(by_epoch):
                self.tensorboard.add_scalar(f"perf/{name}", value, row["epoch"])
        if row["epoch"] == self.options.epochs - 1:
            from torch.utils.tensorboard.summary import hparams

            # SummaryWriter.add_hparams would make a second run of it, beside the one with the curves.
            accuracies = [f"perf/{name}" for name in row if name.startswith("test_acc1")]
            for summary in hparams(tabulated(self.options), dict.fromkeys(accuracies)):
                self.tensorboard.file_writer.add_summary(summary)
        self.tensorboard.flush()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        if self.tensorboard:
            self.tensorboard.close()
        if self.wandb:
            if self.options.wandb_ckpt and self.checkpoint is not None:
                self.wandb.log_model(str(self.checkpoint))
            self.wandb.finish(exit_code=int(exception[0] is not None))


def tabulated(options: Options) -> dict[str, str | int | float]:
    """The options that have a value and can change a result, as TensorBoard's table of runs takes them."""
    values = {name: value for name, value in options.plain().items() if name not in CANNOT_CHANGE_RESULT}
    plain = {name: value for name, value in values.items() if value is not None}
    return {name: value if type(value) in (str, int, float) else json.dumps(value) for name, value in plain.items()}


def check_wandb() -> None:
    """Make sure that this machine is logged in to Weights & Biases, unless its WANDB_MODE needs no login.

    Raises:
        InputError: it is not.
    """
    import wandb

    try:
        wandb.login()
    except wandb.Error as error:
        raise _refused(error, "run `wandb login`, set WANDB_MODE=offline, or leave it out") from error


def start_wandb(options: Options) -> "wandb.Run":  # noqa: F821
    """The run of Weights & Biases. The one that ``--output_dir`` names goes on; a new one is noted there.

    Raises:
        InputError: Weights & Biases refuses it, or the note is damaged.
    """
    import wandb

    note = Path(options.output_dir) / WANDB_RUN if options.output_dir else None
    how = {"project": options.project, "config": options.plain(), "allow_val_change": True}
    try:
        if note and note.exists():
            how |= {"id": files.read_text(note).strip(), "resume": "allow"}
        run = wandb.init(**how)
    except (wandb.Error, files.Damaged) as error:
        remedy = f"delete {note} to start another run" if "id" in how else "see what it printed, or leave it out"
        raise _refused(error, remedy) from error
    if note:
        with files.new_file(note) as temporary:
            temporary.write_text(f"{run.id}\n")
    return run


def _refused(error, remedy):
    return InputError(f"--enable_wandb true: Weights & Biases refuses ({first_line(error)}); {remedy}")


def read_log(path: Path) -> list[dict]:
    """The rows of a ``log.txt``, one for each epoch; an InputError names a line that is damaged."""
    rows = []
    try:
        for line in files.read_text(path).splitlines():
            row = files.parse_json(line)
            if not isinstance(row, dict) or type(row.get("epoch")) is not int:
                raise files.Damaged("no metrics of an epoch")
            rows.append(row)
    except files.Damaged as error:
        raise InputError(f"{path}: damaged in line {len(rows) + 1} ({error}); repair it, or move it away") from error
    return rows
