"""Where the figures of each epoch go: ``log.txt``, TensorBoard, Weights & Biases."""

import json
from pathlib import Path

from distributed.program import RunError
from utils import is_main
from weight_selection import files
from weight_selection.errors import InputError
from weight_selection.files import Damaged, new_file


class MetricLog:
    """Keeps the figures of each epoch. Only the main process does anything.

    ``log.txt`` holds nothing that a clock says: the same run leaves the same log, interrupted or not.

    Args:
        args: uses output_dir, log_dir, enable_wandb, project and wandb_ckpt.
        first_epoch: rows of earlier epochs in an existing ``log.txt`` are kept, later ones are trained again.
        options: plain dict of all options, for Weights & Biases.

    Raises:
        InputError: ``log.txt`` is damaged.
    """

    def __init__(self, args, first_epoch, options):
        self.path = Path(args.output_dir) / "log.txt" if args.output_dir and is_main() else None
        self.rows = []
        if self.path and self.path.exists():
            self.rows = [row for row in read_log(self.path) if row["epoch"] < first_epoch]
        self.board = self.wandb = None
        if args.log_dir and is_main():
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(args.log_dir, purge_step=first_epoch)
        if args.enable_wandb and is_main():
            import wandb

            self.wandb = wandb.init(project=args.project, config=options)
        self.upload, self.checkpoint = args.wandb_ckpt, None

    def add(self, row, speed):
        """Log one epoch's figures.

        Args:
            row: for all logs.
            speed: what depends on the clock; not for ``log.txt``.

        Raises:
            RunError: a log cannot be written.
        """
        self.rows.append(row)
        try:
            if self.path:
                with new_file(self.path) as temporary:
                    temporary.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
            for name, value in (row | speed).items() if self.board else ():
                self.board.add_scalar(name.replace("_", "/", 1), value, row["epoch"])
            if self.wandb:
                self.wandb.log(row | speed, step=row["epoch"])
        except (InputError, OSError) as error:
            raise RunError(f"the log of epoch {row['epoch']} is lost: {error}") from error

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        if self.board:
            self.board.close()
        if self.wandb:
            if self.upload and self.checkpoint is not None:
                self.wandb.log_model(str(self.checkpoint))
            self.wandb.finish(exit_code=int(exception[0] is not None))


def read_log(path: Path) -> list:
    """The rows of a ``log.txt``, one dict per epoch.

    Raises:
        InputError: damaged; names the line.
    """
    rows = []
    try:
        for line in files.read_text(path).splitlines():
            row = files.parse_json(line)
            if not isinstance(row, dict) or type(row.get("epoch")) is not int:
                raise Damaged("no figures of an epoch")
            rows.append(row)
    except Damaged as error:
        raise InputError(f"{path}: damaged in line {len(rows) + 1} ({error}); repair it, or move it away") from error
    return rows
