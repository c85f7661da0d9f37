"""The metrics of each epoch in ``log.txt``, TensorBoard and Weights & Biases."""

import json
from pathlib import Path

from distributed.program import RunError
from training.options import Options
from utils import is_main
from weight_selection import files
from weight_selection.errors import InputError


class MetricLog:
    """Writes the metrics of each epoch. Only the main process writes; in the others nothing happens.

    ``log.txt`` holds no time and no speed, so that a run leaves the same log whether it was interrupted or not. An
    existing one keeps the rows before ``first_epoch``; later epochs are trained again.

    Raises:
        InputError: ``log.txt`` is damaged.
    """

    def __init__(self, options: Options, first_epoch: int):
        self.path = Path(options.output_dir) / "log.txt" if options.output_dir and is_main() else None
        self.rows = []
        if self.path and self.path.exists():
            self.rows = [row for row in read_log(self.path) if row["epoch"] < first_epoch]
        self.tensorboard = self.wandb = None
        if options.log_dir and is_main():
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(options.log_dir, purge_step=first_epoch)
        if options.enable_wandb and is_main():
            import wandb

            self.wandb = wandb.init(project=options.project, config=options.plain())
        self.upload = options.wandb_ckpt
        self.checkpoint = None  # to upload to Weights & Biases at the end if ``--wandb_ckpt`` asks for it

    def add(self, row: dict, speed: dict) -> None:
        """Log an epoch: ``row`` everywhere, and ``speed``, which depends on the clock, everywhere but in ``log.txt``.

        Raises:
            RunError: a log cannot be written.
        """
        self.rows.append(row)
        try:
            if self.path:
                with files.new_file(self.path) as temporary:
                    temporary.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
            for name, value in (row | speed).items() if self.tensorboard else ():
                self.tensorboard.add_scalar(name.replace("_", "/", 1), value, row["epoch"])
            if self.wandb:
                self.wandb.log(row | speed, step=row["epoch"])
        except (InputError, OSError) as error:
            raise RunError(f"the log of epoch {row['epoch']} is lost: {error}") from error

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        if self.tensorboard:
            self.tensorboard.close()
        if self.wandb:
            if self.upload and self.checkpoint is not None:
                self.wandb.log_model(str(self.checkpoint))
            self.wandb.finish(exit_code=int(exception[0] is not None))


def read_log(path: Path) -> list[dict]:
    """The rows of a ``log.txt``, one for each epoch; an InputError names a line that is damaged."""
    rows = []
    try:
        for line in files.read_text(path).splitlines():
            row = files.parse_json(line)
            if not isinstance(row, dict) or type(row.get("epoch")) is not int:
                raise files.Damaged("no figures of an epoch")
            rows.append(row)
    except files.Damaged as error:
        raise InputError(f"{path}: damaged in line {len(rows) + 1} ({error}); repair it, or move it away") from error
    return rows
