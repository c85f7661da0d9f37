"""Distributed set-up, checkpoints, logging and the error users see. Nothing here knows about models or data."""

import argparse
import contextlib
import datetime
import hashlib
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import timm
import torch
import torch.distributed as dist
import torchvision
from timm.utils import ParseKwargs
from tqdm import tqdm


class InputError(ValueError):
    """Something the user gave cannot be used. The message is one line: the option, its value, what to do."""


class RunError(RuntimeError):
    """A run that started well cannot go on. The message is one line."""


class Parser(argparse.ArgumentParser):
    """A parser that takes no abbreviations and reports what is wrong in one line."""

    def __init__(self, program, description):
        super().__init__(
            prog=program,
            description=description,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message):
        raise InputError(f"{message}; see --help")


class Kwargs(ParseKwargs):
    """timm's ``K=V ...`` arguments, with an error for a word without ``=``."""

    def __call__(self, parser, namespace, values, option_string=None):
        for value in values:
            if "=" not in value:
                parser.error(f"{option_string} {value}: write NAME=VALUE")
        super().__call__(parser, namespace, values, option_string)


def boolean(text):
    """Value of an option that takes true or false."""
    if text.lower() in ("true", "1", "yes"):
        return True
    if text.lower() in ("false", "0", "no"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


def run_program(name, main):
    """Run ``main()`` and exit with a status, and for an error one line on stderr instead of a traceback.

    0: done. 1: ``RunError``. 2: ``InputError``. 130: Ctrl-C. 141: who read the output has gone.

    Of several processes only the first of each machine prints the line; all of them exit with the status.
    """
    prints = find_launch(os.environ).local_rank == 0
    try:
        main()
        status = 0
    except (InputError, RunError) as error:
        if prints:
            print(f"{name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        status = 2 if isinstance(error, InputError) else 1
    except KeyboardInterrupt:
        if prints:
            print(f"\n{name}: interrupted", file=sys.stderr)
        status = 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains again when it flushes
        status = 141
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(status)


# ---------------------------------------------------------------------------------------------------------
# Processes


@dataclass(frozen=True)
class Launch:
    """Where this process stands among all processes of the run, as its launcher says."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0


def find_launch(environ, mpi=False):
    """Read rank, world size and local rank from the environment of torchrun, SLURM's srun or Open MPI's mpirun.

    Args:
        environ: mapping such as ``os.environ``.
        mpi: trust Open MPI's variables (``--dist_on_itp``); they also exist in shells that only inherited them.

    Raises:
        InputError: MPI was asked for and its variables are missing.
    """
    if mpi:
        names = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK")
        if any(name not in environ for name in names):
            raise InputError(
                "--dist_on_itp true: not started by mpirun (no OMPI_COMM_WORLD_RANK); leave the option out"
            )
        return Launch(*(int(environ[name]) for name in names))
    if "RANK" in environ and "WORLD_SIZE" in environ:  # torchrun, python -m torch.distributed.launch
        return Launch(int(environ["RANK"]), int(environ["WORLD_SIZE"]), int(environ.get("LOCAL_RANK", 0)))
    # A step's own count first: inside an allocation of 8 tasks, a plain `python main.py` is still one process.
    # srun sets it. Where somebody else played srun's part, MASTER_ADDR tells that several processes were meant.
    tasks = environ.get("SLURM_STEP_NUM_TASKS", environ.get("SLURM_NTASKS") if "MASTER_ADDR" in environ else None)
    if "SLURM_PROCID" in environ and tasks is not None and int(tasks) > 1:
        return Launch(int(environ["SLURM_PROCID"]), int(tasks), int(environ.get("SLURM_LOCALID", 0)))
    return Launch()


def slurm_master(environ):
    """Address and port all tasks of a SLURM job agree on: its first node, and a port derived from the job's number."""
    nodes = environ.get("SLURM_STEP_NODELIST", environ.get("SLURM_JOB_NODELIST", "127.0.0.1"))
    if "[" in nodes:  # node[01-04]: only scontrol knows how to expand it
        nodes = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True
        ).stdout
    return nodes.replace(",", " ").split()[0], str(20000 + int(environ.get("SLURM_JOB_ID", 0)) % 20000)


def init_distributed(launch, device, url="env://"):
    """Join the process group (NCCL on GPUs, gloo on CPUs) when there is more than one process."""
    if launch.world_size == 1:
        return
    if url == "env://" and "MASTER_ADDR" not in os.environ:
        if "SLURM_PROCID" not in os.environ:
            raise InputError(
                f"--dist_url {url}: MASTER_ADDR and MASTER_PORT are not set; start with torchrun or set both"
            )
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = slurm_master(os.environ)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend="nccl" if device.type == "cuda" else "gloo",
        init_method=url,
        rank=launch.rank,
        world_size=launch.world_size,
    )


def is_main():
    """True in the one process that prints and writes."""
    return not dist.is_initialized() or dist.get_rank() == 0


def barrier():
    """Wait for all processes, if there are several."""
    if dist.is_initialized():
        dist.barrier()


def all_reduce_sum(values):
    """Sum a tensor over all processes, in place, and return it."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def main_first(action):
    """Run ``action()`` in the main process and then in the others; an ``InputError`` of the first is raised in all."""
    if not dist.is_initialized():
        return action()
    outcome = [None]
    if is_main():
        try:
            result = action()
        except InputError as error:
            outcome = [str(error)]
    dist.broadcast_object_list(outcome)
    if outcome[0] is not None:
        raise InputError(outcome[0])
    return result if is_main() else action()


def seed_everything(*numbers):
    """Seed Python, numpy and torch from a tuple of non-negative integers.

    Training seeds with (seed, epoch, image) before augmenting an image and with (seed, epoch, micro-batch) before
    computing on a micro-batch. What is drawn then depends on no worker, process or interruption.
    """
    words = np.random.SeedSequence(numbers).generate_state(3)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    torch.manual_seed(int(words[2]))


# ---------------------------------------------------------------------------------------------------------
# Files


def sha256(path):
    """SHA-256 of a file as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def check_file(path, option):
    """Raise an InputError that names ``option`` unless ``path`` is a file."""
    if not Path(path).is_file():
        raise InputError(f"{option} {path}: no such file")


@contextlib.contextmanager
def new_file(path):
    """Give a temporary path beside ``path`` to write to; it takes the place of ``path`` only if the block succeeds.

    Raises:
        InputError: the operating system refused (permissions, full disk, a directory of that name).
    """
    path = Path(path)
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
        os.close(handle)
        yield Path(temporary)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp's 0600 would hide results from the rest of a group
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)


def write_json(path, value):
    """Write ``value`` as indented JSON, all of it or nothing."""
    with new_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")


def check_writable(directory, option):
    """Create ``directory`` if need be and make sure files can be made in it.

    Raises:
        InputError: they cannot; the message names ``option``.
    """
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise InputError(
            f"{option} {directory}: cannot write there ({error.strerror}); name another directory"
        ) from error


def versions():
    """Versions of what a result depends on."""
    return {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
        "numpy": np.__version__,
    }


# ---------------------------------------------------------------------------------------------------------
# Checkpoints: plain types and tensors only, so that torch.load(weights_only=True) reads them


def save_torch(value, path):
    """``torch.save``, with an OSError whatever the reason that the file cannot be written. Use within ``new_file``."""
    try:
        with open(path, "wb") as file:
            torch.save(value, file)
    except RuntimeError as error:  # torch hides a full disk behind a message about its archive writer
        raise OSError(f"is the disk full? {str(error).splitlines()[0]}") from error


def load_torch(path, option, also=()):
    """``torch.load(weights_only=True)`` with one-line errors.

    Args:
        path: the file.
        option: the command-line option that named it, for errors.
        also: classes that may be in it, beside tensors and plain types.

    Raises:
        InputError: no such file, or not a file that holds only these.
    """
    check_file(path, option)
    try:
        with torch.serialization.safe_globals(list(also)):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # corrupt input makes torch raise nearly anything; nothing else runs in this block
        reason = (str(error) or type(error).__name__).splitlines()[0][:160]
        raise InputError(
            f"{option} {path}: not a readable PyTorch file of tensors and plain types (empty, truncated, or with "
            f"code in it: {reason})"
        ) from error


def checkpoint_epochs(directory):
    """Epochs of the ``checkpoint-EPOCH.pth`` files in a directory, ascending."""
    names = (path.stem.removeprefix("checkpoint-") for path in Path(directory).glob("checkpoint-*.pth"))
    return sorted(int(name) for name in names if name.isdigit())


def checkpoint_path(directory, epoch):
    """Path of the checkpoint written after epoch ``epoch`` (counted from 0), or of ``"best"``."""
    return Path(directory) / f"checkpoint-{epoch}.pth"


def prune_checkpoints(directory, keep):
    """Delete all but the ``keep`` newest numbered checkpoints."""
    for epoch in checkpoint_epochs(directory)[:-keep]:
        checkpoint_path(directory, epoch).unlink()


# ---------------------------------------------------------------------------------------------------------
# Logging


def say(*words):
    """Print in the main process only."""
    if is_main():
        tqdm.write(" ".join(str(word) for word in words))
        sys.stdout.flush()


def duration(seconds):
    """Seconds as h:mm:ss."""
    return str(datetime.timedelta(seconds=round(seconds)))


class Progress:
    """Progress through ``total`` steps: a bar with the time left on a terminal, else ``lines`` lines with it."""

    def __init__(self, header, total, lines=5):
        self.header, self.total = header, total
        self.every = max(1, total // lines) if lines else math.inf
        self.done, self.start = 0, time.monotonic()
        self.bar = None
        if is_main() and sys.stderr.isatty():
            self.bar = tqdm(total=total, desc=header, leave=False, dynamic_ncols=True)

    def step(self, describe):
        """Count one step. ``describe()`` gives the text; it is called only when something is shown."""
        self.done += 1
        shown = self.done % self.every == 0 or (self.done == self.total and self.every <= self.total)
        if self.bar is not None:
            if shown or self.done % 10 == 0:
                self.bar.set_postfix_str(describe(), refresh=False)
            self.bar.update()
        elif shown and is_main():
            left = (time.monotonic() - self.start) / self.done * (self.total - self.done)
            say(f"{self.header} [{self.done:>{len(str(self.total))}}/{self.total}] {describe()} eta {duration(left)}")

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        if self.bar is not None:
            self.bar.close()


def describe(figures):
    """Names and values in one line."""
    words = (
        f"{name} {value:.6g}" if isinstance(value, float) else f"{name} {value}" for name, value in figures.items()
    )
    return ", ".join(words)


class Board:
    """Where the figures of each epoch go: ``log.txt`` in the output directory, TensorBoard, Weights & Biases.

    Args:
        args: uses output_dir, log_dir, enable_wandb, project and wandb_ckpt.
        first_epoch: rows of earlier epochs in an existing ``log.txt`` are kept, later ones are trained again.
        options: plain dict of all options, for Weights & Biases.
    """

    def __init__(self, args, first_epoch, options):
        self.path = Path(args.output_dir) / "log.txt" if args.output_dir and is_main() else None
        rows = map(json.loads, self.path.read_text().splitlines()) if self.path and self.path.exists() else ()
        self.rows = [row for row in rows if row["epoch"] < first_epoch]
        self.board = self.wandb = None
        if args.log_dir and is_main():
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(args.log_dir, purge_step=first_epoch)
        if args.enable_wandb and is_main():
            import wandb

            self.wandb = wandb.init(project=args.project, config=options)
        self.upload = args.wandb_ckpt

    def add(self, row):
        """Log one epoch's figures."""
        self.rows.append(row)
        if self.path:
            with new_file(self.path) as temporary:
                temporary.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        for name, value in row.items() if self.board else ():
            self.board.add_scalar(name.replace("_", "/", 1), value, row["epoch"])
        if self.wandb:
            self.wandb.log(row, step=row["epoch"])

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        if self.board:
            self.board.close()
        if self.wandb:
            if self.upload and self.rows:
                self.wandb.log_model(str(checkpoint_path(self.path.parent, self.rows[-1]["epoch"])))
            self.wandb.finish(exit_code=int(exception[0] is not None))
